"The command line: `tinyvllm pull | generate | chat | bench | doctor | info`."
import argparse
import json
import os
import platform
import sys
from contextlib import closing
from pathlib import Path

from tinyvllm import __version__
from tinyvllm.errors import BadInput

# Modules that import tinygrad are imported inside the commands: `--device` must be settled first,
# and `--help` must not take a second.

CHAT_CONTEXT = 4096   # tokens reserved for a conversation
SIZES = ('max_num_seqs', 'num_blocks', 'max_num_batched_tokens')   # of the engine of a batch

EXAMPLES = {
    None: """\
examples:
  tinyvllm generate "The capital of France is"     complete a text with the default model
  tinyvllm chat                                    talk to it
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
    'bench': """\
examples:
  tinyvllm bench                                   the engine with one request, median of 3 runs
  tinyvllm bench --requests 1 4 16 32              and with more at the same time: a row for each
  tinyvllm bench --rung 01 --tokens 8              the loop without a cache
  tinyvllm bench --ladder mine.jsonl               keep the row elsewhere""",
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
    top = Parser('tinyvllm', description='Run language models on tinygrad.', epilog=EXAMPLES[None],
                 formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument('--version', action='version', version=f'tinyvllm {__version__}')
    commands = top.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for run, text, add_options in (
            (pull, 'Download a model into the cache.', pull_options),
            (generate, 'Complete a text, word by word, or all texts of a file.', generate_options),
            (chat, 'Talk to a model, with its own chat template.', chat_options),
            (bench, 'Measure decoding and add a row to the ladder.', bench_options),
            (doctor, 'Check every kernel on this device against float64.', doctor_options),
            (info, 'Show device, compiler, bandwidth, cache and models.', device_option)):
        p = commands.add_parser(run.__name__, help=text, description=text, epilog=EXAMPLES[run.__name__],
                                formatter_class=argparse.RawDescriptionHelpFormatter)
        p.set_defaults(run=run)
        add_options(p)
    return top


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
    p.add_argument('--max-num-batched-tokens', type=int, metavar='N', help='batch: tokens of a step; default 512')
    model_options(p)
    sampling_options(p, max_tokens=64)


def chat_options(p: Parser) -> None:
    "A model and how to sample."
    p.add_argument('--system', metavar='TEXT', help='what the model is told first')
    model_options(p)
    sampling_options(p, max_tokens=512)


def bench_options(p: Parser) -> None:
    "Which rung, how much work, where to keep the row."
    p.add_argument('--rung', default='08', choices=['01', '01b', '04a', '08'],
                   help='01: no cache; 01b: KV cache; 04a: the engine in portable operations; '
                        '08: with the kernels of the device, the default')
    p.add_argument('--requests', type=int, nargs='+', default=[1], metavar='N',
                   help='requests at the same time, a row for each number given; default 1')
    p.add_argument('--prompt-tokens', type=int, default=32, metavar='N', help='of each request; default 32')
    p.add_argument('--tokens', type=int, default=16, metavar='N', help='to generate for each; default 16')
    p.add_argument('--repeat', type=int, default=3, metavar='N', help='runs; the median counts; default 3')
    p.add_argument('--ladder', metavar='FILE', help='default: nbs/ladder.jsonl in a checkout, else the cache')
    model_options(p)


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


def model_options(p: Parser) -> None:
    "`--model`, `--dtype`, `--device`."
    p.add_argument('--model', default='smollm2', help='a name, a folder or a .gguf file; default smollm2')
    p.add_argument('--dtype', default='auto', choices=['auto', 'float32', 'float16', 'bfloat16'],
                   help='of the weights; auto: float32 on the CPU, else float16')
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
    from tinyvllm.sampling import SamplingParams
    names = ('max_tokens temperature top_k top_p min_p repetition_penalty presence_penalty '
             'frequency_penalty seed ignore_eos').split()
    return SamplingParams(**{n: getattr(args, n) for n in names}, stop=tuple(args.stop))


def load(args):
    "The model and its tokenizer. Raises `BadInput`."
    from tinyvllm.llama import load_model
    from tinyvllm.tokenizer import load_tokenizer
    from tinyvllm.weights import resolve
    path = resolve(args.model)
    model, tokenizer = load_model(path, args.dtype), load_tokenizer(path)
    tokenizer.check_vocab(model.config.vocab_size)
    return model, tokenizer


def small_llm(model, tokenizer, context: int):
    "An engine for one request of at most `context` tokens: its memory is reserved in no time."
    from tinyvllm import LLM
    context = min(context, model.config.max_position_embeddings)
    return LLM(model, tokenizer, max_num_seqs=1, max_model_len=context)


def pull(args) -> None:
    "`tinyvllm pull`: print where the model is."
    from tinyvllm.weights import pull
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
    from tinyvllm.batchfile import run_batch
    from tinyvllm.engine import load_engine
    from tinyvllm.paged import EngineArgs
    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    EngineArgs(**sizes)   # refused before anything is read
    failed = run_batch(args.prompts, args.out, sampling_params(args),
                       lambda: load_engine(args.model, dtype=args.dtype, **sizes))
    return 1 if failed else 0


def complete(args) -> int:
    "Answer one prompt."
    from tinyvllm.generate import check_prompt
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
    from tinyvllm.llama import kv_bytes, weight_bytes
    from tinyvllm.measure import Roof, bandwidth
    n, speed = len(out.outputs[0].token_ids), out.metrics.decode_tok_s
    line = f'{n} tokens ({out.outputs[0].finish_reason})'
    if n: line += f', first after {out.metrics.ttft_s:.2f} s'
    if speed:
        context = len(out.prompt_token_ids) + n
        roof = Roof(bandwidth(), weight_bytes(model), kv_bytes(model) * context)
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


def bench(args) -> None:
    "`tinyvllm bench`: measure a rung, store its rows, print them beside the others."
    from importlib.resources import files
    from tinyvllm.bench import Workload, measure_rung
    from tinyvllm.measure import append_row, ladder_table, read_rows
    check_counts(args)
    stored, path = read_rows(files('tinyvllm') / 'data/ladder.jsonl'), args.ladder or ladder_path()
    model, _ = load(args)
    name, rows = os.path.basename(args.model.rstrip('/')), []
    for n in args.requests:
        work = Workload(args.prompt_tokens, args.tokens, n)
        rows.append(measure_rung(args.rung, model, work, args.repeat, name))
        append_row(path, rows[-1])
    print(ladder_table([*stored, *rows]))
    print(f'{"the last row is" if len(rows) == 1 else f"the last {len(rows)} rows are"} yours, added to {path}',
          file=sys.stderr)


def check_counts(args) -> None:
    "Refuse a measurement of nothing, or of several requests on a rung for one; raises `BadInput`."
    counts = [('prompt_tokens', args.prompt_tokens, 1), ('tokens', args.tokens, 2), ('repeat', args.repeat, 1)]
    for name, value, least in counts + [('requests', n, 1) for n in args.requests]:
        if value < least:
            raise BadInput(f'--{name.replace("_", "-")} is {value}; use {least} or more')
    if args.rung in ('01', '01b') and max(args.requests) > 1:
        raise BadInput(f'rung {args.rung} answers one request at a time; --requests above 1 needs --rung 04a or 08')


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
    from tinyvllm.doctor import diagnose, heading, table
    for name, value, least in ('cases', args.cases, 1), ('seed', args.seed, 0):
        if value < least:
            raise BadInput(f'--{name} is {value}; use {least} or more')
    rows = list(diagnose(Device.DEFAULT, args.cases, args.kernel, args.seed))
    if args.json:
        for row in rows:
            if row.trouble: print(f'{row.kernel}: {row.trouble}', file=sys.stderr)
    print(json.dumps([row.as_json() for row in rows]) if args.json else
          f'{heading(Device.DEFAULT, args.seed)}\n\n{table(rows)}')
    return 0 if all(row.ok for row in rows) else 1


def info(args) -> None:
    "`tinyvllm info`: what a bug report should hold."
    from importlib.metadata import version
    from tinygrad import Device
    from tinyvllm.device import cache_dir, compiler_name
    from tinyvllm.doctor import simulated
    from tinyvllm.measure import bandwidth, machine_name
    from tinyvllm.weights import models_found
    device = Device.DEFAULT
    speed = 'none: METAL is simulated here' if simulated(device) else f'{bandwidth(device) / 1e9:.1f} GB/s measured'
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


def main(argv: list[str] | None = None) -> int:
    "Run a command; a user's mistake is one line and exit code 2."
    args = parser().parse_args(argv)
    try:
        if args.command != 'pull':
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
