// The Metal standard library for CUDA: what our kernels use of it, on a warp in place of a simdgroup.
//
// A kernel's Metal text is compiled behind this header, inside `namespace metal`; an entry point
// written by `tinyvllm.metal` calls it. The names of address spaces are gone by then, and threadgroup
// variables have become MSL_TG: shared memory.
#pragma nv_diag_suppress 177  // a kernel uses only some of these
#define MSL static __device__ __forceinline__
#define inlined MSL  // in front of a helper function
#define unrolled _Pragma("unroll")  // in front of a loop
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#define MSL_TG(name, dims, type) __shared__ __align__(16) type name dims
#define MSL_TG_ALIGNED(alignment, name, dims, type) MSL_TG(name, dims, type)
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;

// --- half: it computes as float, as Metal's does where a float is near
struct half {
  unsigned short bits;
  half() = default;
  __device__ __forceinline__ half(float f) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f)); }
  __device__ __forceinline__ operator float() const { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits)); return f; }
};

// --- vectors: 2, 3 or 4 of a type, aligned as in Metal, and copied as one word
template <class T, int N> struct msl_data;
template <class T> struct alignas(2 * sizeof(T)) msl_data<T, 2> { T x, y; };
template <class T> struct alignas(4 * sizeof(T)) msl_data<T, 3> { T x, y, z; };
template <class T> struct alignas(4 * sizeof(T)) msl_data<T, 4> { T x, y, z, w; };
template <int bytes> struct msl_word;
template <> struct msl_word<2> { typedef unsigned short type; };
template <> struct msl_word<4> { typedef unsigned int type; };
template <> struct msl_word<8> { typedef uint2 type; };
template <> struct msl_word<16> { typedef uint4 type; };

#define MSL_METHOD __device__ __forceinline__
template <class T, int N> struct msl_vec : msl_data<T, N> {
  typedef typename msl_word<sizeof(msl_data<T, N>)>::type word;
  msl_vec() = default;
  MSL_METHOD msl_vec(const msl_vec& v) { *(word*)this = *(const word*)&v; }
  MSL_METHOD msl_vec& operator=(const msl_vec& v) { *(word*)this = *(const word*)&v; return *this; }
  MSL_METHOD explicit msl_vec(T s) { for (int i = 0; i < N; i++) (*this)[i] = s; }
  MSL_METHOD msl_vec(T a, T b) { this->x = a; this->y = b; }
  MSL_METHOD msl_vec(T a, T b, T c) { this->x = a; this->y = b; this->z = c; }
  MSL_METHOD msl_vec(T a, T b, T c, T d) { this->x = a; this->y = b; this->z = c; this->w = d; }
  MSL_METHOD msl_vec(msl_vec<T, 2> a, msl_vec<T, 2> b) { this->x = a.x; this->y = a.y; this->z = b.x; this->w = b.y; }
  template <class U> MSL_METHOD explicit msl_vec(msl_vec<U, N> v) { for (int i = 0; i < N; i++) (*this)[i] = T(v[i]); }
  MSL_METHOD T& operator[](int i) { return (&this->x)[i]; }
  MSL_METHOD const T& operator[](int i) const { return (&this->x)[i]; }
};
#define MSL_OPERATOR(op) \
  template <class T, int N> MSL msl_vec<T, N> operator op(msl_vec<T, N> a, const msl_vec<T, N>& b) { \
    for (int i = 0; i < N; i++) a[i] = a[i] op b[i]; return a; } \
  template <class T, int N, class S> MSL msl_vec<T, N> operator op(msl_vec<T, N> a, S b) { \
    for (int i = 0; i < N; i++) a[i] = a[i] op T(b); return a; } \
  template <class T, int N, class S> MSL msl_vec<T, N> operator op(S a, msl_vec<T, N> b) { \
    for (int i = 0; i < N; i++) b[i] = T(a) op b[i]; return b; } \
  template <class T, int N, class S> MSL msl_vec<T, N>& operator op##=(msl_vec<T, N>& a, S b) { return a = a op b; }
MSL_OPERATOR(+) MSL_OPERATOR(-) MSL_OPERATOR(*) MSL_OPERATOR(/)
MSL_OPERATOR(&) MSL_OPERATOR(|) MSL_OPERATOR(>>) MSL_OPERATOR(<<)

