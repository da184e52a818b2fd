"""The fast path on an H100: PyTorch's best and ours, one after the other, and the machine's limits in the same run.

    python benchmarks/h100.py                    # adds rows to benchmarks/results/h100.jsonl; about ten minutes
    python benchmarks/h100.py --only decode quant --batch 1 --quant int8 int4-g32

TinyLlama-1.1B's shape with seeded random weights, 16 bits, about 200 tokens in the cache. First `gpt_fast.py`: a matrix
product and a copy, decoding, a prompt. Then `tinyvllm bench`: decoding, also with eight steps for a decision; one stream
with quantised weights; a prompt of 2048 tokens. A row holds both sides' numbers, the ratio, and the share of the limit.
Needs torch beside tinyvllm. What fails is written down, and the rest runs.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

from common import RESULTS, our_environment, write_row

HERE = Path(__file__).parent
KINDS = 'decode', 'quant', 'prefill', 'steps'


def json_rows(command: list, seconds: float) -> tuple[list[dict], str | None]:
    "The JSON lines of a program, those before a time limit at least, and why there are no more."
    print('  ', *command[1:], file=sys.stderr, flush=True)
    try:
        run = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=seconds,
                             env=our_environment())
        text, error = run.stdout, (run.stderr.strip().splitlines() or [''])[-1] if run.returncode else None
    except subprocess.TimeoutExpired as late:
        text, error = (late.stdout or b'').decode(), f'stopped after {seconds:.0f} s'
    if error: print(f'  {error}', file=sys.stderr, flush=True)
    return [json.loads(line) for line in text.splitlines() if line.startswith('{')], error


def torch_rows(args) -> dict:
    "What `gpt_fast.py` measures: (what, batch) -> row."
    command = [sys.executable, HERE / 'gpt_fast.py', '--json', '--shape', args.torch_shape, '--device',
               args.torch_device, '--context', args.context, '--tokens', args.tokens, '--repeat', args.repeat,
               '--batch', *args.batch, '--prompt', args.prompt if 'prefill' in args.only else 0]
    rows, _ = json_rows(command, args.patience)
    return {(row['what'], row.get('batch')): row for row in rows}


def ours(args, kind: str, *options) -> list[dict]:
    "What `tinyvllm bench` says; a row with an error where it says nothing."
    device = ('--device', args.device) if args.device else ()
    command = [sys.executable, '-m', 'tinyvllm', 'bench', kind, *device, '--model', args.model, '--repeat',
               args.repeat, '--json', *options]
    rows, error = json_rows(command, args.patience)
    return rows + ([dict(error=error)] if error else [])


def measured(args, only: str):
    "Rows of one kind: what it is, and what `tinyvllm bench` said."
    decode = '--context', args.context, '--tokens', args.tokens
    if only == 'decode':
        yield from (('decode', row) for row in ours(args, 'decode', '--batch', *args.batch, '--check', args.check, *decode))
    if only == 'steps':
        more = ours(args, 'decode', '--batch', *args.batch, '--num-scheduler-steps', 8, '--no-count', *decode)
        yield from (('decode', row | dict(num_scheduler_steps=8)) for row in more)
    if only == 'quant':
        for quant in args.quant:
            yield from (('decode', row) for row in ours(args, 'decode', '--quant', quant, '--no-count', *decode))
    if only == 'prefill':
        yield from (('prefill', row) for row in ours(args, 'prefill', '--context', args.prompt, '--no-count'))


def joined(what: str, row: dict, torch: dict, single: dict | None) -> dict:
    "Both sides in one row."
    limits = dict(copy_gb_s=torch.get(('copy', None), {}).get('gb_s'),
                  matmul_tflop_s=torch.get(('matmul', None), {}).get('tflop_s'))
    theirs = torch.get((what, row.get('batch') if what == 'decode' else None))
    if 'error' in row: return dict(what=what, **row, **limits)
    shares = {}
    if theirs: shares['over_torch'] = round(row['tok_s'] / theirs['tok_s'], 3)
    if row['quant'] and single: shares['over_16_bits'] = round(row['tok_s'] / single['tok_s'], 3)
    if what == 'decode' and limits['copy_gb_s']:
        shares['copy_share'] = round(row['bandwidth_share'] * row['bandwidth_gb_s'] / limits['copy_gb_s'], 4)
    if what == 'prefill' and limits['matmul_tflop_s']:
        shares['matmul_share'] = round(row['tflop_s'] / limits['matmul_tflop_s'], 4)
    return dict(what=what, **shares, torch_tok_s=theirs and theirs['tok_s'], **limits, **row, torch=theirs)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--model', default='tinyllama-1.1b', help='a shape of `tinyvllm bench`')
    p.add_argument('--device', help="of tinyvllm; default: the best there is")
    p.add_argument('--batch', type=int, nargs='+', default=[1, 32, 256])
    p.add_argument('--quant', nargs='*', default=['int8', 'int4-g32', 'int4-g128'], help='at one stream')
    p.add_argument('--context', type=int, default=168)
    p.add_argument('--tokens', type=int, default=56)
    p.add_argument('--prompt', type=int, default=2048)
    p.add_argument('--repeat', type=int, default=5, help='runs of each measurement; medians count')
    p.add_argument('--check', type=int, default=1, help='answers to compare with portable operations')
    p.add_argument('--only', nargs='+', choices=KINDS, default=KINDS)
    p.add_argument('--patience', type=float, default=900, help='seconds for one program')
    p.add_argument('--torch-shape', default='tinyllama-1.1b')
    p.add_argument('--torch-device', default='cuda')
    p.add_argument('--out', type=Path, default=RESULTS / 'h100.jsonl', help='rows are added here')
    args = p.parse_args()
    torch, single = torch_rows(args), None
    for only in args.only:
        for what, row in measured(args, only):
            if only == 'decode' and row.get('batch') == 1: single = row
            told = joined(what, row, torch, single)
            write_row(args.out, told)
            print(', '.join(f'{k} {v}' for k, v in told.items() if k != 'torch'), flush=True)


if __name__ == '__main__':
    main()
