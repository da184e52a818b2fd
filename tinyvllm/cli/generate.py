"`tinyvllm generate` and `tinyvllm chat`."
import json
import sys
from contextlib import closing

from tinyvllm.cli.options import Parser, model_options, sampling_options, sampling_params
from tinyvllm.errors import BadInput

CHAT_CONTEXT = 4096   # tokens reserved for a conversation
SIZES = ('max_num_seqs', 'num_blocks', 'max_num_batched_tokens')   # of the engine of a batch

GENERATE_EXAMPLES = """\
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
Stopped? The same command goes on where --out ends."""

CHAT_EXAMPLES = """\
examples:
  tinyvllm chat
  tinyvllm chat --system "Answer in one word." --temperature 0.7
inside: /reset forgets the conversation, /exit leaves, Ctrl-C stops the answer"""


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
    p.add_argument('--system', metavar='TEXT', help='a system message before the conversation')
    model_options(p)
    sampling_options(p, max_tokens=512)


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
    for out in stream if args.json else print_stream(stream):
        pass
    if args.json:
        print(json.dumps(as_json(out)))
    else:
        print()
        report(model, out)
    return 0


def print_stream(stream):
    "Yield the outputs of an `LLM.stream`, and print their text as it grows."
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
    if n:
        line += f', first after {out.metrics.ttft_s:.2f} s'
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
    for line in iter(read_line, '/exit'):
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
        for out in print_stream(stream):
            text = out.outputs[0].text
    except KeyboardInterrupt:
        print(' ...', end='')
    print()
    return text
