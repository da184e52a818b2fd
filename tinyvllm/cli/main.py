"The command line: `tinyvllm pull | generate | chat | serve | top | bench | doctor | info`."
import argparse
import json
import os
import platform
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

from tinyvllm import __version__
from tinyvllm.errors import BadInput
from tinyvllm.cli.top import EXAMPLES as TOP_EXAMPLES, secret, top, top_options

# Modules that import tinygrad are imported inside the commands: `--device` must be settled first,
# and `--help` must not take a second.

CHAT_CONTEXT = 4096   # tokens reserved for a conversation
SIZES = ('max_num_seqs', 'num_blocks', 'max_num_batched_tokens')   # of the engine of a batch

EXAMPLES = {
    None: """\
examples:
  tinyvllm generate "The capital of France is"     complete a text with the default model
  tinyvllm chat                                    talk to it
  tinyvllm serve                                   let others talk to it: an OpenAI server
  tinyvllm info                                    what this machine has
  tinyvllm bench                                   how fast it is, beside the stored results""",
    'pull': """\
examples:
  tinyvllm pull                                    SmolLM2-135M-Instruct, the default model (93 MB)
  tinyvllm pull HuggingFaceTB/SmolLM2-360M         a Hugging Face repository (needs tinyvllm[hub])""",
    'generate': """\
examples:
  tinyvllm generate "Once upon a time" --max-tokens 40
  tinyvllm generate "Q: 2+2? A:" --stop Q: --stop ';'
  tinyvllm generate "A haiku:" --temperature 0.8 --top-p 0.95 --seed 1
  cat story.txt | tinyvllm generate - --json
  tinyvllm generate "Hello" --model ./folder-or-file.gguf --dtype float16 --device CPU
  tinyvllm generate --prompts questions.jsonl --out answers.jsonl --max-tokens 200

a batch: each line of --prompts is one of
  {"prompt": "Once upon a time"}
  {"prompt_token_ids": [28120, 2501]}
  {"messages": [{"role": "user", "content": "Hello"}]}      by the model's chat template
with an "id" of your own if you like, and parameters of this line alone, as in
  {"id": "q7", "prompt": "A haiku:", "temperature": 0.8, "seed": 1, "n": 2, "logprobs": 5}
Each line of --out answers one, in order, as soon as it is known:
  {"line": 7, "id": "q7", "prompt": "A haiku:", "text": "...", "token_ids": [...],
   "finish_reason": "length", "stop_reason": null, "prompt_tokens": 4}
With n > 1, "outputs" is a list of {"text", "token_ids", ...}; with logprobs, each answer has
"cumulative_logprob" and "logprobs", per token {token id: log-probability}.
A line that fails is {"line": 8, "error": "..."}; the rest still runs, and the exit code is 1.
Stopped? The same command goes on where --out ends.""",
    'chat': """\
examples:
  tinyvllm chat
  tinyvllm chat --system "Answer in one word." --temperature 0.7
inside: /reset forgets the conversation, /exit leaves, Ctrl-C stops the answer""",
    'serve': """\
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
their way are finished first; a second one ends them. Needs `pip install 'tinyvllm[serve]'`.""",
    'top': TOP_EXAMPLES,
    'bench': """\
examples:
  tinyvllm bench                                   same as `tinyvllm bench ladder`
  tinyvllm bench ladder --requests 1 4 16 32       the engine, a row of the ladder for each number
  tinyvllm bench decode --batch 1 8 --context 200  decoding alone, and what it costs
  tinyvllm bench prefill --context 512             reading a prompt
  tinyvllm bench serve-trace --scale 0.1           many requests, latencies by percentile
`tinyvllm bench decode --help` and so on tell the options of each.""",
    'ladder': """\
examples:
  tinyvllm bench                                   the engine with one request, median of 3 runs
  tinyvllm bench --requests 1 4 16 32              and with more at the same time: a row for each
  tinyvllm bench --rung 01 --tokens 8              the loop without a cache
  tinyvllm bench --ladder mine.jsonl               keep the row elsewhere""",
    'decode': """\
examples:
  tinyvllm bench decode                            one sequence behind a prompt of 128 tokens
  tinyvllm bench decode --batch 1 8 32 --plot speed.png
  tinyvllm bench decode --model tinyllama-1.1b --batch 32 --context 200 --json
The prompts are read first and not timed. Then every sequence says --tokens tokens, all in step.""",
    'prefill': """\
examples:
  tinyvllm bench prefill --context 2048            one prompt of 2048 tokens
  tinyvllm bench prefill --batch 4 --context 512 --json
Timed from the first step to the first token of the last prompt.""",
    'serve-trace': """\
examples:
  tinyvllm bench serve-trace                       nano-vllm's: 256 requests, lengths 100 to 1024
  tinyvllm bench serve-trace --scale 0.125 --sequential --plot trace.png
  tinyvllm bench serve-trace --rate 2 --json       two arrivals a second instead of all at once
tok_s counts the tokens that were generated. The trace is served once before, to compile.""",
    'doctor': """\
examples:
  tinyvllm doctor                                  every kernel on this machine, in a minute
  tinyvllm doctor --cases 200                      as thoroughly as a release
  tinyvllm doctor --kernel softmax.decode          one of them; `softmax` is all of that module
  tinyvllm doctor --device METAL                   on Linux: simulated, with races and bounds checked
  tinyvllm doctor --json > doctor.json             for a program

exit code: 0 if every kernel is right, 1 if one is not, 2 if there is none for the device""",
    'info': """\
examples:
  tinyvllm info
  tinyvllm info --device CPU""",
}


