"""CUDA's tensor cores in the Metal simulator: the CUDA text of flash attention runs without a GPU.

The functions of `ptx.h` are written here with shuffles, after the layouts that the PTX manual documents. Copies by
`fetch` happen when `fetched` waits for them, and no earlier.
"""
import re

from tinyvllm.kernels.flash import FLASH_MATRIX, TILE
from tinyvllm.kernels.flash_cuda import FLASH_CUDA_TEXT
from tinyvllm.kernels.metal import PTX, Kernel

SIMULATED_PTX = '''
#define fmaxf max
struct Copy { threadgroup half* to; device const half* from; bool real; };
static Copy waiting[256][64];
static int number[256];
MSL_NOHOOK __attribute__((noinline)) static void fetch(threadgroup half* to, device const half* from, bool real) {
  const int i = msl_cur->index;
  if (number[i] < 64) waiting[i][number[i]++] = Copy{to, from, real};
}
MSL_NOHOOK __attribute__((noinline)) static bool next(thread Copy* copy) {
  const int i = msl_cur->index;
  if (number[i] == 0) return false;
  *copy = waiting[i][--number[i]];
  return true;
}
inlined void fetched() {
  Copy copy;
  while (next(&copy))
    for (int c = 0; c < 8; c++) copy.to[c] = copy.real ? copy.from[c] : half(0.0f);
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
inlined float power(float x) { return exp2(x); }
inlined float across(float x, int mask) { return simd_shuffle_xor(x, mask); }
inlined uint pair(float low, float high) { return as_type<uint>(half2(low, high)); }
inlined void load8x8(thread uint* x, threadgroup const half* p) {
  const int lane = msl_cur->lane;
  for (int i = 0; i < 4; i++)
    x[i] = *(threadgroup const uint*)(simd_shuffle((ulong)p, i * 8 + lane / 4) + lane % 4 * 4);
}
inlined void load8x8_transposed(thread uint* x, threadgroup const half* p) {
  const int lane = msl_cur->lane;
  for (int i = 0; i < 4; i++) {
    half2 two;
    for (int e = 0; e < 2; e++)
      two[e] = ((threadgroup const half*)simd_shuffle((ulong)p, i * 8 + lane % 4 * 2 + e))[lane / 4];
    x[i] = as_type<uint>(two);
  }
}
inlined void multiply(thread float* c, thread const uint* a, uint b0, uint b1) {
  const int lane = msl_cur->lane;
  for (int k = 0; k < 16; k += 2) {
    const int from = lane / 4 * 4 + k % 8 / 2;
    const half2 upper = as_type<half2>(simd_shuffle(a[k / 8 * 2], from));
    const half2 lower = as_type<half2>(simd_shuffle(a[k / 8 * 2 + 1], from));
    for (int e = 0; e < 2; e++) {
      const half2 b = as_type<half2>(simd_shuffle(k < 8 ? b0 : b1, (lane % 4 * 2 + e) * 4 + k % 8 / 2));
      c[e] += float(upper[0]) * float(b[0]) + float(upper[1]) * float(b[1]);
      c[2 + e] += float(lower[0]) * float(b[0]) + float(lower[1]) * float(b[1]);
    }
  }
}
'''


def simulate(text: str = FLASH_CUDA_TEXT) -> Kernel:
    "The CUDA text as a kernel for the simulator: Metal's entry, its words for memory, and the functions above."
    head = FLASH_MATRIX.metal.removeprefix(TILE).partition('  const int head')[0]
    body, entries = re.subn(r'extern "C".*?(?=  follow\(\);)', lambda _: head, text.removeprefix(PTX), flags=re.S)
    assert entries == 1
    body = body.replace('__shared__ __align__(16)', 'alignas(16) threadgroup')
    body = body.replace('(const uint*)', '(device const uint*)').replace('(uint*)', '(device uint*)')
    return Kernel(SIMULATED_PTX + body)
