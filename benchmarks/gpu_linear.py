"""How fast are the matrix kernels, in every format, and which sizes suit the card?

    python benchmarks/gpu_linear.py                  # checks, then races; rows to benchmarks/results/gpu_linear.jsonl
    python benchmarks/gpu_linear.py --check          # the checks alone: a minute
    python benchmarks/gpu_linear.py --chosen         # what the package chooses against PyTorch: the whole table
    python benchmarks/gpu_linear.py --formats f16 --tokens 1 32 --minutes 2
    python benchmarks/gpu_linear.py --device METAL --check    # in the simulator: tiny shapes, a few formats

First all kernels are compiled, by as many processes as there are processors. Then correctness: every format, numbers of
tokens from 1 to 2048, ragged shapes, norms and residuals in turn, against float64 numpy. Then speed: the matrices of
TinyLlama-1.1B as a layer uses them (norm before, SwiGLU or residual after), every candidate of `CANDIDATES` in one race
with PyTorch's `linear`, recorded as graphs, on more data than a cache holds. A race that starts after `--minutes` is
left out. At the end, for each matrix: the sizes that the package chooses, and the fastest.
"""
import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from importlib.metadata import version
from math import ceil
from multiprocessing import get_context
from pathlib import Path

import tinyvllm  # noqa: F401  picks device and compiler before tinygrad looks
import numpy as np
from common import RESULTS, write_row
from tinygrad import Device, Tensor, dtypes
from tinygrad.helpers import Context, diskcache_get, diskcache_put
from tinyvllm.kernels import metal
from tinyvllm.cli.doctor import is_simulated
from tinyvllm.kernels.cases import make_large_tensor
from tinyvllm.kernels.linear_gpu import gpu_embed, gpu_linear, gpu_swiglu
from tinyvllm.measure import machine_name
from tinyvllm.quant.pack import Packed
from tinyvllm.quant.formats import format_of
from tinyvllm.runner.cuda_graph import use_best_graph
from kernels import ROUNDS, Chain, TorchChain, copies, forget, race, random, reason, share_context, torch, FULL

OUT = RESULTS / 'gpu_linear.jsonl'
MATRICES = {    # rows, columns, and what a layer asks of the launch
    'qkv': (2560, 2048, 'norm'), 'o': (2048, 2048, 'add'), 'gate_up': (11264, 2048, 'gated'),
    'down': (2048, 5632, 'add'), 'head': (32000, 2048, 'norm')}
FORMATS = ('f16', 'int8', 'int4-g32', 'int8-g32', 'q4_1', 'int4-g32-zp', 'q4_k', 'q6_k')
TOKENS = (1, 32, 2048, 8, 256, 16, 64)    # the most wanted first
CHECKED = (1, 2, 3, 4, 8, 16, 17, 32, 64, 128, 256, 512, 2048)
ROTATION = 2**27    # bytes of weights in a race


def sized(rung: str, names: str, *rows: tuple) -> list[dict]:
    "Sizes of one kernel, a dict each."
    return [dict(rung=rung, **dict(zip(names.split(), row))) for row in rows]