class Parser(argparse.ArgumentParser):
    "An argument parser whose errors are one line."

    def error(self, message):
        self.exit(2, f'{self.prog}: error: {message} (see {self.prog} --help)\n')


def parser() -> Parser:
    "The commands and their options."
    root = Parser('tinyvllm', description='Run language models on tinygrad.', epilog=EXAMPLES[None],
                 formatter_class=argparse.RawDescriptionHelpFormatter)
    root.add_argument('--version', action='version', version=f'tinyvllm {__version__}')
    commands = root.add_subparsers(dest='command', required=True, metavar='COMMAND')
    add_commands(commands, [
        (pull, 'pull', 'Download a model into the cache.', pull_options),
        (generate, 'generate', 'Complete a text, word by word, or all texts of a file.', generate_options),
        (chat, 'chat', 'Talk to a model, with its own chat template.', chat_options),
        (serve, 'serve', 'Answer over HTTP, as OpenAI does.', serve_options),
        (top, 'top', 'Watch a running server.', top_options),
        (bench, 'bench', 'Measure: the ladder, decoding, prefill, a trace of requests.', bench_commands),
        (doctor, 'doctor', 'Check every kernel on this device against float64.', doctor_options),
        (info, 'info', 'Show device, compiler, bandwidth, cache and models.', device_option)])
    return root


def add_commands(commands, table: list) -> None:
    "A parser for each (function, name, text, what adds its options)."
    for run, name, text, add_options in table:
        p = commands.add_parser(name, help=text, description=text, epilog=EXAMPLES[name],
                                formatter_class=argparse.RawDescriptionHelpFormatter)
        p.set_defaults(run=run)
        add_options(p)


def pull_options(p: Parser) -> None:
    "What to fetch."
    p.add_argument('name', nargs='?', default='smollm2', help='a known name, or org/name of the hub')


def generate_options(p: Parser) -> None:
    "A prompt or a file of them, a model, and how to sample."
    p.add_argument('prompt', metavar='PROMPT', nargs='?', help='raw text, no chat template; - reads standard input')
    p.add_argument('--json', action='store_true', help='print one JSON object at the end instead')
    p.add_argument('--prompts', metavar='FILE', help='a batch: answer each line of this JSONL file, see below')
    p.add_argument('--out', metavar='FILE', help='append the answers here, in order; resumes what was stopped')
    p.add_argument('--max-num-seqs', type=int, metavar='N', help='batch: answers that run at once; default 256')
    p.add_argument('--num-blocks', type=int, metavar='N',
                   help='batch: blocks of 16 tokens for keys and values; default: as many as fit')
    p.add_argument('--max-num-batched-tokens', type=int, metavar='N',
                   help='batch: tokens of a step; default: 256 on a processor, 2048 on a CUDA card, else 512')
    model_options(p)
    sampling_options(p, max_tokens=64)


