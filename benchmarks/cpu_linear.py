"""Products of every format on one core: how much of the memory bandwidth for one token, how many GFLOPS for many?

    python benchmarks/cpu_linear.py             # prints rows and adds them to benchmarks/results/cpu_linear.jsonl
    python benchmarks/cpu_linear.py matrix      # some of: matrix, decode (its rows for one token), large

`matrix` are SmolLM2's, `large` one of a 1.1B model's. A `token` row is all that SmolLM2 multiplies in one step: 30 times
four kernels and the head (8 bits where the rest has 4; in a prompt of 512 the head serves one token). The kernels are
compiled as tinygrad compiles them and called one by one, so launches do not count; several copies of the weights, 128 MB
together, keep them out of the cache. Formats run in turn, with a read of memory by one thread between them. Time is that
of the thread, so what others take of the core does not count, and of all calls the fastest twentieth's slowest does.
"""
import ctypes
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

os.environ['DEV'] = 'CPU'
import tinyvllm  # noqa: F401  picks the compiler before tinygrad looks
import numpy as np
from common import RESULTS, write_row
from tinygrad import Tensor, dtypes
from tinyvllm.kernels import rows_cpu as module
from tinyvllm.kernels.linear_cpu import cpu_linear, cpu_swiglu
from tinyvllm.device import compiler_name
from tinyvllm.measure import machine_name
from tinyvllm.kernels.metal import Kernel
from tinyvllm.quant.pack import Packed
from tinyvllm.quant.formats import format_of

OUT = RESULTS / 'cpu_linear.jsonl'
TOTAL, SLICE = 2**27, 2**22        # bytes: all copies of a case, and what is timed at once of memory
# name: rows, columns, what is done besides, and how often in a token
MATRICES = {'qkv': (960, 576, 'norm', 30), 'o': (576, 576, 'add', 30), 'gate and up': (3072, 576, 'norm swiglu', 30),
            'down': (576, 1536, 'add', 30), 'head': (49152, 576, 'norm', 1)}
FORMATS = ['f32', 'f16', 'int8-g32', 'q4_1', 'int4-g32']
TOKENS = [1, 2, 4, 8, 16, 32, 512]
TYPES = {'f4': dtypes.float, 'f2': dtypes.half, 'i1': dtypes.int8, 'u1': dtypes.uint8}
PEAK = Kernel(c=module.VECTORS + module.C_WORDS + '''
WIDE kernel void peak(device float* y, device const float* x) {
  vec sum[12], a = (vec)x[1], all = (vec)0;
  UNROLLED for (int i = 0; i < 12; i++) sum[i] = (vec)x[0];
  for (int n = 0; n < 100000; n++) UNROLLED for (int i = 0; i < 12; i++) sum[i] = sum[i] * a + a;
  UNROLLED for (int i = 0; i < 12; i++) all += sum[i];
  y[0] = all[0] == 1.25f ? 0 : LANES;     // never: so that the sums are used
}''')
FLAGS = '-shared -x c -O2 -fPIC -ffreestanding -fno-math-errno -nostdlib'.split()


