"The command line: `tinyvllm pull | generate | chat | bench | info`."
import argparse
import json
import os
import platform
import sys
from dataclasses import replace
from pathlib import Path

from tinyvllm import __version__
from tinyvllm.errors import BadInput

# Modules that import tinygrad are imported inside the commands: `--device` must be settled first,
# and `--help` must not take a second.

CHAT_CONTEXT = 4096   # tokens reserved for a conversation
BENCH_TEXT = 'The train left the station at dawn and climbed slowly into the hills. '

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
  tinyvllm generate "Hello" --model ./folder-or-file.gguf --dtype float16 --device CPU""",
    'chat': """\
examples:
  tinyvllm chat
  tinyvllm chat --system "Answer in one word." --temperature 0.7
inside: /reset forgets the conversation, /exit leaves, Ctrl-C stops the answer""",
    'bench': """\
examples:
  tinyvllm bench                                   the fastest rung, median of 3 runs
  tinyvllm bench --rung 01 --tokens 8              the loop without a cache
  tinyvllm bench --ladder mine.jsonl               keep the row elsewhere""",
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
            (generate, 'Complete a text, word by word.', generate_options),
            (chat, 'Talk to a model, with its own chat template.', chat_options),
            (bench, 'Measure decoding and add a row to the ladder.', bench_options),
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
    "A prompt, a model, and how to sample."
    p.add_argument('prompt', metavar='PROMPT', help='raw text, no chat template; - reads standard input')
    p.add_argument('--json', action='store_true', help='print one JSON object at the end instead')
    model_options(p)
    sampling_options(p, max_tokens=64)


def chat_options(p: Parser) -> None:
    "A model and how to sample."
    p.add_argument('--system', metavar='TEXT', help='what the model is told first')
    model_options(p)
    sampling_options(p, max_tokens=512)


def bench_options(p: Parser) -> None:
    "Which rung, how much work, where to keep the row."
    p.add_argument('--rung', default='01b', choices=['01', '01b'], help='01: no cache; 01b: KV cache')
    p.add_argument('--prompt-tokens', type=int, default=32, metavar='N', help='default 32')
    p.add_argument('--tokens', type=int, default=16, metavar='N', help='tokens to generate; default 16')
    p.add_argument('--repeat', type=int, default=3, metavar='N', help='runs; the median counts; default 3')
    p.add_argument('--ladder', metavar='FILE', help='default: nbs/ladder.jsonl in a checkout, else the cache')
    model_options(p)


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


def load(args, context: int | None = None):
    "The model and its tokenizer; `context` bounds how many tokens it may hold."
    from tinyvllm.llama import load_model
    from tinyvllm.tokenizer import load_tokenizer
    from tinyvllm.weights import open_checkpoint, resolve
    path = resolve(args.model)
    checkpoint = open_checkpoint(path)
    model = load_model(checkpoint, args.dtype)
    tokenizer = load_tokenizer(path)
    tokenizer.check_vocab(model.config.vocab_size)
    if context and context < model.config.max_position_embeddings:
        model.config = replace(model.config, max_position_embeddings=context)
    return model, tokenizer


def pull(args) -> None:
    "`tinyvllm pull`: print where the model is."
    from tinyvllm.weights import pull
    print(pull(args.name))


def generate(args) -> None:
    "`tinyvllm generate`: stream a completion, or print it as one JSON object."
    from tinyvllm.generate import Generation, check_prompt
    from tinyvllm.kvcache import KVCache
    from tinyvllm.measure import peak_memory
    from tinyvllm.sampling import Sampler
    params, text = sampling_params(args), read_prompt(args.prompt)
    model, tokenizer = load(args)
    ids = tokenizer.encode(text)
    room = len(ids) + check_prompt(ids, model.config, params.max_tokens)
    run = Generation(model, tokenizer, ids, params.max_tokens, params.stop,
                     stop_ids(params, tokenizer), sample=Sampler(params, ids), cache=KVCache(model, room))
    for piece in run:
        if not args.json:
            print(piece, end='', flush=True)
    if args.json:
        print(json.dumps(dict(
            text=run.text, token_ids=run.token_ids, prompt_token_ids=ids, finish_reason=run.finish_reason,
            metrics=dict(ttft_s=run.watch.ttft_s, decode_tok_s=run.watch.decode_tok_s,
                         prompt_tokens=len(ids), generated_tokens=len(run.token_ids),
                         peak_memory_bytes=peak_memory()))))
    else:
        print()
        report(model, run)


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


def stop_ids(params, tokenizer) -> set[int]:
    "The tokens that end this request."
    return {*params.stop_token_ids, *(() if params.ignore_eos else tokenizer.eos_ids)}


def report(model, run) -> None:
    "Speed and memory limit, on standard error so that the text stays clean."
    from tinyvllm.llama import kv_bytes, weight_bytes
    from tinyvllm.measure import Roof, bandwidth
    n, speed = len(run.token_ids), run.watch.decode_tok_s
    line = f'{n} tokens ({run.finish_reason})'
    if n: line += f', first after {run.watch.ttft_s:.2f} s'
    if speed:
        context = len(run.prompt_token_ids) + n
        roof = Roof(bandwidth(), weight_bytes(model), kv_bytes(model) * context)
        line += (f', then {speed:.2f} tok/s: {roof.share(speed):.1%} of the {roof.tok_s:.0f} tok/s '
                 f'that {roof.bandwidth/1e9:.0f} GB/s of memory allow')
    print(line, file=sys.stderr)


def chat(args) -> None:
    "`tinyvllm chat`: a conversation; the cache carries over, so a turn computes only what is new."
    from tinyvllm.generate import Generation
    from tinyvllm.kvcache import KVCache, reuse
    from tinyvllm.sampling import Sampler
    params = sampling_params(args)
    model, tokenizer = load(args, CHAT_CONTEXT)
    cache = KVCache(model, model.config.max_position_embeddings)
    start = [{'role': 'system', 'content': args.system}] if args.system else []
    messages = list(start)
    while (line := read_line()) != '/exit':
        if line == '/reset':
            messages = list(start)
        elif line:
            messages.append({'role': 'user', 'content': line})
            ids = tokenizer.encode(tokenizer.apply_chat_template(messages))
            reuse(cache, ids)
            try:
                run = Generation(model, tokenizer, ids, params.max_tokens, params.stop,
                                 stop_ids(params, tokenizer), sample=Sampler(params, ids), cache=cache)
            except BadInput as error:   # the conversation has outgrown the context
                print(f'{error}; /reset forgets it', file=sys.stderr)
                messages.pop()
                continue
            say(run)
            messages.append({'role': 'assistant', 'content': run.text})


def read_line() -> str:
    "What the user types; the end of input, or Ctrl-C at the prompt, is `/exit`."
    try:
        return input('> ' if sys.stdin.isatty() else '').strip()
    except (EOFError, KeyboardInterrupt):
        return '/exit'


def say(run) -> None:
    "Print an answer as it comes; Ctrl-C ends the answer, not the program."
    try:
        for piece in run:
            print(piece, end='', flush=True)
    except KeyboardInterrupt:
        print(' ...', end='')
    print()


def bench(args) -> None:
    "`tinyvllm bench`: measure a rung, store the row, print it beside the others."
    from importlib.resources import files
    from tqdm import trange
    from tinyvllm.generate import generate, same_greedy
    from tinyvllm.kvcache import KVCache
    from tinyvllm.llama import NoCache, kv_bytes, weight_bytes
    from tinyvllm.measure import append_row, ladder_row, ladder_table, measure_stream, read_rows
    check_counts(args)
    model, tokenizer = load(args)
    ids = tokenizer.encode(BENCH_TEXT * args.prompt_tokens)[:args.prompt_tokens]
    room = len(ids) + args.tokens
    notebook, cache = {'01': ('01_greedy', NoCache),
                       '01b': ('01b_kvcache', lambda: KVCache(model, room))}[args.rung]
    runs = [measure_stream(lambda: generate(model, ids, args.tokens, cache=cache()))
            for _ in trange(1 + args.repeat, desc='runs', unit='run')][1:]   # the first compiles
    row = ladder_row(runs, weight_bytes(model), kv_bytes(model) * room, rung=args.rung, notebook=notebook,
                     model=os.path.basename(args.model.rstrip('/')), dtype=model.dtype,
                     workload=f'{len(ids)}+{args.tokens}',
                     greedy_equal=same_greedy(model, ids, runs[0].tokens))
    stored, path = read_rows(files('tinyvllm') / 'data/ladder.jsonl'), args.ladder or ladder_path()
    append_row(path, row)
    print(ladder_table([*stored, row]))
    print(f'the last row is yours; it was added to {path}', file=sys.stderr)


def check_counts(args) -> None:
    "Refuse a measurement of nothing; raises `BadInput`."
    for name, least in (('prompt_tokens', 1), ('tokens', 2), ('repeat', 1)):
        if getattr(args, name) < least:
            raise BadInput(f'--{name.replace("_", "-")} is {getattr(args, name)}; use {least} or more')


def ladder_path() -> Path:
    "The ladder of this checkout; outside of one, a file in the cache folder."
    from tinyvllm.device import cache_dir
    here = Path('nbs/ladder.jsonl')
    if here.exists():
        return here
    cache_dir().mkdir(parents=True, exist_ok=True)
    return cache_dir() / 'ladder.jsonl'


def info(args) -> None:
    "`tinyvllm info`: what a bug report should hold."
    from importlib.metadata import version
    from tinygrad import Device
    from tinyvllm.device import cache_dir, compiler_name
    from tinyvllm.measure import bandwidth, machine_name
    from tinyvllm.weights import models_found
    device = Device.DEFAULT
    rows = [('tinyvllm', __version__), ('tinygrad', version('tinygrad')), ('python', platform.python_version()),
            ('device', f'{device} ({machine_name(device)})'), ('compiler', compiler_name()),
            ('bandwidth', f'{bandwidth(device) / 1e9:.1f} GB/s measured'), ('cache', str(cache_dir()))]
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
        args.run(args)
        return 0
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