def chat_options(p: Parser) -> None:
    "A model and how to sample."
    p.add_argument('--system', metavar='TEXT', help='what the model is told first')
    model_options(p)
    sampling_options(p, max_tokens=512)


def serve_options(p: Parser) -> None:
    "Where to listen, whom to answer, how large the engine is."
    p.add_argument('--host', default='127.0.0.1', help='default 127.0.0.1, this machine only; 0.0.0.0 is everybody')
    p.add_argument('--port', type=int, default=8000, metavar='N', help='default 8000; 0 is any that is free')
    p.add_argument('--served-model-name', nargs='+', metavar='NAME',
                   help='what clients call the model; default: what --model says, without folders')
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


def bench_commands(p: Parser) -> None:
    "What to measure; `main` inserts `ladder` where nothing is named."
    add_commands(p.add_subparsers(dest='what', required=True, metavar='WHAT'), [
        (bench, 'ladder', 'Measure a rung and add its row to the ladder; `tinyvllm bench` alone is this.',
         ladder_options),
        (bench_load, 'decode', 'Time decoding: tokens after the prompts.', decode_options),
        (bench_load, 'prefill', 'Time the reading of prompts.', prefill_options),
        (bench_trace, 'serve-trace', 'Serve requests of random lengths; throughput and latencies.', trace_options)])


def ladder_options(p: Parser) -> None:
    "Which rung, how much work, where to keep the row."
    p.add_argument('--rung', default='10c', choices=['01', '01c', '04a', '08', '07', '10c'],
                   help='01: no cache; 01c: KV cache; 04a: the engine in portable operations; 08: with the '
                        'kernels of the device; 07: as one graph; 10c: what `LLM` runs, the default')
    p.add_argument('--requests', type=int, nargs='+', default=[1], metavar='N',
                   help='requests at the same time, a row for each number given; default 1')
    p.add_argument('--prompt-tokens', type=int, default=32, metavar='N', help='of each request; default 32')
    p.add_argument('--tokens', type=int, default=16, metavar='N', help='to generate for each; default 16')
    p.add_argument('--repeat', type=int, default=3, metavar='N', help='runs; the median counts; default 3')
    p.add_argument('--ladder', metavar='FILE', help='default: nbs/ladder.jsonl in a checkout, else the cache')
    model_options(p)


def load_options(p: Parser, context: int) -> None:
    "How much work, for decode and prefill."
    p.add_argument('--batch', type=int, nargs='+', default=[1], metavar='B',
                   help='sequences at the same time, a measurement for each number given; default 1')
    p.add_argument('--context', type=int, default=context, metavar='C',
                   help=f'tokens of each prompt; default {context}')
    p.add_argument('--repeat', type=int, default=3, metavar='N', help='runs; the median counts; default 3')
    p.add_argument('--check', type=int, default=0, metavar='N',
                   help='compare N answers with portable operations in float32; default 0')
    p.add_argument('--max-num-batched-tokens', type=int, metavar='N',
                   help='most tokens of one step; default: all prompts together, up to 8192')


def decode_options(p: Parser) -> None:
    "What `bench decode` takes."
    load_options(p, context=128)
    p.add_argument('--tokens', type=int, default=64, metavar='N', help='steps to time; default 64')
    report_options(p)


def prefill_options(p: Parser) -> None:
    "What `bench prefill` takes."
    load_options(p, context=512)
    p.add_argument('--tokens', type=int, default=1, metavar='1',
                   help='to generate: 1, for the time ends with the first token')
    report_options(p)


