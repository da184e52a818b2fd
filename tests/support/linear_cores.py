"""NVIDIA's tensor cores for the matrix kernels, simulated: their CUDA text runs without a GPU.

What flash attention's text reaches assembly through is in `support.tensor_cores`. Here are the other words of these
texts. Copies happen when a group is waited for, and no earlier.
"""
import re
from types import SimpleNamespace

import numpy as np
from support.tensor_cores import SIMULATED_PTX
from tinygrad import Tensor

from tinyvllm.kernels.linear_gpu import kernel_of
from tinyvllm.kernels.linear_stream import TENSOR
from tinyvllm.kernels.metal import Kernel

ATTRIBUTES = ''', uint2 group [[threadgroup_position_in_grid]],
    uint lane_ [[thread_index_in_simdgroup]], uint simd_ [[simdgroup_index_in_threadgroup]]) {
  const int lane = lane_, simd = simd_, me = simd * 32 + lane;
'''
COPIES = '''
struct Copy { threadgroup half* to; device const half* from; bool real; int group; };
static Copy waiting[256][256];
static int number[256], done[256], groups[256];
MSL_NOHOOK __attribute__((noinline)) static void fetch(threadgroup half* to, device const half* from, bool real) {
  const int i = msl_cur->index;
  waiting[i][number[i]++ % 256] = Copy{to, from, real, groups[i]};
}
MSL_NOHOOK __attribute__((noinline)) static void commit() { groups[msl_cur->index]++; }
MSL_NOHOOK __attribute__((noinline)) static bool next(thread Copy* copy, int pending) {
  const int i = msl_cur->index;
  if (done[i] == number[i] || waiting[i][done[i] % 256].group >= groups[i] - pending) return false;
  *copy = waiting[i][done[i]++ % 256];
  return true;
}
inlined void finish(int pending) {
  Copy copy;
  while (next(&copy, pending))
    for (int c = 0; c < 8; c++) copy.to[c] = copy.real ? copy.from[c] : half(0.0f);
}
#define arrived() finish(STAGES - 2); threadgroup_barrier(mem_flags::mem_threadgroup)
'''
SIMULATED_WORDS = '''
inlined float value(float x) { return x; }
inlined float value(half x) { return x; }
inlined half rounded(float x) { return half(x); }
inlined float lower(uint x) { return as_type<half2>(x)[0]; }
inlined float upper(uint x) { return as_type<half2>(x)[1]; }
inlined uint bits(half x) { return as_type<ushort>(x); }
inlined uint twice(float x) { return pair(x, x); }
inlined uint minus(uint a, uint b) { return as_type<uint>(as_type<half2>(a) - as_type<half2>(b)); }
inlined uint times(uint a, uint b) { return as_type<uint>(as_type<half2>(a) * as_type<half2>(b)); }
inlined uint times_plus(uint a, uint b, uint c) {                // rounds once
  const float2 x = float2(as_type<half2>(a)), y = float2(as_type<half2>(b)), z = float2(as_type<half2>(c));
  return as_type<uint>(half2(x * y + z));
}
inlined uint mixed(uint a, uint b, uint order) {
  const ulong both = (ulong)b << 32 | a;
  uint x = 0;
  for (int i = 0; i < 4; i++) x |= (uint)(both >> (order >> 4 * i & 7) * 8 & 255) << 8 * i;
  return x;
}
inlined uint masked(uint a, uint mask, uint base) { return (a & mask) | base; }
inlined uint4 load(device const void* p) { return *(device const uint4*)p; }
inlined uint4 stream(device const void* p) { return *(device const uint4*)p; }
template <class P> inlined void load(thread float* x, device const P* p) {
  for (int i = 0; i < 8; i++) x[i] = p[i];
}
inlined float root(float x) { return rsqrt(x); }
inlined float silu(float x) { return x / (1.0f + exp(-x)); }
inlined void meet() { threadgroup_barrier(mem_flags::mem_threadgroup); }
'''


def entry(match: re.Match) -> str:
    "Metal's words for where the kernel begins."
    parameters = re.sub(r'(const )?(\w+\*)', r'device \1\2', match[2])
    return f'kernel void {match[1]}({parameters}{ATTRIBUTES}  const int block = group.x, turn = group.y;\n'


