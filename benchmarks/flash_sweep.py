"""Which tiles are fast? Every rung and variant of flash attention on a CUDA card, checked, beside PyTorch's.

    python benchmarks/flash_sweep.py            # checks, then TFLOP/s of each variant; about 4 minutes
    python benchmarks/flash_sweep.py --quick    # D 64 and 128 at 2,048 tokens only; about 1 minute
    python benchmarks/flash_sweep.py --write    # adds what it prints to benchmarks/results/kernels.jsonl

Operations are those of the pairs that causality leaves. Without torch its column stays empty.
"""
import argparse
import os
from importlib.metadata import version
from itertools import product

os.environ.setdefault('DEV', 'CUDA')
import tinyvllm  # noqa: E402,F401  picks device and compiler before tinygrad looks
import numpy as np  # noqa: E402
from common import RESULTS, write_row  # noqa: E402
from tinygrad import Device, Tensor, TinyJit, dtypes  # noqa: E402
from tinyvllm.cli.doctor import run_case  # noqa: E402
from tinyvllm.kernels.cases import PREFILL_STARTS, REAL  # noqa: E402
from tinyvllm.errors import BadInput  # noqa: E402
from tinyvllm.kernels.flash import FLASH_TILED, TILES, flash  # noqa: E402
from tinyvllm.kernels.flash_cuda import FLASH_CUDA  # noqa: E402
from tinyvllm.measure import machine_name, timed  # noqa: E402

OUT = RESULTS / 'kernels.jsonl'
H, K, S = 32, 8, 16
MATRIX = [dict(SIMDS=w, ROWS=r, KEYS=keys, STAGES=stages, RESIDENT=resident)
          for w, r, keys, stages, resident in (
              (4, 16, 64, 1, 2), (4, 16, 64, 1, 3), (4, 16, 32, 2, 3), (4, 16, 32, 1, 3), (4, 16, 64, 2, 2),
              (4, 16, 128, 1, 2), (8, 16, 64, 1, 1), (8, 16, 32, 2, 1), (8, 16, 64, 2, 1), (8, 16, 128, 1, 1),
              (4, 32, 32, 1, 2), (4, 32, 64, 1, 2), (4, 32, 32, 2, 2), (4, 32, 64, 2, 2), (2, 32, 64, 1, 4),
              (2, 32, 32, 2, 4))]
TILED = [dict(SIMDS=s, ROWS=r) for s, r in ((4, 8), (8, 8), (4, 4), (8, 4), (4, 16))]


def fits(D: int, KEYS: int, STAGES: int, **_) -> bool:
    "Do the tiles fit into the 48 KB that a kernel may declare?"
    return STAGES * 2 * KEYS * (D + 8) * 2 <= 49152


def name(variant: dict) -> str:
    "Return a short name of a variant, for a column."
    return ' '.join(f'{k.lower()}={v}' for k, v in variant.items())


def check(rung, variant: dict, dtype: str, cases: tuple[int, ...]) -> str:
    "Largest error over random cases against float64, between guard regions; or what went wrong."
    try:
        errors = []
        for i in cases:
            case = PREFILL_STARTS.make_case(np.random.default_rng([0, i]), i, dtype, REAL)
            if rung is FLASH_CUDA and not fits(case.inputs['q'].shape[2], **variant): continue
            errors.append(run_case(lambda *t: flash(*t, rung=rung, **variant), case, Device.DEFAULT))
        most = max(errors, default=0)
        return f'{most:.1e}' + ('' if most <= (2e-3 if dtype == 'float16' else 1e-5) else ' WRONG')
    except (BadInput, MemoryError, RuntimeError) as error:
        return str(error).strip().splitlines()[-1][:90]