def trace_options(p: Parser) -> None:
    "What `bench serve-trace` takes."
    p.add_argument('--requests', type=int, default=256, metavar='N', help='default 256')
    p.add_argument('--context', type=int, default=1024, metavar='C', help='longest prompt; default 1024')
    p.add_argument('--tokens', type=int, default=1024, metavar='N', help='longest answer; default 1024')
    p.add_argument('--scale', type=float, default=1.0, metavar='S',
                   help='multiply requests and lengths by S; default 1')
    p.add_argument('--batch', type=int, default=256, metavar='B', help='most requests that run at once; default 256')
    p.add_argument('--rate', type=float, metavar='R', help='arrivals per second; default: all at the start')
    p.add_argument('--sequential', action='store_true', help='serve them one at a time too')
    p.add_argument('--no-warmup', action='store_true', help='do not serve the trace once before')
    report_options(p)


def report_options(p: Parser) -> None:
    "The model, and what to make of the numbers."
    p.add_argument('--num-scheduler-steps', type=int, default=1, metavar='N',
                   help='tokens of each sequence for one decision of the scheduler; default 1')
    p.add_argument('--no-count', action='store_true', help='leave kernels_per_layer out: it takes two more engines')
    p.add_argument('--json', action='store_true', help='print one JSON object a measurement instead of text')
    p.add_argument('--plot', metavar='FILE.png', help='draw it too (needs matplotlib: tinyvllm[plot])')
    model_options(p, more='or the shape of one, with random weights: tinyllama-1.1b, smollm2-135m, '
                          'qwen3-0.6b, llama-3.1-8b; ')


def doctor_options(p: Parser) -> None:
    "Which kernels, how many cases."
    p.add_argument('--cases', type=int, default=20, metavar='N', help='of each kernel and dtype; default 20')
    p.add_argument('--kernel', metavar='NAME', help='this one only: module, module.function, or a name of the table')
    p.add_argument('--seed', type=int, default=0, metavar='N', help='same seed, same cases; default 0')
    p.add_argument('--json', action='store_true', help='print a list of objects instead of a table')
    device_option(p)


def device_option(p: Parser) -> None:
    "`--device`."
    p.add_argument('--device', help='METAL, CUDA, CPU, ...; default: the best there is (or $DEV)')


def model_options(p: Parser, more: str = '') -> None:
    "`--model`, `--dtype`, `--quant`, `--device`."
    p.add_argument('--model', default='smollm2', help=f'a name, a folder or a .gguf file; {more}default smollm2')
    p.add_argument('--dtype', default='auto', choices=['auto', 'float32', 'float16', 'bfloat16'],
                   help='of weights that are not quantised; auto: as stored on the CPU, else float16')
    p.add_argument('--quant', '--quantization', metavar='Q',
                   help='quantise the weights: int8, int4-g32, ...; default: the numbers that are stored')
    device_option(p)


def sampling_options(p: Parser, max_tokens: int) -> None:
    "What `SamplingParams` takes."
    p.add_argument('--max-tokens', type=int, default=max_tokens, metavar='N', help=f'default {max_tokens}')
    p.add_argument('--temperature', type=float, default=0.0, metavar='T', help='0 is greedy; default 0')
    p.add_argument('--top-k', type=int, default=0, metavar='K', help='keep the K likeliest; 0 is all')
    p.add_argument('--top-p', type=float, default=1.0, metavar='P', help='keep the likeliest until they sum to P')
    p.add_argument('--min-p', type=float, default=0.0, metavar='P', help='keep what is P times the likeliest')
    p.add_argument('--repetition-penalty', type=float, default=1.0, metavar='R', help='above 1: repeat less')
    p.add_argument('--presence-penalty', type=float, default=0.0, metavar='A', help='per word already said')
    p.add_argument('--frequency-penalty', type=float, default=0.0, metavar='A', help='per time it was said')
    p.add_argument('--seed', type=int, metavar='N', help='same seed, same text')
    p.add_argument('--stop', action='append', default=[], metavar='TEXT', help='end before TEXT; repeatable')
    p.add_argument('--ignore-eos', action='store_true', help="go on after the model's end token")


