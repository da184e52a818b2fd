// CUDA's tensor cores and asynchronous copies: a function for each instruction of PTX that we use.
//
// A lane of a warp holds two neighbours of an 8 x 8 matrix in one register: lane 4 g + c holds, of
// row g, the columns 2 c and 2 c + 1. A `half` is its 16 bits.
#define inlined static __device__ __forceinline__
typedef unsigned int uint;
typedef unsigned short half;
inlined uint address(const half* p) { return (uint)__cvta_generic_to_shared(p); }
inlined float power(float x) { asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x)); return x; }
inlined uint pair(float low, float high) {
  uint x; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low)); return x; }
inlined float across(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
inlined void fetch(half* to, const half* from, bool real) {      // 16 bytes, zeros if not real
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(address(to)), "l"(from), "r"(real ? 16 : 0) : "memory"); }
inlined void fetched() { asm volatile("cp.async.wait_all;" ::: "memory"); __syncthreads(); }
inlined void load8x8(uint* x, const half* p) {                   // each lane gives a row's address
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
    : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address(p)) : "memory"); }
inlined void load8x8_transposed(uint* x, const half* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
    : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address(p)) : "memory"); }
inlined void multiply(float* c, const uint* a, uint b0, uint b1) {    // c += a b: 16 x 16 by 16 x 8
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)); }
