"""The fast path on an H100: PyTorch's best and ours, in turn, and the machine's limits in the same run.

    python benchmarks/h100.py                       # adds rows to benchmarks/results/h100.jsonl; many minutes
    python benchmarks/h100.py --only decode --batch 1 32 --quant int8 int4-g32

TinyLlama-1.1B's shape with seeded random weights, 16 bits, 200 tokens in the cache: one stream, 32, 256; then one
stream with quantised weights; then a prompt of 2048 tokens. Each measurement is a process of its own:
`gpt_fast.py` and `tinyvllm bench`, one after the other, after the two limits (a bf16 matrix product, a copy). A
row holds both sides' numbers, the ratio, and the share of the limit. Needs torch beside tinyvllm. What fails is
written down, and the rest runs.
"""
import argparse
import json
import sys
from pathlib import Path

from peers import RESULTS, Failed, output, tinyvllm_bench, write_row

HERE = Path(__file__).parent


def torch_rows(args, *options) -> list[dict]:
    "What `gpt_fast.py` prints."
    what = '--shape', args.torch_shape, '--device', args.torch_device, '--context', args.context
    text = output([sys.executable, HERE / 'gpt_fast.py', '--json', *what, '--tokens', args.tokens,
                   '--repeat', args.repeat, *options])
    return [json.loads(line) for line in text.splitlines() if line.startswith('{')]


def ours(args, kind: str, *options) -> dict:
    "What `tinyvllm bench` says."
    device = ('--device', args.device) if args.device else ()
    options = *device, '--model', args.model, '--repeat', args.repeat, *options
    return tinyvllm_bench(kind, *map(str, options))


def attempt(name: str, fn):
    "The result, or the reason why there is none."
    print(f'  {name} ...', file=sys.stderr)
    try:
        return fn(), None
    except Failed as error:
        print(f'  {name}: {error}', file=sys.stderr)
        return None, str(error)


def decode_rows(args, limit: dict):
    "One row per batch, then one per quantisation at one stream."
    single = None
    where = '--context', args.context, '--tokens', args.tokens, '--check', args.check
    for batch in args.batch:
        torch, torch_error = attempt(f'gpt_fast, {batch}', lambda: torch_rows(
            args, '--batch', batch, '--prompt', 0, '--no-limits')[0])
        row, error = attempt(f'tinyvllm, {batch}', lambda: ours(args, 'decode', '--batch', batch, *where))
        single = row if batch == 1 else single
        yield joined('decode', row, torch, limit, errors=[e for e in (torch_error, error) if e], batch=batch)
    for quant in args.quant:
        row, error = attempt(f'tinyvllm, {quant}', lambda: ours(args, 'decode', '--quant', quant, *where))
        over = row and single and round(row['tok_s'] / single['tok_s'], 3)
        yield joined('decode', row, None, limit, errors=[e for e in [error] if e], batch=1, quant=quant,
                     over_16_bits=over)


def prefill_rows(args, limit: dict):
    "One prompt."
    torch, torch_error = attempt('gpt_fast, prefill', lambda: torch_rows(
        args, '--batch', '--prompt', args.prompt, '--no-limits')[0])
    row, error = attempt('tinyvllm, prefill', lambda: ours(args, 'prefill', '--context', args.prompt))
    share = row and limit and round(row['tflop_s'] / limit['matmul_tflop_s'], 4)
    yield joined('prefill', row, torch, limit, errors=[e for e in (torch_error, error) if e], matmul_share=share)


def joined(what: str, row: dict | None, torch: dict | None, limit: dict, **more) -> dict:
    "Both sides in one row."
    ratio = row and torch and round(row['tok_s'] / torch['tok_s'], 3)
    gb_s = row and row['bytes_per_token'] / row['bytes_over_minimum'] * row['tok_s'] / 1e9
    share = gb_s and limit and what == 'decode' and round(gb_s / limit['copy_gb_s'], 4)
    return dict(what=what, tok_s=row and row['tok_s'], torch_tok_s=torch and torch['tok_s'], ratio=ratio,
                copy_share=share or None, **limit, **more, tinyvllm=row, torch=torch)


def limits(args) -> dict:
    "TFLOP/s of a matrix product, GB/s of a copy."
    rows, _ = attempt('limits', lambda: torch_rows(args, '--batch', '--prompt', 0))
    found = {row['what']: row for row in rows or ()}
    return dict(matmul_tflop_s=found['matmul']['tflop_s'], copy_gb_s=found['copy']['gb_s']) if found else {}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--model', default='tinyllama-1.1b', help='a shape of `tinyvllm bench`')
    p.add_argument('--device', help="of tinyvllm; default: the best there is")
    p.add_argument('--batch', type=int, nargs='+', default=[1, 32, 256])
    p.add_argument('--quant', nargs='*', default=['int8', 'int4-g32'], help='at one stream')
    p.add_argument('--context', type=int, default=200)
    p.add_argument('--tokens', type=int, default=56)
    p.add_argument('--prompt', type=int, default=2048)
    p.add_argument('--repeat', type=int, default=5, help='runs of each measurement; medians count')
    p.add_argument('--check', type=int, default=1, help='answers to compare with portable operations')
    p.add_argument('--only', nargs='+', choices=['decode', 'prefill'], default=['decode', 'prefill'])
    p.add_argument('--torch-shape', default='tinyllama-1.1b')
    p.add_argument('--torch-device', default='cuda')
    p.add_argument('--out', type=Path, default=RESULTS / 'h100.jsonl', help='rows are added here')
    args = p.parse_args()
    limit = limits(args)
    for what in args.only:
        for row in dict(decode=decode_rows, prefill=prefill_rows)[what](args, limit):
            write_row(args.out, row)
            print(', '.join(f'{k} {v}' for k, v in row.items() if k not in ('tinyvllm', 'torch')), flush=True)


if __name__ == '__main__':
    main()