def sampling_params(args):
    "The request's `SamplingParams`; raises `BadInput`."
    from tinyvllm.sampling.params import SamplingParams
    names = ('max_tokens temperature top_k top_p min_p repetition_penalty presence_penalty '
             'frequency_penalty seed ignore_eos').split()
    return SamplingParams(**{n: getattr(args, n) for n in names}, stop=tuple(args.stop))


def load(args):
    "The model and its tokenizer. Raises `BadInput`."
    from tinyvllm.engine.defaults import best_model
    from tinyvllm.models.tokenizer_files import load_tokenizer
    from tinyvllm.models.hub import resolve
    path = resolve(args.model)
    model, tokenizer = best_model(path, args.dtype, quantization=args.quant), load_tokenizer(path)
    tokenizer.check_vocab(model.config.vocab_size)
    return model, tokenizer


def small_llm(model, tokenizer, context: int):
    "An engine for one request of at most `context` tokens: its memory is reserved in no time."
    from tinyvllm import LLM
    context = min(context, model.config.max_position_embeddings)
    return LLM(model, tokenizer, max_num_seqs=1, max_model_len=context)


def pull(args) -> None:
    "`tinyvllm pull`: print where the model is."
    from tinyvllm.models.hub import pull
    print(pull(args.name))


def generate(args) -> int:
    "`tinyvllm generate`: stream a completion, print it as one JSON object, or answer a file."
    check_batch_options(args)
    return complete(args) if args.prompts is None else batch(args)


def check_batch_options(args) -> None:
    "One prompt or a file of them; raises `BadInput` for both, none, or options of the other."
    if args.prompt is None and args.prompts is None:
        raise BadInput('give a PROMPT (- reads standard input), or --prompts FILE')
    if args.prompts is None:
        for name in ('out', *SIZES):
            if getattr(args, name) is not None:
                raise BadInput(f'--{name.replace("_", "-")} needs --prompts FILE')
    elif args.prompt is not None:
        raise BadInput('give a PROMPT or --prompts FILE, not both')
    elif args.out is None:
        raise BadInput('--prompts needs --out FILE, where the answers go')
    elif args.json:
        raise BadInput('--json is for one PROMPT; what --out gets is JSON already')


def batch(args) -> int:
    "Answer a file; 1 if a line failed."
    from tinyvllm.cli.batchfile import run_batch
    from tinyvllm.engine.defaults import load_engine
    from tinyvllm.engine.args import EngineArgs
    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    EngineArgs(**sizes)   # refused before anything is read
    failed = run_batch(args.prompts, args.out, sampling_params(args),
                       lambda: load_engine(args.model, dtype=args.dtype, quantization=args.quant, **sizes))
    return 1 if failed else 0


def complete(args) -> int:
    "Answer one prompt."
    from tinyvllm.reference.generate import check_prompt
    params, text = sampling_params(args), read_prompt(args.prompt)
    model, tokenizer = load(args)
    ids = tokenizer.encode(text)
    room = len(ids) + check_prompt(ids, model.config, params.max_tokens)
    stream = small_llm(model, tokenizer, room + 1).stream(ids, params)
    for out in stream if args.json else spoken(stream):
        pass
    if args.json:
        print(json.dumps(as_json(out)))
    else:
        print()
        report(model, out)
    return 0


def spoken(stream):
    "The outputs of an `LLM.stream`, whose text is printed as it grows."
    shown = 0
    with closing(stream):   # a closed pipe, Ctrl-C: the request is aborted
        for out in stream:
            print(out.outputs[0].text[shown:], end='', flush=True)
            shown = len(out.outputs[0].text)
            yield out


def as_json(out) -> dict:
    "What `--json` prints."
    from tinyvllm.measure import peak_memory
    answer, ids = out.outputs[0], out.prompt_token_ids
    return dict(text=answer.text, token_ids=answer.token_ids, prompt_token_ids=ids,
                finish_reason=answer.finish_reason,
                metrics=dict(ttft_s=out.metrics.ttft_s, decode_tok_s=out.metrics.decode_tok_s,
                             prompt_tokens=len(ids), generated_tokens=len(answer.token_ids),
                             peak_memory_bytes=peak_memory()))