def simulate(rung: str, text: str = '', **variant) -> Kernel:
    "The CUDA text of a rung as a kernel for the simulator: other words for memory, for the entry and for assembly."
    body = text or kernel_of(rung, **variant).cuda
    body = body[len(TENSOR):]
    body = re.sub(r'\ninlined void arrived\(\).*?\}\n', '\n', body, flags=re.S)
    body, entries = re.subn(r'extern "C".*?(linear_\w+)\((.*?)\) \{.*?int block = blockIdx.x, turn = blockIdx.y;\n',
                            entry, body, flags=re.S)
    assert entries == 1
    body = body.replace('__shared__ __align__(16)', 'alignas(16) threadgroup').replace('__shared__', 'threadgroup')
    body = body.replace('__align__(16)', 'alignas(16)')
    start, end = SIMULATED_PTX.index('struct Copy'), SIMULATED_PTX.index('inlined float power')
    return Kernel(SIMULATED_PTX[:start] + COPIES + SIMULATED_PTX[end:] + SIMULATED_WORDS + body)


# --- matrices in every format, in numpy

FORMATS = {    # bits, group, scales
    'f32': (32, 0, 'none'), 'f16': (16, 0, 'none'), 'int8': (8, 0, 'scale'), 'int8-g32': (8, 32, 'scale'),
    'int8-g64': (8, 64, 'scale'), 'int4-g32': (4, 32, 'scale'), 'int4-g64': (4, 64, 'scale'),
    'int4-g32-zp': (4, 32, 'zero'), 'q4_1': (4, 32, 'min'), 'q4_k': (4, 32, 'q4_k'), 'q6_k': (6, 16, 'q6_k')}


def multiple(name: str) -> int:
    "A row has a multiple of so many weights."
    bits, group, scales = FORMATS[name]
    return 256 if '_k' in scales else max(group, 32) if bits < 16 else 8


def nibbles(q: np.ndarray) -> np.ndarray:
    "Two codes to a byte: weights i and i + 16 of each 32."
    groups = q.astype(np.uint8).reshape(len(q), -1, 32)
    return (groups[:, :, :16] | groups[:, :, 16:] << 4).reshape(len(q), -1)


def numbers(rng: np.random.Generator, name: str, N: int, K: int) -> tuple[list[np.ndarray], np.ndarray]:
    "Random parts of a matrix in this format, and the weights that they mean in float64."
    bits, group, scales = FORMATS[name]
    group = group or K

    def halves(*shape, scale=0.1): return (rng.standard_normal(shape) * scale).astype(np.float16)
    def each(x, n=group): return np.repeat(np.asarray(x, np.float64), n, axis=1)
    if bits >= 16:
        w = (rng.standard_normal((N, K)) / 2).astype(np.float16 if bits == 16 else np.float32)
        return [w], w.astype(np.float64)
    d, q = halves(N, K // group, scale=0.01 if bits == 8 else 0.1), rng.integers(0, 16, (N, K))
    if bits == 8:
        q = rng.integers(-128, 128, (N, K)).astype(np.int8)
        return [q, d], q * each(d)
    if scales == 'scale': return [nibbles(q), d], (q - 8) * each(d)
    if scales == 'zero':
        z = rng.integers(0, 17, d.shape).astype(np.uint8)
        return [nibbles(q), d, z], (q - each(z)) * each(d)
    if scales == 'min':
        m = halves(N, K // 32)
        return [nibbles(q), np.stack([d, m], -1)], q * each(d) + each(m)
    if scales == 'q4_k':
        supers, s = halves(N, K // 256, 2, scale=0.005), rng.integers(0, 64, (N, K // 32, 2)).astype(np.uint8)
        a, b = (each(supers[..., i], 8) * s[..., i] for i in range(2))
        return [nibbles(q), supers, s], q * each(a, 32) - each(b, 32)
    q, d, s = (rng.integers(0, 64, (N, K)), halves(N, K // 256, scale=5e-4),
               rng.integers(-128, 128, (N, K // 16)).astype(np.int8))
    two = (q >> 4).astype(np.uint8).reshape(N, K // 32, 4, 8)
    high = np.bitwise_or.reduce(two << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=2).reshape(N, K // 4)
    return [nibbles(q & 15), high, d, s], (q - 32) * each(each(d, 16) * s, 16)


def packed(name: str, N: int, K: int, parts: tuple[Tensor, ...]) -> SimpleNamespace:
    "What the launchers want to know of a packed matrix."
    bits, group, scales = FORMATS[name]
    return SimpleNamespace(format=SimpleNamespace(name=name, bits=bits, group=group, scales=scales), shape=(N, K),
                           parts=parts, device=parts[0].device)