stream = partial(sized, 'stream', 'TILES WARPS DEPTH RESIDENT')
tiles = partial(sized, 'tiles', 'BM BN BK STAGES WM WN RESIDENT')
matrix_units = partial(sized, 'tiles', 'BM BN BK WM WN')
lanes = partial(sized, 'lanes', 'SIMDS ROWS UNROLL TOKENS')
CANDIDATES = {    # by tokens, beside what the package chooses; f16 tries all of them, other formats the first ones
    'CUDA': {
        1: stream((1, 16, 4, 2), (1, 8, 4, 4), (1, 32, 2, 1), (1, 32, 4, 1), (1, 24, 4, 1), (1, 4, 4, 6),
                  (1, 8, 2, 5), (1, 16, 2, 3), (2, 8, 2, 3)) + lanes((8, 2, 2, 1)),
        8: stream((1, 16, 4, 2), (1, 8, 4, 3), (2, 8, 2, 3), (1, 32, 2, 1)),
        16: stream((1, 16, 3, 1), (1, 8, 3, 3), (2, 8, 2, 2), (1, 16, 4, 1), (2, 4, 2, 5)),
        32: stream((1, 16, 2, 1), (2, 8, 1, 2), (2, 4, 2, 4), (2, 8, 2, 2), (1, 8, 2, 3),
                   (2, 4, 1, 5), (1, 4, 4, 5)) + tiles((32, 64, 64, 3, 1, 4, 4), (32, 128, 32, 3, 1, 4, 4)),
        64: stream((2, 8, 1, 1), (2, 4, 2, 2), (1, 8, 2, 2), (2, 8, 2, 1))
        + tiles((64, 64, 64, 3, 2, 2, 3), (64, 128, 32, 3, 1, 4, 3), (64, 64, 32, 4, 2, 2, 4)),
        256: tiles((64, 64, 64, 3, 2, 2, 3), (64, 128, 32, 3, 1, 4, 3), (128, 128, 32, 3, 2, 2, 2),
                   (64, 64, 32, 4, 2, 2, 4), (128, 64, 32, 4, 2, 2, 3), (64, 64, 64, 3, 1, 2, 4)),
        2048: tiles((128, 128, 32, 3, 2, 2, 2), (128, 128, 32, 3, 2, 4, 2), (128, 256, 32, 2, 2, 4, 1),
                    (256, 128, 32, 2, 4, 2, 1), (128, 64, 32, 4, 2, 2, 3), (128, 128, 32, 2, 2, 2, 2))},
    'METAL': {
        1: lanes((2, 4, 1, 1), (2, 4, 2, 1), (4, 2, 1, 1), (2, 2, 2, 1), (4, 4, 1, 1), (8, 2, 1, 1)),
        8: lanes((2, 2, 1, 8), (2, 4, 1, 8), (2, 4, 1, 4), (4, 2, 1, 8))
        + matrix_units((8, 64, 64, 1, 4), (8, 32, 64, 1, 2)),
        32: matrix_units((32, 64, 32, 2, 2), (32, 32, 64, 2, 2), (32, 64, 32, 1, 4), (16, 64, 64, 1, 4)),
        64: matrix_units((64, 64, 32, 2, 2), (32, 64, 32, 2, 2), (64, 32, 32, 2, 2)),
        256: matrix_units((64, 64, 32, 2, 2), (32, 64, 32, 2, 2), (64, 32, 32, 2, 2)),
        2048: matrix_units((64, 64, 32, 2, 2), (64, 64, 16, 2, 2), (32, 64, 32, 2, 2), (64, 32, 64, 2, 2))}}


def candidates(T: int) -> list[dict]:
    "For the default device."
    return CANDIDATES.get(Device.DEFAULT.split(':')[0], {}).get(T, [])


def tried(name: str, what: str, T: int) -> list[dict]:
    "The candidates of a race: for another format than f16 the first ones; for a matrix behind a norm, where that goes."
    N, K, use = MATRICES[what]
    few = None if name == 'f16' else 6 if T <= 64 else 0
    norms = [dict(NORM=0)] if wide(what) and T <= 8 and name == 'f16' else []    # in a launch of its own
    return [c for c in candidates(T)[:few] if fits(c, T)] + norms


