"""How fast are the kernels, beside tinygrad's own and PyTorch's?

    python benchmarks/kernels.py                   # on a GPU: rows to benchmarks/results/kernels.jsonl, then tables
    python benchmarks/kernels.py --only decode     # or matvec, flash
    python benchmarks/kernels.py --quick           # the shapes of the targets alone; about a minute
    python benchmarks/kernels.py --device CPU      # tiny shapes, nothing is kept: does it run?

What is timed is a chain: every launch reads what the one before it wrote, as in a model. A chain is recorded once
(TinyJit's graph, PyTorch's CUDA graph), then replayed, and a GPU's own clock gives the time of a launch. Weights,
keys and values are several, 256 MB together, so that no cache holds them. The contestants of a shape run in turn;
the median counts. Bytes are those that must be moved, each once; their share is that of a copy in the same run. The
share of prompts is that of PyTorch's flash attention.
"""
import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from math import ceil
from pathlib import Path
from statistics import median

import tinyvllm  # noqa: F401  picks device and compiler before tinygrad looks
from common import RESULTS, write_row
import numpy as np
from tinygrad import Device, Tensor, TinyJit
from tinygrad.engine.realize import graph_cache
from tinygrad.helpers import Context
from tinyvllm.kernels import flash
from tinyvllm.kernels.flash_cuda import FLASH_CUDA
from tinyvllm.kernels import simd
from tinyvllm.kernels import softmax
from tinyvllm.cli.doctor import is_simulated
from tinyvllm.kernels.cases import make_large_tensor
from tinyvllm.measure import counting, machine_name
from tinyvllm.kv_cache.paged import PagedBatch, paged_attend
from tinyvllm.engine.args import read_free_memory

try:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError:
    torch = None

OUT = RESULTS / 'kernels.jsonl'
BLOCK, ROUNDS = 16, 5      # slots of a block; times that each chain is timed
HEADS = [(32, 8), (32, 4)]


@dataclass(frozen=True)
class Sizes:
    "The shapes that are measured."
    matrices: tuple     # (N, K)
    steps: tuple        # (sequences, context, query heads, KV heads, head dim), the most wanted first
    prompts: tuple      # (tokens, query heads, KV heads, head dim)
    rotation: int       # bytes that no cache holds
    copied: int         # numbers in the buffer that is copied
    portable: int = 2048   # longest prompt for portable attention: its scores are the square of it


STEPS = [(32, 4096), (128, 4096), (32, 1024), (1, 16384), (1, 4096), (1, 1024), (128, 1024), (32, 16384), (128, 16384)]
FULL = Sizes(((2048, 2048), (5632, 2048), (32000, 2048)),
             tuple((*step, *heads, dim) for step in STEPS for heads in HEADS for dim in (128, 64)),
             tuple((tokens, 32, 8, dim) for tokens in (2048, 8192, 512) for dim in (64, 128)), 2**28, 2**29)
QUICK = Sizes(FULL.matrices, FULL.steps[:4], FULL.prompts[:2], 2**28, 2**29)
TINY = Sizes(((64, 64), (96, 64)), ((2, 32, 4, 2, 64), (1, 48, 4, 1, 128)), ((24, 4, 2, 64),), 2**15, 2**12)


def share_context() -> None:
    "Let tinygrad use the CUDA context that PyTorch uses, not one of its own: no switches, and one clock for both."
    from tinygrad.runtime.autogen import cuda
    cuda.cuCtxCreate_v2 = lambda context, flags, device: cuda.cuDevicePrimaryCtxRetain(context, device)


class Chain:
    "Launches of tinygrad's, each waiting for the one before."

    def __init__(self,
        step: Callable[[int, Tensor], Tensor], # which launch, and what the one before it wrote
        first: Tensor, # what the first one reads
        launches: int, # how many
    ):
        def chain() -> Tensor:
            x = first
            for i in range(launches): x = step(i, x).realize()
            return x
        self.launches, self.answer, self.jit = launches, step(0, first).numpy(), TinyJit(chain)
        with Context(JIT_BATCH_SIZE=0):    # all in one graph
            for _ in range(2): self.jit()
        with counting() as counts: self.jit()
        graphs = [graph_cache.get(call.src[0]) for call in self.jit.captured.linear.src]
        self.replay = self.jit if None in graphs else lambda: [graph((), {}) for graph in graphs]
        kernels = counts.kernels if None in graphs else sum(len(graph.calls) for graph in graphs)
        self.kernels = kernels / launches

    def seconds(self, replays: int) -> float:
        "Seconds of one launch."
        device = Device[Device.DEFAULT]
        device.synchronize()
        if Device.DEFAULT.startswith('CUDA'):
            from tinygrad.runtime.ops_cuda import cu_time_execution, cuda
            cuda.cuCtxSetCurrent(device.context)
            return cu_time_execution(lambda: [self.replay() for _ in range(replays)], True) / replays / self.launches
        start = time.perf_counter()
        for _ in range(replays): self.replay()
        device.synchronize()
        return (time.perf_counter() - start) / replays / self.launches

    def free(self) -> None:
        "Free the memory that the recording holds."
        self.jit.captured.free_intermediates()