def read_prompt(prompt: str) -> str:
    "The text itself, or standard input for `-`; raises `BadInput` for none."
    if prompt == '-':
        try:
            prompt = sys.stdin.read()
        except UnicodeDecodeError:
            raise BadInput('standard input is not UTF-8 text') from None
    if not prompt:
        raise BadInput('the prompt is empty; give a text, or - to read standard input')
    return prompt


def report(model, out) -> None:
    "Speed and memory limit, on standard error so that the text stays clean."
    from tinyvllm.models.llama import kv_bytes, weight_bytes
    from tinyvllm.measure import measured_roof
    n, speed = len(out.outputs[0].token_ids), out.metrics.decode_tok_s
    line = f'{n} tokens ({out.outputs[0].finish_reason})'
    if n: line += f', first after {out.metrics.ttft_s:.2f} s'
    if speed:
        context = len(out.prompt_token_ids) + n
        roof = measured_roof(speed, weight_bytes(model), kv_bytes(model) * context)
        line += (f', then {speed:.2f} tok/s: {roof.share(speed):.1%} of the {roof.tok_s:.0f} tok/s '
                 f'that {roof.bandwidth/1e9:.0f} GB/s of memory allow')
    print(line, file=sys.stderr)


def chat(args) -> None:
    "`tinyvllm chat`: a conversation; every turn computes all of it again until a prefix is kept."
    params = sampling_params(args)
    model, tokenizer = load(args)
    llm = small_llm(model, tokenizer, CHAT_CONTEXT)
    start = [{'role': 'system', 'content': args.system}] if args.system else []
    messages = list(start)
    while (line := read_line()) != '/exit':
        if line == '/reset':
            messages = list(start)
        elif line:
            messages.append({'role': 'user', 'content': line})
            try:
                text = reply(llm.stream(tokenizer.apply_chat_template(messages), params))
            except BadInput as error:   # the conversation has outgrown the context
                print(f'{error}; /reset forgets it', file=sys.stderr)
                messages.pop()
                continue
            messages.append({'role': 'assistant', 'content': text})


def read_line() -> str:
    "What the user types; the end of input, or Ctrl-C at the prompt, is `/exit`."
    try:
        return input('> ' if sys.stdin.isatty() else '').strip()
    except (EOFError, KeyboardInterrupt):
        return '/exit'


def reply(stream) -> str:
    "Print an answer and return it; Ctrl-C ends the answer, not the program."
    text = ''
    try:
        for out in spoken(stream):
            text = out.outputs[0].text
    except KeyboardInterrupt:
        print(' ...', end='')
    print()
    return text


def serve(args) -> int:
    "`tinyvllm serve`: until it is told to stop."
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


def bench(args) -> None:
    "`tinyvllm bench ladder`: measure a rung, store its rows, print them beside the others."
    from importlib.resources import files
    from tinyvllm.cli.bench import Workload, measure_rung, open_model
    from tinyvllm.models.llama import load_model
    from tinyvllm.measure import append_row, ladder_table, read_rows
    from tinyvllm.models.hub import resolve
    check_counts(args)
    stored, path = read_rows(files('tinyvllm') / 'data/ladder.jsonl'), args.ladder or ladder_path()
    model = load_model(resolve(args.model), args.dtype)
    fast = open_model(args.model, args.dtype, args.quant) if args.rung == '10c' else None
    name, rows = os.path.basename(args.model.rstrip('/')), []
    for n in args.requests:
        work = Workload(args.prompt_tokens, args.tokens, n)
        rows.append(measure_rung(args.rung, model, work, args.repeat, name, fast))
        append_row(path, rows[-1])
    print(ladder_table([*stored, *rows]))
    print(f'{"the last row is" if len(rows) == 1 else f"the last {len(rows)} rows are"} yours, added to {path}',
          file=sys.stderr)


