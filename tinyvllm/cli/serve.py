"`tinyvllm serve`."
import os
from functools import partial

from tinyvllm.cli.generate import SIZES
from tinyvllm.cli.options import Parser, model_options
from tinyvllm.cli.top import secret
from tinyvllm.errors import BadInput

EXAMPLES = """\
examples:
  tinyvllm serve                                   the default model, at http://127.0.0.1:8000
  tinyvllm serve --model ./folder-or-file.gguf --port 9000 --max-num-seqs 64
  TINYVLLM_API_KEY=secret tinyvllm serve --host 0.0.0.0
  tinyvllm serve --api-key-file keys.txt           a key a line; clients send one as their API key
then:
  open http://127.0.0.1:8000                       a page to chat with it, and what it is doing
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}'
  OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python your_program.py

It listens at once and answers 503 until the model is there. Ctrl-C or SIGTERM: answers that are on
their way are finished first; a second one ends them. Needs `pip install 'tinyvllm[serve]'`."""


def serve_options(p: Parser) -> None:
    "Where to listen, which clients to answer, how large the engine is."
    p.add_argument('--host', default='127.0.0.1', help='default 127.0.0.1, this machine only; 0.0.0.0 is every network')
    p.add_argument('--port', type=int, default=8000, metavar='N', help='default 8000; 0 is any that is free')
    p.add_argument('--served-model-name', nargs='+', metavar='NAME',
                   help='what clients call the model; default: the name given to --model, without folders')
    p.add_argument('--api-key', action='append', default=[], metavar='KEY',
                   help='repeatable; others on this machine can see it: better $TINYVLLM_API_KEY or a file')
    p.add_argument('--api-key-file', metavar='FILE', help='a key a line; # begins a comment')
    p.add_argument('--allowed-origin', action='append', default=[], metavar='URL',
                   help='a page of another host that may ask from a browser; repeatable; default none')
    p.add_argument('--logits-processor', action='append', default=[], metavar='NAME',
                   help='an installed plugin that requests may use (entry point tinyvllm.logits_processors); repeatable')
    p.add_argument('--public-metrics', action='store_true', help='/metrics and /stats without a key')
    p.add_argument('--quiet', action='store_true', help='no line for each request')
    serve_limits(p)
    model_options(p)


def serve_limits(p: Parser) -> None:
    "How much work, and for how long."
    p.add_argument('--max-model-len', type=int, metavar='N', help='longest prompt with its answer; default: the '
                   "model's context, or what the pool of blocks holds")
    p.add_argument('--max-num-seqs', type=int, metavar='N', help='answers that run at once; default 256')
    p.add_argument('--max-num-batched-tokens', type=int, metavar='N',
                   help='tokens of a step; default: 256 on a processor, 2048 on a CUDA card, else 512')
    p.add_argument('--num-blocks', type=int, metavar='N',
                   help='blocks of 16 tokens for keys and values; default: as many as fit')
    p.add_argument('--max-queue', type=int, default=256, metavar='N',
                   help='prompts that wait for their first token; one more gets 429; default 256')
    p.add_argument('--max-n', type=int, default=16, metavar='N', help='answers to one prompt; default 16')
    p.add_argument('--queue-timeout', type=float, metavar='S', help='503 for what waits longer; default: none')
    p.add_argument('--request-timeout', type=float, metavar='S', help='408 for what takes longer; default: none')
    p.add_argument('--shutdown-timeout', type=float, default=30, metavar='S',
                   help='for the answers that are on their way; default 30')
    p.add_argument('--no-warmup', action='store_true', help='open at once; the first requests wait for compilers')


def serve(args) -> int:
    "`tinyvllm serve`: serve until a signal comes."
    try:
        from tinyvllm.server.run import run_server
    except ModuleNotFoundError as error:
        raise BadInput(f"serving needs {error.name}: pip install 'tinyvllm[serve]'") from None
    from tinyvllm.engine.defaults import load_engine
    sizes = {n: getattr(args, n) for n in (*SIZES, 'max_model_len') if getattr(args, n) is not None}
    options = dict(dtype=args.dtype, quantization=args.quant, **sizes)
    return run_server(args.model, server_args(args), partial(load_engine, **options), warm=not args.no_warmup,
                      log=not args.quiet)


def server_args(args):
    "The `ServerArgs`; raises `BadInput`."
    from tinyvllm.server.app import ServerArgs
    from tinyvllm.server.parameters import Limits
    same = ('host port public_metrics max_queue queue_timeout request_timeout shutdown_timeout').split()
    names = args.served_model_name or [os.path.basename(args.model.rstrip('/')) or args.model]
    return ServerArgs(**{n: getattr(args, n) for n in same}, names=tuple(names), api_keys=tuple(api_keys(args)),
                      allowed_origins=tuple(args.allowed_origin),
                      processors=tuple(args.logits_processor), limits=Limits(max_n=args.max_n))


def api_keys(args) -> list[str]:
    "From the options, the environment and the file; raises `BadInput`."
    keys = [*args.api_key, *filter(None, [os.environ.get('TINYVLLM_API_KEY')])]
    if args.api_key_file:
        lines = secret(args.api_key_file, 'keys').splitlines()
        found = [line.partition('#')[0].strip() for line in lines]
        if not any(found):
            raise BadInput(f'{args.api_key_file} holds no key; write one a line')
        keys += filter(None, found)
    if any(not key.isascii() or not key.isprintable() or ' ' in key or not key for key in keys):
        raise BadInput('an API key is printable ASCII without spaces')
    return keys