def layout(name: str, N: int, K: int) -> list[tuple[tuple[int, ...], str]]:
    "Shapes and types of a matrix's parts (quant.formats)."
    f = format_of(name)
    groups = K // (f.group or K)
    if f.scales == 'none':
        return [((N, K), f'f{f.bits // 8}')]
    if f.bits == 8:
        return [((N, K), 'i1'), ((N, groups), 'f2')]
    rest = {'scale': [((N, groups), 'f2')], 'min': [((N, groups, 2), 'f2')],
            'zero': [((N, groups), 'f2'), ((N, groups), 'u1')], 'q4_k': [((N, K // 256, 2), 'f2'), ((N, groups, 2), 'u1')],
            'q6_k': [((N, K // 4), 'u1'), ((N, K // 256), 'f2'), ((N, groups), 'i1')]}[f.scales]
    return [((N, K // 2), 'u1'), *rest]


def aligned(shape: tuple[int, ...], kind: str, fill: bool = True) -> np.ndarray:
    "An array that begins at a multiple of 64 bytes, as tinygrad's do: random bytes, floats between 0 and 0.01."
    rng, size = np.random.default_rng(0), int(np.prod(shape)) * np.dtype(kind).itemsize
    room = np.empty(size + 64, np.uint8)
    a = room[-room.ctypes.data % 64:][:size].view(kind).reshape(shape)
    a[...] = rng.random(shape, np.float32) * 0.01 if kind[0] == 'f' else np.frombuffer(rng.bytes(size), kind).reshape(shape)
    return a


def source(T: int, name: str, N: int, K: int, extras: str) -> tuple[str, str]:
    "A kernel's name and C, as the launcher would have it compiled."
    seen = []

    class Recorded(Kernel):
        def __call__(self, *tensors, ops=0, nbytes=None, **constants):
            seen.append((self.signature.name, self.source('CPU', 1, constants)))
            return tensors[0]
    parts = tuple(Tensor.empty(*shape, dtype=TYPES[kind]) for shape, kind in layout(name, N, K))
    w, x, norm = Packed(format_of(name), (N, K), parts), Tensor.empty(T, K), Tensor.empty(K) if 'norm' in extras else None
    module.compose_kernel.cache_clear()
    module.Kernel = Recorded
    try:
        if 'swiglu' in extras:
            cpu_swiglu(x, w, norm=norm, eps=1e-5)
        else:
            cpu_linear(x, w, norm=norm, eps=1e-5, add=Tensor.empty(T, N) if 'add' in extras else None)
    finally:
        module.Kernel = Kernel
        module.compose_kernel.cache_clear()
    return seen[0]


def compiled(name: str, text: str) -> Callable:
    "The kernel as a function of addresses."
    march = '-march=native' if platform.machine() == 'x86_64' else '-mcpu=native'
    with tempfile.TemporaryDirectory() as folder:
        path = f'{folder}/kernel.so'
        subprocess.run([os.environ.get('CC', 'clang'), *FLAGS, march, '-', '-o', path], input=text.encode(), check=True)
        return getattr(ctypes.CDLL(path), name)


def peak() -> float:
    "Operations per second, in billions, of a loop that only multiplies and adds in registers."
    loop, x, y, times = compiled('peak', PEAK.source('CPU', 1, {})), aligned((2,), 'f4'), aligned((1,), 'f4'), []
    for _ in range(50):
        before = time.thread_time()
        loop(*(ctypes.c_void_p(a.ctypes.data) for a in (y, x)))
        times.append(time.thread_time() - before)
    lanes = int(y[0])
    return 2 * 12 * 100_000 * lanes / 1e9 / min(times)


def calls(T: int, name: str, N: int, K: int, extras: str) -> list[Callable]:
    "One call for each copy of the weights."
    function = compiled(*source(T, name, N, K, extras))
    outputs = N // 2 if 'swiglu' in extras else N
    y, x = aligned((T, outputs), 'f4'), aligned((T, K), 'f4')
    more = [aligned((K,), 'f4')] * ('norm' in extras) + [aligned((T, N), 'f4')] * ('add' in extras)
    parts = [aligned(*part) for part in layout(name, N, K)]
    copies = 2 if T > 16 else max(2, TOTAL // sum(p.nbytes for p in parts))
    out = []
    for i in range(copies):
        arrays = [y, x, *(p if i == 0 else np.copyto(q := aligned(p.shape, p.dtype.str[1:]), p) or q for p in parts), *more]
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in arrays]
        out.append(lambda pointers=pointers, arrays=arrays: function(*pointers))
    return out


def seconds_of(ways: dict[str, list[Callable]], enough: float = 1.5, most: int = 400) -> dict[str, float]:
    "Thread time of one call of each way, taken in turn: the slowest of the fastest twentieth."
    times, start = {name: [] for name in ways}, time.perf_counter()
    while time.perf_counter() - start < enough * len(ways) and len(times['read']) < most * 64:
        for name, way in ways.items():
            for call in way[:64]:
                before = time.thread_time_ns()
                call()
                times[name].append((time.thread_time_ns() - before) / 1e9)
            way.append(way.pop(0)) if name == 'read' else way.extend([way.pop(0) for _ in range(min(64, len(way)))])
    return {name: sorted(t)[len(t) // 20] for name, t in times.items()}


def measured(memory: np.ndarray, T: int, N: int, K: int, extras: str, formats: list[str]) -> tuple[dict[str, float], float]:
    "Seconds of one product in each format, and bytes per second of a plain read meanwhile."
    ways = {name: calls(T, name, N, K, extras) for name in formats}
    ways['read'] = [part.max for part in np.array_split(memory, memory.nbytes // SLICE)]
    seconds = seconds_of(ways)
    return seconds, SLICE / seconds.pop('read')


def record(row: dict) -> None:
    print(*(row[k] for k in ('kernel', 'shape', 'tokens', 'format', 'us', 'gbps', 'share', 'gflops', 'tok_s', 'read_gbps')),
          flush=True)
    write_row(OUT, row)


def rated(kernel: str, shape: str, T: int, name: str, s: float, nbytes: int, ops: int, read: float, about: dict) -> dict:
    return dict(kernel=kernel, shape=shape, tokens=T, format=name, us=round(s * 1e6, 1), gbps=round(nbytes / s / 1e9, 2),
                share=round(nbytes / s / read, 3), gflops=round(ops / s / 1e9, 1), tok_s=round(T / s, 1),
                read_gbps=round(read / 1e9, 2), **about)


def one_token(found: dict, T: int, name: str) -> tuple[float, int, int]:
    "Seconds, bytes and operations of all products of a step."
    total = np.zeros(3)
    for kernel, (N, K, _, times) in MATRICES.items():
        kind = 'int8-g32' if kernel == 'head' and name in ('q4_1', 'int4-g32') else name
        tokens = 1 if kernel == 'head' and T > 32 else T
        total += times * np.array([found[kernel, tokens, kind], format_of(kind).nbytes((N, K)), 2 * tokens * N * K])
    return float(total[0]), int(total[1]), int(total[2])


def matrices(memory: np.ndarray, about: dict, many: list[int] = TOKENS) -> None:
    found, reads = {}, {T: [] for T in many}
    for kernel, (N, K, extras, _) in MATRICES.items():
        for T in many:
            if kernel == 'head' and T > 32:
                continue
            seconds, read = measured(memory, T, N, K, extras, FORMATS)
            reads[T].append(read)
            for name, s in seconds.items():
                found[kernel, T, name] = s
                record(rated(kernel, f'{N}x{K}', T, name, s, format_of(name).nbytes((N, K)), 2 * T * N * K, read, about))
    for T in many:
        for name in FORMATS:
            record(rated('token', 'SmolLM2-135M', T, name, *one_token(found, T, name), float(np.median(reads[T])), about))


def large(memory: np.ndarray, about: dict, N: int = 11264, K: int = 2048) -> None:
    for T in (1, 32, 512):
        formats = ['int8', 'int4-g128', 'int4-g128-zp', 'q4_k', 'q6_k']
        seconds, read = measured(memory, T, N, K, 'norm swiglu', formats)
        for name, s in seconds.items():
            record(rated('gate and up', f'{N}x{K}', T, name, s, format_of(name).nbytes((N, K)), 2 * T * N * K, read, about))


def main(names: list[str]) -> None:
    about = dict(machine=machine_name('CPU'), compiler=compiler_name(), tinygrad=version('tinygrad'), peak=round(peak(), 1))
    memory = np.zeros(2**27 // 4, np.float32) + 1
    for name in names or ['matrix', 'large']:
        dict(matrix=matrices, decode=partial(matrices, many=[1]), large=large)[name](memory, about)


if __name__ == '__main__':
    main(sys.argv[1:])