class TorchChain:
    "The same for PyTorch: a CUDA graph, or a plain loop."
    answer = kernels = None    # it has data of its own

    def __init__(self,
        step: Callable, # as for `Chain`
        first, # what the first one reads
        launches: int, # how many
        record: bool = True, # cuDNN's attention is not safe to record
    ):
        def chain():
            x = first
            for i in range(launches): x = step(i, x)
        self.launches, self.replay, self.timed = launches, chain, first.is_cuda
        self.chain = chain    # what is recorded reads its data by address: keep them
        if first.is_cuda and record:
            side = torch.cuda.Stream()    # warm up beside, as its manual asks
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for i in range(min(launches, 2)): step(i, first)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            gc.disable()    # nothing else may reach the driver meanwhile
            try:
                with torch.cuda.graph(self.graph): chain()
            finally: gc.enable()
            self.replay = self.graph.replay

    def seconds(self, replays: int) -> float:
        "Seconds of one launch."
        if not self.timed:
            start = time.perf_counter()
            for _ in range(replays): self.replay()
            return (time.perf_counter() - start) / replays / self.launches
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(replays): self.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / replays / self.launches

    def free(self) -> None:
        "Nothing is shared; dropping it is enough."


def torch_device() -> str:
    "Return PyTorch's name for the default device; raises `RuntimeError` if there is none."
    kind = {'CUDA': 'cuda', 'CPU': 'cpu'}.get(Device.DEFAULT.split(':')[0])
    if torch is None or not kind or kind == 'cuda' and not torch.cuda.is_available():
        raise RuntimeError(f'no PyTorch for {Device.DEFAULT}')
    return kind


def random(*shape: int):
    "Draw normal numbers with PyTorch, on its device."
    return torch.randn(*shape, dtype=torch.float16, device=torch_device())


def reason(error: Exception) -> str:
    "Return the last line of an error's message."
    return (str(error).strip() or type(error).__name__).splitlines()[-1][:120]


def built(contestants: dict[str, Callable]) -> dict[str, Chain | TorchChain]:
    "Record the chains. One that fails, or whose result differs from the first, is left out with the reason."
    chains, leader = {}, None
    for name, build in contestants.items():
        try:
            chain = build()
            chain.seconds(1)
            if chain.answer is not None:
                leader = chain.answer if leader is None else leader
                error = np.abs(chain.answer - leader).max() / np.abs(leader).max()
                if not error < 1e-2: raise ArithmeticError(f'its result is off by {error:.2g}')
            chains[name] = chain
        except Exception as error:    # of compilers, drivers, memory: the others still run
            print(f'    {name}: skipped: {reason(error)}', flush=True)
    return chains


def race(contestants: dict[str, Callable]) -> dict[str, tuple[float, float | None]]:
    "Seconds of a launch and kernels in it, by name."
    chains, times = built(contestants), {}
    for _ in range(ROUNDS):
        for name, chain in list(chains.items()):
            try:
                once = chain.seconds(1) * chain.launches    # warm again, after the others
                times.setdefault(name, []).append(chain.seconds(max(1, min(50, ceil(3e-3 / once)))))
            except Exception as error:
                print(f'    {name}: dropped: {reason(error)}', flush=True)
                chains.pop(name)
    for chain in chains.values(): chain.free()
    return {name: (median(times[name]), chain.kernels) for name, chain in chains.items()}


def forget() -> None:
    "Give freed memory back to the device: two frameworks share it."
    gc.collect()
    if hasattr(allocator := Device[Device.DEFAULT].allocator, 'free_cache'): allocator.free_cache()
    if torch and torch.cuda.is_available(): torch.cuda.empty_cache()