def load(T: int, D: int, past: int = 0, heads: tuple[int, int] = (H, K), dtype=dtypes.half) -> tuple:
    "The last T tokens of a sequence of past + T, in shuffled blocks."
    L, (h, k) = past + T, heads
    Tensor.manual_seed(0)
    pools = [Tensor.randn(L // S + 1, S, k, D, dtype=dtype).contiguous().realize() for _ in 'kv']
    table = 1 + np.random.default_rng(0).permutation(L // S)[None]
    where = [Tensor(np.asarray(x, np.int32)).realize() for x in (table, np.zeros(T), np.arange(past, L), [0, T])]
    return Tensor.randn(T, h, D, dtype=dtype).contiguous().realize(), *pools, *where


def pairs(T: int, past: int) -> int:
    "Keys seen, summed over the new tokens."
    return T * past + T * (T + 1) // 2


def microseconds(rung, variant: dict, arguments: tuple, launches: int) -> float:
    "Median of 5 replays of a chain of launches."
    q, *rest = arguments

    def chain(q: Tensor) -> Tensor:
        for _ in range(launches): q = flash(q, *rest, rung=rung, **variant)
        return q.realize()
    jit = TinyJit(chain)
    return timed(lambda: jit(q), repeat=5, warmup=3).median / launches * 1e6


def torch_microseconds(T: int, D: int, past: int, heads: tuple[int, int], launches: int) -> float | None:
    "PyTorch's `scaled_dot_product_attention` on the same shape, contiguous keys."
    try:
        import torch
        import torch.nn.functional as F
        from torch.nn.attention.bias import causal_lower_right
    except ImportError:
        return None
    (h, k), L = heads, past + T
    q, kk, v = (torch.randn(1, n, l, D, dtype=torch.float16, device='cuda') for n, l in ((h, T), (k, L), (k, L)))
    kk, v = (x.repeat_interleave(h // k, 1) for x in (kk, v))    # the time of this is not counted
    how = dict(is_causal=True) if past == 0 else dict(attn_mask=causal_lower_right(T, L))
    for _ in range(3): F.scaled_dot_product_attention(q, kk, v, **how)
    runs = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(launches): F.scaled_dot_product_attention(q, kk, v, **how)
        end.record()
        torch.cuda.synchronize()
        runs.append(start.elapsed_time(end) * 1e3 / launches)
    return sorted(runs)[2]


def sweep(quick: bool) -> list[dict]:    # rows, those of the matrix units
    "Checks, then a table per shape, fastest first."
    rows = []
    for rung, variants in ((FLASH_TILED, TILED), (FLASH_CUDA, MATRIX)):
        for variant in variants:
            for dtype in ('float16', 'float32') if rung is FLASH_TILED else ('float16',):
                if dtype == 'float32' and variant['ROWS'] > 4: continue
                shipped = TILES[rung.signature.name, 'CUDA'] in (variant, dict(variant, ROWS=8))
                cases = range(12) if shipped else (0, 7) if variant.get('KEYS') != 32 else (0, 1)
                print(f'{rung.signature.name:13} {dtype} {name(variant):50} error '
                      f'{check(rung, variant, dtype, cases)}', flush=True)
    shapes = [(2048, 64, 0), (2048, 128, 0)]
    if not quick: shapes = [(512, 64, 0), (512, 128, 0), *shapes, (8192, 64, 0), (8192, 128, 0), (512, 128, 15872)]
    for T, D, past in shapes:
        launches = max(2, min(20, 2**26 // pairs(T, past)))
        flops, arguments = 4 * D * H * pairs(T, past), load(T, D, past)
        theirs = torch_microseconds(T, D, past, (H, K), launches)
        if theirs: print(f'\n{T} tokens after {past}, D {D}: torch {theirs:.0f} us, {flops / theirs / 1e6:.0f} TFLOP/s')
        found = []
        for rung, variants in ((FLASH_TILED, TILED if T <= 2048 else []), (FLASH_CUDA, MATRIX)):
            for variant, heads in product(variants, (4, 1)):
                if rung is FLASH_CUDA and not fits(D, **variant) or heads == 1 and variant is not variants[0]: continue
                variant = variant | dict(HEADS=heads)
                try: found.append((microseconds(rung, variant, arguments, launches), rung, variant))
                except (BadInput, RuntimeError) as error: print(name(variant), str(error).strip().splitlines()[-1][:90])
        for us, rung, variant in sorted(found, key=lambda f: f[0]):
            print(f'  {flops / us / 1e6:6.1f} TFLOP/s {us:9.1f} us {rung.signature.name:13} {name(variant)}', flush=True)
            rows.append(dict(kernel='flash_sweep', rung=name(variant), shape=f'{T} x {H}/{K} x {D}', us=round(us, 1),
                             tflops=round(flops / us / 1e6, 1)))
    return rows


def extra_memory(T: int, D: int) -> int:
    "Most bytes that one call holds at a time, beside its arguments and its result."
    arguments, allocator, now, most = load(T, D), Device[Device.DEFAULT].allocator, 0, 0
    flash(*arguments).realize()      # the sizes of the step are on the device now
    alloc, free = allocator.alloc, allocator.free

    def counted(function, sign):
        def call(*args):
            nonlocal now, most
            now += sign * args[0 if sign > 0 else 1]
            most = max(most, now)
            return function(*args)
        return call
    allocator.alloc, allocator.free = counted(alloc, 1), counted(free, -1)
    try: out = flash(*arguments).realize()
    finally: allocator.alloc, allocator.free = alloc, free
    return most - out.nbytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='two shapes only')
    parser.add_argument('--write', action='store_true', help='add rows to the results')
    options = parser.parse_args()
    about = dict(dtype='half', device='CUDA', machine=machine_name('CUDA'), tinygrad=version('tinygrad'))
    print(about['machine'], {k: v for k, v in TILES.items() if 'CUDA' in k})
    rows = sweep(options.quick)
    rows += [dict(kernel='flash', rung='matrix', shape=f'16384 x {H}/{K} x {D}', extra_bytes=extra_memory(16384, D))
             for D in (64, 128)]
    if options.write:
        for row in rows:
            write_row(OUT, row | about)


if __name__ == '__main__':
    main()