def check_counts(args) -> None:
    "Refuse a measurement of nothing, or of several requests on a rung for one; raises `BadInput`."
    counts = [('prompt_tokens', args.prompt_tokens, 1), ('tokens', args.tokens, 4), ('repeat', args.repeat, 1)]
    for name, value, least in counts + [('requests', n, 1) for n in args.requests]:
        if value < least:
            raise BadInput(f'--{name.replace("_", "-")} is {value}; use {least} or more')
    if args.quant and args.rung != '10c':
        raise BadInput(f'rung {args.rung} computes with the weights as they are stored; --quant needs --rung 10c')
    if args.rung in ('01', '01c') and max(args.requests) > 1:
        raise BadInput(f'rung {args.rung} answers one request at a time; --requests above 1 needs --rung 04a '
                       'or a later one')


def bench_load(args) -> None:
    "`tinyvllm bench decode` and `prefill`."
    from tinyvllm.cli.bench import Load, measure_load, open_model, open_reference, plot_loads
    check_least(args, context=1, tokens=2 if args.what == 'decode' else 1, repeat=1, check=0, max_num_batched_tokens=1, batch=1,
                num_scheduler_steps=1)
    if args.what == 'prefill' and args.tokens != 1:
        raise BadInput('the time of a prefill ends with the first token, so --tokens is 1; '
                       '--context is the length of the prompts')
    check_plot(args.plot)
    model = open_model(args.model, args.dtype, args.quant)
    loads = [Load(b, args.context, args.tokens, args.max_num_batched_tokens) for b in args.batch]
    for load in loads:
        load.check(model)    # all of them before the first is measured
    rows = []
    for load in loads:
        row = measure_load(args.what, model, load, args.repeat, args.check,
                           lambda: open_reference(args.model, args.dtype, args.quant),
                           not args.no_count, dict(num_scheduler_steps=args.num_scheduler_steps))
        rows.append(tell(args, model, row, last=load is loads[-1]))
    if args.plot:
        plot_loads(rows).savefig(args.plot)


def bench_trace(args) -> None:
    "`tinyvllm bench serve-trace`."
    from tinyvllm.cli.bench import Trace, measure_trace, open_model, plot_trace
    check_least(args, requests=1, context=1, tokens=2, batch=1, num_scheduler_steps=1)
    for name in 'scale', 'rate':
        if (value := getattr(args, name)) is not None and not 0 < value < float('inf'):
            raise BadInput(f'--{name} is {value}; use a number above 0')
    check_plot(args.plot)
    model = open_model(args.model, args.dtype, args.quant)
    trace = Trace(args.requests, args.context, args.tokens, rate=args.rate).scaled(args.scale)
    row = measure_trace(model, trace, args.batch, args.sequential, not args.no_warmup,
                        not args.no_count, dict(num_scheduler_steps=args.num_scheduler_steps))
    row = tell(args, model, row)
    if args.plot:
        plot_trace(row).savefig(args.plot)


def check_least(args, **least: int) -> None:
    "Refuse numbers that are too small; raises `BadInput`."
    for name, low in least.items():
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < low:
                raise BadInput(f'--{name.replace("_", "-")} is {value}; use {low} or more')


def check_plot(path: str | None) -> None:
    "Refuse a figure that could not be drawn or written, before minutes of work; raises `BadInput`."
    if not path:
        return
    from importlib.util import find_spec
    if not find_spec('matplotlib'):
        raise BadInput("--plot needs matplotlib: pip install 'tinyvllm[plot]'")
    if Path(path).suffix not in ('.png', '.svg', '.pdf'):
        raise BadInput(f'--plot {path}: the name of a figure ends with .png, .svg or .pdf')
    if not Path(path).absolute().parent.is_dir():
        raise BadInput(f'--plot {path}: the folder does not exist')


def tell(args, model, row: dict, last: bool = True) -> dict:
    "Print a measurement under its heading; returns both."
    from datetime import date
    from importlib.metadata import version
    from tinygrad import Device
    from tinyvllm.cli.bench import as_text, stored_as
    from tinyvllm.measure import commit, machine_name
    name = os.path.basename(args.model.rstrip('/'))
    row = dict(kind=args.what, model=name, quant=stored_as(model), dtype=model.dtype, **row, device=Device.DEFAULT,
               machine=machine_name(), tinygrad=version('tinygrad'), commit=commit(), date=date.today().isoformat())
    print(json.dumps(row) if args.json else as_text(row) + '\n' * (not last), flush=True)
    return row


