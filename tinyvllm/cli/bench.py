"`tinyvllm bench`: the ladder, decoding, prefill, a trace of requests."
import json
import os
import sys
from pathlib import Path

from tinyvllm.cli.options import Parser, add_commands, check_least, model_options
from tinyvllm.errors import BadInput

EXAMPLES = """\
examples:
  tinyvllm bench                                   same as `tinyvllm bench ladder`
  tinyvllm bench ladder --requests 1 4 16 32       the engine, a row of the ladder for each number
  tinyvllm bench decode --batch 1 8 --context 200  decoding alone, and what it costs
  tinyvllm bench prefill --context 512             reading a prompt
  tinyvllm bench serve-trace --scale 0.1           many requests, latencies by percentile
`tinyvllm bench decode --help` and so on show the options of each.
`tinyvllm doctor --report FILE` measures the ladder and more, and writes one file for an issue."""

LADDER_EXAMPLES = """\
examples:
  tinyvllm bench                                   the engine with one request, median of 3 runs
  tinyvllm bench --requests 1 4 16 32              and with more at the same time: a row for each
  tinyvllm bench --rung 01 --tokens 8              the loop without a cache
  tinyvllm bench --ladder mine.jsonl               keep the row elsewhere"""

DECODE_EXAMPLES = """\
examples:
  tinyvllm bench decode                            one sequence behind a prompt of 128 tokens
  tinyvllm bench decode --batch 1 8 32 --plot speed.png
  tinyvllm bench decode --model tinyllama-1.1b --batch 32 --context 200 --json
The prompts are read first and not timed. Then every sequence generates --tokens tokens, all in the same steps."""

PREFILL_EXAMPLES = """\
examples:
  tinyvllm bench prefill --context 2048            one prompt of 2048 tokens
  tinyvllm bench prefill --batch 4 --context 512 --json
Timed from the first step to the first token of the last prompt."""

TRACE_EXAMPLES = """\
examples:
  tinyvllm bench serve-trace                       nano-vllm's: 256 requests, lengths 100 to 1024
  tinyvllm bench serve-trace --scale 0.125 --sequential --plot trace.png
  tinyvllm bench serve-trace --rate 2 --json       two arrivals a second instead of all at once
tok_s counts the tokens that were generated. The trace is served once before, to compile."""


def bench_commands(p: Parser) -> None:
    "What to measure; `main` inserts `ladder` where nothing is named."
    add_commands(p.add_subparsers(dest='what', required=True, metavar='WHAT'), [
        (bench_ladder, 'ladder', 'Measure a rung and add its row to the ladder; `tinyvllm bench` alone is this.',
         LADDER_EXAMPLES, ladder_options),
        (bench_load, 'decode', 'Time decoding: tokens after the prompts.', DECODE_EXAMPLES, decode_options),
        (bench_load, 'prefill', 'Time the reading of prompts.', PREFILL_EXAMPLES, prefill_options),
        (bench_trace, 'serve-trace', 'Serve requests of random lengths; throughput and latencies.',
         TRACE_EXAMPLES, trace_options)])


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
    p.add_argument('--ladder', metavar='FILE',
                   help='rows are added to it; default: nbs/ladder.jsonl in a checkout, else ladder.jsonl in the cache folder')
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
    p.add_argument('--requests', type=int, default=256, metavar='N', help='in the trace; default 256')
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


def bench_ladder(args) -> None:
    "`tinyvllm bench ladder`: measure a rung, store its rows, print them beside the others."
    from importlib.resources import files
    from tinyvllm.cli.measurements import Workload, measure_rung, open_model
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
    from tinyvllm.cli.measurements import Load, measure_load, open_model, open_reference, plot_loads
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
        rows.append(print_row(args, model, row, last=load is loads[-1]))
    if args.plot:
        plot_loads(rows).savefig(args.plot)


def bench_trace(args) -> None:
    "`tinyvllm bench serve-trace`."
    from tinyvllm.cli.measurements import Trace, measure_trace, open_model, plot_trace
    check_least(args, requests=1, context=1, tokens=2, batch=1, num_scheduler_steps=1)
    for name in 'scale', 'rate':
        value = getattr(args, name)
        if value is not None and not 0 < value < float('inf'):
            raise BadInput(f'--{name} is {value}; use a number above 0')
    check_plot(args.plot)
    model = open_model(args.model, args.dtype, args.quant)
    trace = Trace(args.requests, args.context, args.tokens, rate=args.rate).scaled(args.scale)
    row = measure_trace(model, trace, args.batch, args.sequential, not args.no_warmup,
                        not args.no_count, dict(num_scheduler_steps=args.num_scheduler_steps))
    row = print_row(args, model, row)
    if args.plot:
        plot_trace(row).savefig(args.plot)


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


def print_row(args, model, row: dict, last: bool = True) -> dict:
    "Print a measurement under its heading; returns both."
    from datetime import date
    from importlib.metadata import version
    from tinygrad import Device
    from tinyvllm.cli.measurements import as_text, stored_as
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


def default_bench(argv: list[str]) -> list[str]:
    "`tinyvllm bench` with nothing named, or only options, is `tinyvllm bench ladder`."
    first = argv[1] if len(argv) > 1 else '--'
    plain = argv[:1] == ['bench'] and first.startswith('-') and first not in ('-h', '--help')
    return ['bench', 'ladder', *argv[1:]] if plain else argv