def turns(nbytes: int, rotation: int) -> tuple[int, int]:
    "Sets of data, and launches of a chain, a multiple of them: a set is out of the cache when it comes again."
    sets = ceil(rotation / nbytes)
    return sets, sets * ceil(8 / sets)


def copies(sizes: Sizes, n: int) -> dict[str, Callable]:
    "How fast the device reads and writes at the same time."
    def ours():
        return Chain(lambda i, x: x + 1, make_large_tensor((n,), 'float16'), 8)

    def theirs():
        buffers = [random(n) for _ in range(2)]
        return TorchChain(lambda i, x: buffers[(i + 1) % 2].copy_(x), buffers[0], 8)
    return dict(tinygrad=ours, pytorch=theirs)


def products(sizes: Sizes, N: int, K: int) -> dict[str, Callable]:
    "A matrix and a vector; of a longer answer the next matrix takes the beginning."
    rungs = dict(naive=simd.MATVEC_NAIVE, coalesced=simd.MATVEC_COALESCED, vector=simd.MATVEC_VECTOR,
                 rows=simd.MATVEC_ROWS)
    sets, launches = turns(2 * N * K, sizes.rotation)
    ws, first = [make_large_tensor((N, K), 'float16', K**-0.5) for _ in range(sets)], make_large_tensor((K,), 'float16')

    def ours(rung):
        return lambda: Chain(lambda i, x: simd.matvec(ws[i % sets], x[:K], rung=rung), first, launches)

    def theirs():
        ws = [random(N, K) * K**-0.5 for _ in range(sets)]
        return TorchChain(lambda i, x: torch.matmul(ws[i % sets], x[:K]), random(K), launches)
    generated = {    # the same product, written in two ways: tinygrad cuts their loops differently
        'tinygrad': lambda i, x: x[:K].reshape(1, K).linear(ws[i % sets].T).reshape(N),
        'tinygrad w @ x': lambda i, x: ws[i % sets] @ x[:K]}
    return {**{name: partial(Chain, step, first, launches) for name, step in generated.items()},
            **{name: ours(rung) for name, rung in rungs.items()}, 'pytorch': theirs}


def paged(sets: int, seqs: int, context: int, K: int, D: int) -> tuple:
    "Make pools, and tables whose blocks lie anywhere in them; block 0 is in no table."
    blocks = ceil(context / BLOCK)
    total = ceil((sets * seqs * blocks + 1) / 256) * 256
    order = 1 + np.random.default_rng(0).permutation(total - 1)[:sets * seqs * blocks].astype(np.int32)
    tables = [Tensor(part).realize() for part in order.reshape(sets, seqs, blocks)]
    return *(make_large_tensor((total, BLOCK, K, D), 'float16') for _ in 'kv'), tables


def ints(*arrays) -> list[Tensor]:
    "Positions and the like."
    return [Tensor(np.asarray(x, np.int32)).realize() for x in arrays]


def portable(k, v, tables: list, owners, positions, first: Tensor, launches: int) -> Callable:
    "tinygrad's own kernels of the portable attention, several to a launch."
    def build():
        batches = [PagedBatch(None, positions, None, tables=t, owners=owners) for t in tables]
        for batch in batches: batch.token_tables.realize()
        with Context(SPLIT_REDUCEOP=0):
            return Chain(lambda i, q: paged_attend(q, k, v, batches[i % len(batches)]), first, launches)
    return build


def steps(sizes: Sizes, seqs: int, context: int, H: int, K: int, D: int) -> dict[str, Callable]:
    "Attention of one new token a sequence."
    sets, launches = turns(4 * seqs * context * K * D, sizes.rotation)
    k, v, tables = paged(sets, seqs, context, K, D)
    owners, positions = ints(np.arange(seqs), np.full(seqs, context - 1))
    first = make_large_tensor((seqs, H, D), 'float16')

    def ours(attend):
        return lambda: Chain(lambda i, q: attend(q, k, v, tables[i % sets], owners, positions), first, launches)

    def theirs():
        ks, vs = ([random(seqs, K, context, D) for _ in range(sets)] for _ in 'kv')
        return TorchChain(lambda i, q: F.scaled_dot_product_attention(q, ks[i % sets], vs[i % sets], enable_gqa=True),
                          random(seqs, H, 1, D), launches)
    contestants = dict(decode_simple=ours(simd.decode_simple), decode=ours(softmax.decode),
                       decode_split=ours(softmax.decode_split), pytorch=theirs)
    if seqs <= 32 and context <= 4096:    # of 32 sets at most: recording takes long
        contestants['tinygrad'] = portable(k, v, tables[:32], owners, positions, first, min(launches, 32))
    return contestants


