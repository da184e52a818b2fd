"""NVIDIA's tensor cores for the matrix kernels, simulated: their CUDA text runs without a GPU.

What flash attention's text reaches assembly through is in `support.tensor_cores`. Here are the other words of these
texts. Copies happen when a group is waited for, and no earlier.
"""
import re

from support.tensor_cores import SIMULATED_PTX
from tinygrad import Tensor

from tinyvllm.cli.cases.products import FORMAT_NAMES, pack_parts, random_parts, step_of
from tinyvllm.kernels.linear_gpu import kernel_of
from tinyvllm.kernels.linear_stream import TENSOR
from tinyvllm.kernels.metal import Kernel
from tinyvllm.quant.formats import format_of
from tinyvllm.quant.pack import Packed

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


# --- matrices in every format, as `tinyvllm doctor` draws them

FORMATS = {name: (f.bits, f.group, f.scales) for name in FORMAT_NAMES if name != 'bf16' for f in [format_of(name)]}
numbers, multiple = random_parts, step_of


def packed(name: str, N: int, K: int, parts: tuple[Tensor, ...]) -> Packed:
    "A matrix of these parts."
    return pack_parts(name, list(parts), K)