def wide(what: str) -> bool:
    "Can a launch read what the one before wrote? Else it adds that to its own."
    N, K, use = MATRICES[what]
    return (N // 2 if use == 'gated' else N) >= K and use != 'add'


def fits(c: dict, T: int) -> bool:
    "Into the shared memory that a kernel may declare, by the kernels' formulas?"
    if 'STAGES' in c: return c['STAGES'] * (c['BM'] + c['BN']) * c['BK'] * 2 <= 49152
    if c['rung'] != 'stream': return True
    eights = -(-T // 8)
    return c['WARPS'] * (eights * 640 + 32) <= 49152


def label(sizes: dict) -> str:
    "Short, for a row."
    return ' '.join([sizes.get('rung', 'default'), *(f'{k.lower()}={v}' for k, v in sizes.items() if k != 'rung')])


# --- matrices and what is launched

def parts_of(name: str, N: int, K: int, rng: np.random.Generator) -> list[np.ndarray]:
    "Random codes and scales: weights of about the size 1 / sqrt(K)."
    f, size = format_of(name), K**-0.5
    group = f.group or K

    def halves(*shape, scale): return ((1 + rng.random(shape)) * scale).astype(np.float16)
    def octets(*shape, dtype=np.uint8, most=256): return rng.integers(0, most, shape, np.uint8).view(dtype)
    if f.bits == 16: return [(rng.standard_normal((N, K)) * size).astype(np.float16)]
    if f.bits == 8: return [octets(N, K, dtype=np.int8), halves(N, K // group, scale=size / 110)]
    codes, d = octets(N, K // 2), halves(N, K // group, scale=size / 7)
    return {'scale': lambda: [codes, d], 'zero': lambda: [codes, d, octets(N, K // group, most=17)],
            'min': lambda: [codes, np.stack([d, -8 * d], -1)],
            'q4_k': lambda: [codes, halves(N, K // 256, 2, scale=size / 220), octets(N, K // 32, 2, most=64)],
            'q6_k': lambda: [codes, octets(N, K // 4), halves(N, K // 256, scale=size / 2000),
                             octets(N, K // 16, dtype=np.int8)]}[f.scales]()


def packed(name: str, N: int, K: int, rng: np.random.Generator) -> Packed:
    "On the default device."
    return Packed(format_of(name), (N, K), tuple(Tensor(p).realize() for p in parts_of(name, N, K, rng)))


def launch(x: Tensor, w, use: str, norm: Tensor, add: Tensor | None = None, **sizes) -> Tensor:
    "What a layer asks for."
    if use == 'gated': return gpu_swiglu(x, w, norm=norm, eps=1e-5, **sizes)
    if use == 'norm': return gpu_linear(x, w, norm=norm, eps=1e-5, add=add, **sizes)
    return gpu_linear(x, w, add=add, **sizes)


# --- correctness

def exact(x: np.ndarray, w: np.ndarray, use: str, norm: np.ndarray, add: np.ndarray) -> np.ndarray:
    "In float64."
    x = x.astype(np.float64)
    if use != 'add': x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * norm
    y = x @ w.T
    if use != 'gated': return y + add
    gate, up = np.split(y, 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


def cases(formats, tokens, real: bool):
    "Format, tokens, rows, columns, use: everything in turn."
    for i, name in enumerate(formats):
        K = (512, 2048, 768)[i % 3] if real else 256
        for j, T in enumerate(tokens):
            N = ((1000, 2048, 5634, 65)[(i + j) % 4] if real else 24) // 2 * 2
            yield name, T, N, K, ('norm', 'add', 'gated')[(i + 2 * j) % 3]


def check(name: str, T: int, N: int, K: int, use: str, **sizes) -> float:
    "The largest error, as a share of the largest value."
    w, dense = matrix(name, N, K)
    rng = np.random.default_rng([T, N, K])
    x, norm = rng.standard_normal((T, K)).astype(np.float16), (1 + rng.random(K)).astype(np.float32)
    add = rng.standard_normal((T, N)).astype(np.float16)
    tensors = [Tensor(t).realize() for t in (norm, add)]
    got = launch(Tensor(x).realize(), w, use, tensors[0], None if use == 'gated' else tensors[1], **sizes).numpy()
    want = exact(x, dense, use, norm, add)
    return float(np.abs(got - want).max() / np.abs(want).max())


@cache
def matrix(name: str, N: int, K: int) -> tuple:
    "A random one, and its weights in float64 by the portable way."
    w = packed(name, N, K, np.random.default_rng([N, K]))
    return w, w.dequantize(dtypes.float).numpy().astype(np.float64)


def checks(formats, tokens, real: bool, more: bool) -> list[str]:
    "What is wrong; with the candidates, if more is wanted."
    wrong, worst = [], {}
    work = [(case, {}) for case in cases(formats, tokens, real)]
    if more and 'f16' in formats:
        work += [(('f16', T, 2048, 2048, 'add'), c) for T in TOKENS for c in candidates(T) if fits(c, T)]
    for (name, *shape), sizes in work:
        try: error = check(name, *shape, **sizes)
        except Exception as why: error, told = float('inf'), reason(why)
        else: told = f'error {error:.1e}'
        if not error <= 2e-3: wrong.append(f'WRONG: {name} {shape} {label(sizes)}: {told}')
        else: worst[name] = max(worst.get(name, 0), error)
        if not error <= 2e-3: print(wrong[-1], flush=True)
    for name in formats:
        w, dense = matrix(name, 66, 512)
        rows = gpu_embed(w, Tensor(np.array([5, 65, 0], np.int32)).realize(), dtypes.half).numpy()
        if np.abs(rows - dense[[5, 65, 0]]).max() <= 1e-3 * np.abs(dense).max(): continue
        wrong.append(f'WRONG: embed {name}')
    errors = {name: float(f'{error:.1e}') for name, error in worst.items()}
    print(f'{len(work)} cases, {len(wrong)} wrong; largest errors', errors, flush=True)
    return wrong


# --- speed

def data(name: str, N: int, K: int) -> list[Packed]:
    "Enough matrices that no cache holds them; the same numbers in each."
    some = parts_of(name, 64, K, np.random.default_rng(0))
    first = Packed(format_of(name), (N, K), tuple(
        Tensor(p).repeat(ceil(N / 64), *[1] * (p.ndim - 1))[:N].contiguous().realize() for p in some))
    count = max(2, ceil(ROTATION / sum(p.nbytes() for p in first.parts)))
    def again(): return Packed(first.format, (N, K), tuple(p.clone().realize() for p in first.parts))
    return [first] + [again() for _ in range(count - 1)]


def contestants(name: str, what: str, T: int, ws: list[Packed], some: list[dict]) -> dict:
    "Chains of launches, each waiting for the one before: it reads what that one wrote."
    N, K, use = MATRICES[what]
    x, norm = make_large_tensor((T, K), 'float16'), Tensor(np.ones(K, np.float32)).realize()
    chained, count = wide(what), len(ws) * ceil(8 / len(ws))

    def ours(sizes):
        def step(i, y):
            w = ws[i % len(ws)]
            if not chained: return launch(x, w, 'add', norm, y, **sizes)
            return launch(y.flatten()[:T * K].reshape(T, K), w, use, norm, **sizes)
        return lambda: Chain(step, make_large_tensor((T, K if chained else N), 'float16'), count)

    def theirs():
        weights = [random(N, K) * K**-0.5 for _ in range(max(2, ceil(ROTATION / (2 * N * K))))]
        tokens, linear = random(T, K), torch.nn.functional.linear
        n = len(weights)
        return TorchChain(lambda i, y: linear(tokens, weights[i % n]), tokens, n * ceil(8 / n))
    found = {label(sizes): ours(sizes) for sizes in [{}, *some]}
    return found | ({'pytorch': theirs} if name == 'f16' and torch else {})


def races(args):
    "Format, matrix, tokens and candidates: the most wanted first."
    for T in args.tokens:
        for name in args.raced:
            if name != 'f16' and T > 64 and name != args.raced[-1]: continue    # the same but for dequantising
            for what in args.matrices:
                yield name, what, T, [] if args.chosen else tried(name, what, T)


def rows_of(name: str, what: str, T: int, found: dict, copy: float, nbytes: int) -> list[dict]:
    "A row for each contestant."
    N, K, use = MATRICES[what]
    moved = nbytes + 2 * T * (K + (N // 2 if use == 'gated' else N))
    theirs, rows = found.get('pytorch', (None,))[0], []
    for rung, (s, kernels) in found.items():
        size = 2 * (N * K + T * (N + K)) if rung == 'pytorch' else moved
        rows.append(dict(kernel='linear', format=name, matrix=what, shape=f'{T} x {N} x {K}', tokens=T, rung=rung,
                         kernels=kernels, us=round(s * 1e6, 2), gbps=round(size / s / 1e9, 1),
                         tflops=round(2 * T * N * K / s / 1e12, 2), share=round(size / s / copy, 3) if copy else None,
                         of_pytorch=round(theirs / s, 3) if theirs else None))
    return rows


def verdict(rows: list[dict]) -> None:
    "What the package chose, and what won."
    print('\nformat, matrix, tokens: the choice of the package; the fastest; PyTorch')
    groups = {}
    for r in rows: groups.setdefault((r['format'], r['matrix'], r['tokens']), []).append(r)
    for key, seen in groups.items():
        ours = [r for r in seen if r['rung'] != 'pytorch']
        chosen, theirs = (next((r for r in seen if r['rung'] == n), None) for n in ('default', 'pytorch'))
        if not ours: continue
        best = min(ours, key=lambda r: r['us'])
        told = f"{chosen['us']:8.2f} us {chosen['share'] or 0:5.0%}" if chosen else ' ' * 17
        print(f"{key[0]:11} {key[1]:8} {key[2]:5} {told} | {best['us']:8.2f} us {best['share'] or 0:5.0%} "
              f"{best['tflops']:6.1f} TFLOP/s {best['rung']}" + (f" | {theirs['us']:.2f} us" if theirs else ''))


# --- compile first, with all processors

def compiled(arch: str, source: str) -> bytes | None:
    "In a process of its own."
    from tinygrad.runtime.support.compiler_cuda import NVRTCCompiler
    try: return NVRTCCompiler(arch).compile(source)
    except Exception: return None    # the race will say why


def sources(launches) -> set[str]:
    "What the launches would compile."
    found, real = set(), metal.check_compiles
    metal.check_compiles = lambda name, source, device: found.add(source)
    try:
        for call in launches:
            try: call()
            except Exception as why: print(f'    left out: {reason(why)}')
    finally: metal.check_compiles = real
    return found


def planned(args, real: bool):
    "Every launch of this run, lazily, with nothing in memory."
    @cache
    def like(name, K): return [(p.shape[1:], Tensor(p).dtype) for p in parts_of(name, 2, K, np.random.default_rng(0))]

    def one(name, T, N, K, use, add, sizes):
        w = Packed(format_of(name), (N, K), tuple(Tensor.empty(N, *shape, dtype=t) for shape, t in like(name, K)))
        x, more = (Tensor.empty(T, n, dtype='half') for n in (K, N))
        launch(x, w, use, Tensor.empty(K), more if add else None, **sizes)
    for name, T, N, K, use in cases(args.formats, args.checked, real):
        yield partial(one, name, T, N, K, use, use != 'gated', {})
    if args.check: return
    for name, what, T, some in races(args):
        (N, K, use), chained = MATRICES[what], wide(what)
        for sizes in [{}, *some]: yield partial(one, name, T, N, K, use if chained else 'add', not chained, sizes)


def compile_all(args, real: bool, pool) -> None:
    "Into tinygrad's cache on disk."
    compiler = Device[Device.DEFAULT].compiler
    texts = sources(planned(args, real))
    todo = [t for t in texts if compiler.cachekey and diskcache_get(compiler.cachekey, t) is None]
    for text, lib in zip(todo, pool.map(partial(compiled, compiler.arch), todo, chunksize=1)):
        if lib is not None: diskcache_put(compiler.cachekey, text, lib)
    print(f'{len(texts)} kernels, {len(todo)} compiled', flush=True)


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--formats', nargs='+', choices=FORMATS, help='default: all are checked, the first three raced')
    parser.add_argument('--tokens', nargs='+', type=int, choices=TOKENS, default=TOKENS[:5])
    parser.add_argument('--matrices', nargs='+', choices=list(MATRICES), default=list(MATRICES))
    parser.add_argument('--chosen', action='store_true', help='race only what the package chooses, and PyTorch')
    parser.add_argument('--check', action='store_true', help='no races')
    parser.add_argument('--no-check', action='store_true', help='races alone')
    parser.add_argument('--device', help='CUDA or METAL; default: the best there is')
    parser.add_argument('--minutes', type=float, default=3.7, help='start no race after this time; default 3.7')
    args = parser.parse_args(argv)
    args.raced = args.formats or FORMATS[:3]
    args.formats, args.checked = args.formats or FORMATS, () if args.no_check else CHECKED
    return args


def main(argv: list[str] | None = None) -> None:
    args, start = arguments(argv), time.monotonic()
    with Context(DEV=args.device.upper() if args.device else Device.DEFAULT):
        device = Device.DEFAULT
        real = not is_simulated(device)
        if not real: small(args)
        about = dict(device=device, machine=machine_name(device), median_of=ROUNDS, tinygrad=version('tinygrad'),
                     torch=torch and torch.__version__)
        print(f'{about["machine"]} ({device}), tinygrad {about["tinygrad"]}, torch {about["torch"]}', flush=True)
        if device.startswith('CUDA'):
            if torch: share_context()
            use_best_graph(device)
            with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), get_context('spawn')) as pool:
                compile_all(args, real, pool)
        print(f'{time.monotonic() - start:.0f} s', flush=True)
        wrong = checks(args.formats, args.checked, real, real and not args.chosen) if args.checked else []
        print(f'{time.monotonic() - start:.0f} s', flush=True)
        rows = [] if args.check else measure(args, about, start, OUT if real else None)
        verdict(rows)
        print(*wrong, sep='\n')
    sys.exit(bool(wrong))


def small(args) -> None:
    "A simulator's times say nothing: does all of it run?"
    global MATRICES, ROTATION
    MATRICES = dict(qkv=(64, 32, 'norm'), gate_up=(128, 32, 'gated'), down=(32, 64, 'add'))
    args.formats, args.raced, args.checked, ROTATION = args.formats[:3], args.raced[:2], (1, 3, 9), 2**13
    args.tokens, args.matrices = [t for t in args.tokens if t <= 32], list(MATRICES)


def measure(args, about: dict, start: float, out: Path | None) -> list[dict]:
    "Race after race, rows as they come."
    n = FULL.copied if out else 2**12
    copy = max(4 * n / s for s, _ in race(copies(FULL, n)).values())
    forget()
    rows, kept = [], (None, None)
    for name, what, T, some in races(args):
        if time.monotonic() - start > 60 * args.minutes:
            print(f'  {name} {what} {T}: out of time', flush=True)
            continue
        if kept[0] != (name, what): kept = (name, what), data(name, *MATRICES[what][:2])
        try: found = race(contestants(name, what, T, kept[1], some))
        except Exception as why:    # no memory for the data
            print(f'  {name} {what} {T}: skipped: {reason(why)}', flush=True)
            continue
        forget()
        new = [row | about for row in rows_of(name, what, T, found, copy, sum(p.nbytes() for p in kept[1][0].parts))]
        for r in sorted(new, key=lambda r: r['us']):
            print(f"{time.monotonic() - start:4.0f} s {name} {what} {T}: {r['us']:8.2f} us {r['gbps']:7.1f} GB/s "
                  f"{r['tflops']:6.1f} TFLOP/s {r['rung']}", flush=True)
        for row in new if out else ():
            write_row(out, row)
        rows += new
    return rows


if __name__ == '__main__':
    main()