#define MSL_VECTORS(T) typedef msl_vec<T, 2> msl_##T##2; typedef msl_vec<T, 3> msl_##T##3; typedef msl_vec<T, 4> msl_##T##4;
MSL_VECTORS(float) MSL_VECTORS(half) MSL_VECTORS(int) MSL_VECTORS(uint) MSL_VECTORS(short) MSL_VECTORS(ushort)
MSL_VECTORS(char) MSL_VECTORS(uchar)

// --- functions: CUDA's own where the names agree; `max(float, float)` and such are there already
namespace metal {
  template <class T, class U> MSL T as_type(U u) { static_assert(sizeof(T) == sizeof(U), "sizes differ"); T t; memcpy(&t, &u, sizeof t); return t; }
  template <class T, int N> MSL T dot(const msl_vec<T, N>& a, const msl_vec<T, N>& b) {
    T s = a[0] * b[0]; for (int i = 1; i < N; i++) s += a[i] * b[i]; return s; }
  template <class T, int N> MSL msl_vec<T, N> fma(const msl_vec<T, N>& a, const msl_vec<T, N>& b, msl_vec<T, N> c) {
    for (int i = 0; i < N; i++) c[i] = ::fma(a[i], b[i], c[i]); return c; }
  MSL float fma(float a, float b, float c) { return fmaf(a, b, c); }
  MSL float exp(float x) { return __expf(x); }
  MSL float exp2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
  MSL float rsqrt(float x) { return rsqrtf(x); }
  template <class T> MSL T clamp(T x, T low, T high) { return min(max(x, low), high); }
  template <class T> MSL T select(T a, T b, bool c) { return c ? b : a; }
  namespace fast { MSL float exp(float x) { return metal::exp(x); } MSL float exp2(float x) { return metal::exp2(x); } }
  namespace precise { MSL float exp(float x) { return expf(x); } MSL float exp2(float x) { return exp2f(x); } }

  // --- a simdgroup is a warp
  template <class T> MSL T simd_shuffle(T x, ushort lane) { return __shfl_sync(~0u, x, lane); }
  template <class T> MSL T simd_broadcast(T x, ushort lane) { return __shfl_sync(~0u, x, lane); }
  template <class T> MSL T simd_shuffle_xor(T x, ushort mask) { return __shfl_xor_sync(~0u, x, mask); }
  template <class T> MSL T simd_shuffle_down(T x, ushort n) { return __shfl_down_sync(~0u, x, n); }
  template <class T> MSL T simd_shuffle_up(T x, ushort n) { return __shfl_up_sync(~0u, x, n); }
  template <class T> MSL T simd_sum(T x) { for (int m = 16; m; m >>= 1) x += __shfl_xor_sync(~0u, x, m); return x; }
  template <class T> MSL T simd_max(T x) { for (int m = 16; m; m >>= 1) x = max(x, __shfl_xor_sync(~0u, x, m)); return x; }
  template <class T> MSL T simd_min(T x) { for (int m = 16; m; m >>= 1) x = min(x, __shfl_xor_sync(~0u, x, m)); return x; }
  template <class T, int N> MSL msl_vec<T, N> simd_sum(msl_vec<T, N> v) { for (int i = 0; i < N; i++) v[i] = simd_sum(v[i]); return v; }

  enum class mem_flags { mem_none, mem_device, mem_threadgroup };
  MSL mem_flags operator|(mem_flags a, mem_flags) { return a; }
  MSL void threadgroup_barrier(mem_flags) { __syncthreads(); }
  MSL void simdgroup_barrier(mem_flags) { __syncwarp(); }
}

// --- from here on the words mean what they mean in Metal
#define float2 msl_float2
#define float3 msl_float3
#define float4 msl_float4
#define half2 msl_half2
#define half3 msl_half3
#define half4 msl_half4
#define int2 msl_int2
#define int3 msl_int3
#define int4 msl_int4
#define uint2 msl_uint2
#define uint3 msl_uint3
#define uint4 msl_uint4
#define short2 msl_short2
#define short4 msl_short4
#define ushort2 msl_ushort2
#define ushort4 msl_ushort4
#define char4 msl_char4
#define uchar4 msl_uchar4
#define kernel MSL