def prompts(sizes: Sizes, T: int, H: int, K: int, D: int) -> dict[str, Callable]:
    "Attention of a whole prompt, causal."
    k, v, tables = paged(1, 1, T, K, D)
    owners, positions, starts = ints(np.zeros(T), np.arange(T), [0, T])
    first, launches = make_large_tensor((T, H, D), 'float16'), max(4, min(32, 2**16 // T))
    step_tensors = tables[0], owners, positions, starts

    def ours(rung):
        return lambda: Chain(lambda i, q: flash.flash(q, k, v, *step_tensors, rung=rung), first, launches)

    def theirs():
        ks, vs = random(1, K, T, D), random(1, K, T, D)
        def step(i, q): return F.scaled_dot_product_attention(q, ks, vs, is_causal=True, enable_gqa=True)
        if torch_device() == 'cpu': return TorchChain(step, random(1, H, T, D), launches)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION): return TorchChain(step, random(1, H, T, D), launches)

    def fastest():
        ks, vs = (random(1, K, T, D).repeat_interleave(H // K, 1) for _ in 'kv')    # not counted
        def step(i, q): return F.scaled_dot_product_attention(q, ks, vs, is_causal=True)
        return TorchChain(step, random(1, H, T, D), launches)

    def generated():
        q, (ks, vs) = make_large_tensor((1, H, T, D), 'float16'), (make_large_tensor((1, K, T, D), 'float16') for _ in 'kv')
        chain = Chain(lambda i, q: q.scaled_dot_product_attention(ks, vs, is_causal=True, enable_gqa=True), q, 4)
        chain.answer = None    # to other keys
        return chain
    contestants = {'matrix': ours(FLASH_CUDA if Device.DEFAULT.startswith('CUDA') else flash.FLASH_MATRIX), 'tiled': ours(flash.FLASH_TILED), 'pytorch': theirs,
                   'pytorch own choice': fastest}
    if T <= sizes.portable:
        contestants |= {'tinygrad': portable(k, v, tables, owners, positions, first, 2), 'tinygrad sdpa': generated}
    return contestants


@dataclass(frozen=True)
class Shape:
    "What a race is about."
    kernel: str                 # the row's name of it
    name: str
    nbytes: int                 # that a launch must move
    flops: int                  # that it must compute
    contestants: Callable[[], dict[str, Callable]]    # by name, functions that build a chain


def shapes(sizes: Sizes):
    "All of them, in the order in which they are raced."
    yield Shape('copy', str(sizes.copied), 4 * sizes.copied, 0, partial(copies, sizes, sizes.copied))
    for N, K in sizes.matrices:
        yield Shape('matvec', f'{N}x{K}', 2 * (N * K + N + K), 2 * N * K, partial(products, sizes, N, K))
    for T, H, K, D in sizes.prompts:
        yield Shape('flash', f'{T} x {H}/{K} x {D}', 4 * T * (H + K) * D, 2 * T * (T + 1) * H * D,
                    partial(prompts, sizes, T, H, K, D))
    for seqs, context, H, K, D in sizes.steps:
        yield Shape('decode', f'{seqs} x {context} x {H}/{K} x {D}', 4 * seqs * (context * K + H) * D,
                    4 * seqs * context * H * D, partial(steps, sizes, seqs, context, H, K, D))


KERNELS = ('matvec', 'flash', 'decode')


def rows_of(shape: Shape, found: dict[str, tuple[float, float | None]], copy: float) -> list[dict]:
    "What is known of one shape, a row for each contestant."
    theirs, rows = found.get('pytorch', (None,))[0], []
    for rung, (s, kernels) in found.items():
        share = theirs and theirs / s if shape.kernel == 'flash' else copy and shape.nbytes / s / copy
        rows.append(dict(kernel=shape.kernel, rung=rung, shape=shape.name, dtype='half', kernels=kernels,
                         us=round(s * 1e6, 2), gbps=round(shape.nbytes / s / 1e9, 1),
                         tflops=round(shape.flops / s / 1e12, 2) if shape.flops else None,
                         share=round(share, 3) if share else None,
                         share_of='PyTorch' if shape.kernel == 'flash' else 'copy'))
    return rows


def measure(sizes: Sizes, only: list[str], deadline: float):
    "Rows, shape by shape; what does not fit into time or memory is named."
    copy, room = 0.0, 0.8 * read_free_memory(Device.DEFAULT)
    for shape in shapes(sizes):
        if shape.kernel not in ('copy', *only): continue
        late, large = time.monotonic() > deadline, 2 * shape.nbytes > room
        if late or large:
            print(f'  {shape.kernel} {shape.name}: skipped: {"out of time" if late else "too large"}', flush=True)
            continue
        try: found = race(shape.contestants())
        except Exception as error:    # no memory for the data
            print(f'  {shape.kernel} {shape.name}: skipped: {reason(error)}', flush=True)
            continue
        finally: forget()
        if shape.kernel == 'copy': copy = max((shape.nbytes / s for s, _ in found.values()), default=0.0)
        yield from rows_of(shape, found, copy)


def newest(rows: list[dict]) -> list[dict]:
    "The last row of each kernel, shape, rung and machine, in the order of the first."
    return list({(r['kernel'], r['shape'], r['rung'], r['machine']): r for r in rows}.values())


def markdown(rows: list[dict], kernel: str) -> str:
    "Shapes down, contestants across: µs, what that is in GB/s or TFLOP/s, and its share."
    rows = [r for r in newest(rows) if r['kernel'] == kernel and r.get('us')]
    if not rows: return f'No rows of {kernel} yet.'
    shapes, rungs = (list(dict.fromkeys(r[key] for r in rows)) for key in ('shape', 'rung'))
    cells = {(r['shape'], r['rung']): r for r in rows}

    def cell(r: dict | None) -> str:
        if r is None: return ''
        speed = f"{r['tflops']:.0f} TFLOP/s" if kernel == 'flash' else f"{r['gbps']:.0f} GB/s"
        return f"{r['us']:.1f} µs, {speed}" + (f", {r['share']:.0%}" if r['share'] is not None else '')
    what = {'flash': "PyTorch's flash attention", 'copy': 'the faster copy'}.get(kernel, 'the copy bandwidth')
    lines = [f'{kernel} on {", ".join(dict.fromkeys(r["machine"] for r in rows))}; shares are of {what}.', '',
             f'| shape | {" | ".join(rungs)} |', f'| --- |{" ---: |" * len(rungs)}']
    return '\n'.join(lines + [f'| {s} | {" | ".join(cell(cells.get((s, rung))) for rung in rungs)} |' for s in shapes])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', choices=KERNELS, default=KERNELS)
    parser.add_argument('--quick', action='store_true', help='the shapes of the targets alone')
    parser.add_argument('--device', help='CUDA, METAL, CPU; default: the best there is')
    parser.add_argument('--minutes', type=float, default=6, help='start no shape after this time; default 6')
    parser.add_argument('--out', type=Path, help='rows go here; default: the results, on a GPU')
    args, start = parser.parse_args(argv), time.monotonic()
    with Context(DEV=args.device.upper() if args.device else Device.DEFAULT):
        device = Device.DEFAULT
        if device.startswith('CUDA') and torch: share_context()
        real = not is_simulated(device) and device.split(':')[0] in ('CUDA', 'METAL')
        sizes, out = (QUICK if args.quick else FULL) if real else TINY, args.out or (OUT if real else None)
        about = dict(device=device, machine=machine_name(device), median_of=ROUNDS, tinygrad=version('tinygrad'),
                     torch=torch and torch.__version__)
        print(f'{about["machine"]} ({device}), tinygrad {about["tinygrad"]}, torch {about["torch"]}', flush=True)
        rows = []
        for row in measure(sizes, args.only, start + 60 * args.minutes):
            rows.append(row | about)
            print(f"{time.monotonic() - start:5.0f} s  {row['kernel']} {row['shape']} {row['rung']}: {row['us']} us, "
                  f"{row['gbps']} GB/s, {row['tflops'] or 0} TFLOP/s, {row['share']} of {row['share_of']}", flush=True)
            if out:
                write_row(out, rows[-1])
        for kernel in ('copy', *args.only): print('\n' + markdown(rows, kernel))


if __name__ == '__main__':
    main()