def ladder_path() -> Path:
    "The ladder of this checkout; outside of one, a file in the cache folder."
    from tinyvllm.device import cache_dir
    here = Path('nbs/ladder.jsonl')
    if here.exists():
        return here
    cache_dir().mkdir(parents=True, exist_ok=True)
    return cache_dir() / 'ladder.jsonl'


def doctor(args) -> int:
    "`tinyvllm doctor`: check the kernels of a device and print a table for an issue; 1 if one fails."
    from tinygrad import Device
    from tinyvllm.cli.doctor import diagnose, format_table, heading
    for name, value, least in ('cases', args.cases, 1), ('seed', args.seed, 0):
        if value < least:
            raise BadInput(f'--{name} is {value}; use {least} or more')
    rows = list(diagnose(Device.DEFAULT, args.cases, args.kernel, args.seed))
    if args.json:
        for row in rows:
            if row.trouble: print(f'{row.kernel}: {row.trouble}', file=sys.stderr)
    print(json.dumps([row.as_json() for row in rows]) if args.json else
          f'{heading(Device.DEFAULT, args.seed)}\n\n{format_table(rows)}')
    return 0 if all(row.ok for row in rows) else 1


def info(args) -> None:
    "`tinyvllm info`: what a bug report should hold."
    from importlib.metadata import version
    from tinygrad import Device
    from tinyvllm.device import cache_dir, compiler_name
    from tinyvllm.cli.doctor import is_simulated
    from tinyvllm.measure import bandwidth, machine_name
    from tinyvllm.models.hub import models_found
    device = Device.DEFAULT
    speed = 'none: METAL is simulated here' if is_simulated(device) else f'{bandwidth(device) / 1e9:.1f} GB/s measured'
    if device.startswith('CPU'):
        speed += ', one core'
    rows = [('tinyvllm', __version__), ('tinygrad', version('tinygrad')), ('python', platform.python_version()),
            ('device', f'{device} ({machine_name(device)})'), ('compiler', compiler_name()),
            ('bandwidth', speed), ('cache', str(cache_dir()))]
    rows += [('model', f'{name}  {size/1e6:.0f} MB  {path}') for name, path, size in models_found()]
    if rows[-1][0] != 'model':
        rows.append(('model', 'none yet; `tinyvllm pull` fetches the default one'))
    print('\n'.join(f'{key:10} {value}' for key, value in rows))


def use_device(name: str | None) -> None:
    "Make `--device` tinygrad's default and open it; raises `BadInput` if that fails."
    if name:
        os.environ['DEV'] = name.upper()
    from tinygrad import Device
    try:
        Device[Device.DEFAULT]
    except Exception as error:   # each backend fails in its own way
        reason = str(error).strip().split('\n')[0] or type(error).__name__
        raise BadInput(f'device {name or Device.DEFAULT!r} cannot be used here: {reason}; '
                       '`--device CPU` works everywhere') from None


def default_bench(argv: list[str]) -> list[str]:
    "`tinyvllm bench` with nothing named, or only options, is `tinyvllm bench ladder`."
    first = argv[1] if len(argv) > 1 else '--'
    plain = argv[:1] == ['bench'] and first.startswith('-') and first not in ('-h', '--help')
    return ['bench', 'ladder', *argv[1:]] if plain else argv


def main(argv: list[str] | None = None) -> int:
    "Run a command; a user's mistake is one line and exit code 2."
    args = parser().parse_args(default_bench(sys.argv[1:] if argv is None else argv))
    try:
        if hasattr(args, 'device'):
            use_device(args.device)
        return args.run(args) or 0
    except BrokenPipeError:   # `tinyvllm ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (BadInput, OSError, FloatingPointError) as error:   # the last: weights that hold NaN
        print(f'tinyvllm: error: {error}', file=sys.stderr)
        return 2
    except MemoryError:
        print('tinyvllm: error: not enough memory; ask for fewer tokens, or use --dtype float16',
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
