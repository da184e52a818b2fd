// msl.h - Metal Shading Language (compute subset) on top of clang C++14, so that .metal source runs on a CPU.
// No standard header is included: keywords such as `device`, `thread`, `constant` are macros here.
#pragma once
#pragma clang diagnostic ignored "-Wuser-defined-literals"
#pragma clang diagnostic ignored "-Wreserved-user-defined-literal"
#pragma clang diagnostic ignored "-Wduplicate-decl-specifier"

// ---------------------------------------------------------------- address spaces
#ifdef MSL_LINT // with numbered address spaces: to be looked at, and not to run (operations.py)
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2))) const
#define threadgroup __attribute__((address_space(3)))
#define MSL_VP(p) ((const void*)0)
#define MSL_EACH_SPACE(X) X(device) X(threadgroup)
#else
#define device
#define constant const
#define threadgroup
#define MSL_VP(p) ((const void*)(p))
#define MSL_EACH_SPACE(X) X()
#endif
#define thread
#define kernel
#define METAL_FUNC inline __attribute__((always_inline))
#define MSL_NOHOOK __attribute__((no_sanitize("thread")))
// Code that is copied into a kernel without lines of its own counts as the line that calls it.
#define MSL_INLINE static inline __attribute__((always_inline, nodebug))
#define MSL_MEMBER inline __attribute__((always_inline, nodebug))
#define MSL_CAT_(a, b) a##b
#define MSL_CAT(a, b) MSL_CAT_(a, b)
// threadgroup storage declared in a function body (source.py rewrites `threadgroup T x[..];` to this)
#define MSL_TG_ALIGNED(alignment, name, dims, ...) \
    typedef __VA_ARGS__ MSL_CAT(msl_tgt_, name) dims; \
    struct alignas(MSL_CAT(msl_tgt_, name)) alignment MSL_CAT(msl_tga_, name) {}; \
    threadgroup MSL_CAT(msl_tgt_, name) & name = *(threadgroup MSL_CAT(msl_tgt_, name)*)msl_tg_static( \
        __COUNTER__, sizeof(MSL_CAT(msl_tgt_, name)), alignof(MSL_CAT(msl_tga_, name)), #name)
#define MSL_TG(name, dims, ...) MSL_TG_ALIGNED(, name, dims, __VA_ARGS__)

#define __METAL__ 1
#define __METAL_VERSION__ 310 // as tinygrad compiles: metal3.1
#define __METAL_MACOS__ 1
#define __HAVE_BFLOAT__ 1

// ---------------------------------------------------------------- scalar and vector types
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef unsigned char uint8_t;
typedef signed char int8_t;
typedef unsigned short uint16_t;
typedef short int16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef unsigned long uint64_t;
typedef long int64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef unsigned long uintptr_t;
typedef long intptr_t;
// Every operation rounds to half, as on Metal: -fnative-half-type, or -ffloat16-excess-precision=none.
#if __clang_major__ >= 16 // where __fp16 may be no argument any more
typedef _Float16 half;
#else
typedef __fp16 half;
#endif
constexpr half operator"" h(long double x) { return (half)x; }
constexpr half operator"" h(unsigned long long x) { return (half)x; }
template <class T, int N> using msl_vec = T __attribute__((ext_vector_type(N)));
#define MSL_VECTORS(T) \
    typedef T T##2 __attribute__((ext_vector_type(2))); \
    typedef T T##3 __attribute__((ext_vector_type(3))); \
    typedef T T##4 __attribute__((ext_vector_type(4)));
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(long)
MSL_VECTORS(ulong)
MSL_VECTORS(half)
MSL_VECTORS(float)

// What a type is made of: `elem` and `n`.
template <class T> struct msl_vt {
    typedef T elem;
    enum { n = 1 };
};
template <class T, int N> struct msl_vt<msl_vec<T, N>> {
    typedef T elem;
    enum { n = N };
};
#define MSL_VT(V, T, N) \
    template <> struct msl_vt<V> { \
        typedef T elem; \
        enum { n = N }; \
    };
template <class T> struct msl_id { // a parameter from which no type is deduced
    typedef T type;
};

// Vectors of classes: bool, bfloat and packed ones. Their elements are x, y, z, w, and v[i].
#define MSL_INDEX(T) \
    MSL_MEMBER T& operator[](int i) { return (&x)[i]; } \
    MSL_MEMBER T operator[](int i) const { return (&x)[i]; }

// A comparison of two vectors is a vector of integers to clang, of bools to Metal: here it becomes one.
#define MSL_BOOL(V, N, ...) \
    struct alignas(N == 2 ? 2 : 4) V { \
        bool __VA_ARGS__; \
        V() = default; \
        MSL_MEMBER V(bool b) { \
            for (int i = 0; i < N; i++) (*this)[i] = b; \
        } \
        template <class T> MSL_MEMBER V(msl_vec<T, N> v) { \
            for (int i = 0; i < N; i++) (*this)[i] = v[i] != 0; \
        } \
        MSL_INDEX(bool) \
    }; \
    MSL_VT(V, bool, N) \
    MSL_INLINE V operator!(V a) { \
        for (int i = 0; i < N; i++) a[i] = !a[i]; \
        return a; \
    } \
    MSL_BOOL_OP(V, N, &&) MSL_BOOL_OP(V, N, ||) MSL_BOOL_OP(V, N, &) MSL_BOOL_OP(V, N, |) \
    MSL_BOOL_OP(V, N, ^) MSL_BOOL_OP(V, N, ==) MSL_BOOL_OP(V, N, !=)
#define MSL_BOOL_OP(V, N, op) \
    MSL_INLINE V operator op(V a, V b) { \
        for (int i = 0; i < N; i++) a[i] = a[i] op b[i]; \
        return a; \
    }
MSL_BOOL(bool2, 2, x, y)
MSL_BOOL(bool3, 3, x, y, z)
MSL_BOOL(bool4, 4, x, y, z, w)

#ifdef MSL_LINT // members cannot be called through numbered address spaces: the shape is enough
typedef half bfloat;
typedef half2 bfloat2;
typedef half3 bfloat3;
typedef half4 bfloat4;
#else
struct bfloat {
    ushort b;
    bfloat() = default;
    MSL_INLINE ushort rnd(float f) {
        uint u = __builtin_bit_cast(uint, f);
        if ((u & 0x7fffffffu) > 0x7f800000u) return (u >> 16) | 0x40;
        return (ushort)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
    }
    template <class T> bfloat(T f) : b(rnd((float)f)) {}
    operator float() const { return __builtin_bit_cast(float, (uint)b << 16); }
};
template <class T> struct msl_if_bfloat {};
template <> struct msl_if_bfloat<bfloat> {
    typedef bfloat type;
};
// Of two bfloats: with any other operand it is an operation of floats.
#define MSL_BF_OP(op) \
    template <class B> MSL_INLINE typename msl_if_bfloat<B>::type operator op(B a, B b) { \
        return bfloat((float)a op(float) b); \
    } \
    template <class T> MSL_INLINE bfloat& operator op##=(bfloat& a, T b) { return a = bfloat((float)a op(float) b); }
MSL_BF_OP(+)
MSL_BF_OP(-)
MSL_BF_OP(*)
MSL_BF_OP(/)
#define MSL_BF_VECTOR(V, N, ...) \
    struct alignas(N == 2 ? 4 : 8) V { \
        bfloat __VA_ARGS__; \
        V() = default; \
        template <class T> MSL_MEMBER V(T b) { \
            for (int i = 0; i < N; i++) (*this)[i] = bfloat(b); \
        } \
        MSL_INDEX(bfloat) \
    }; \
    MSL_VT(V, bfloat, N) \
    MSL_BF_VECTOR_OP(V, N, +) MSL_BF_VECTOR_OP(V, N, -) MSL_BF_VECTOR_OP(V, N, *) MSL_BF_VECTOR_OP(V, N, /)
#define MSL_BF_VECTOR_OP(V, N, op) \
    MSL_INLINE V operator op(V a, V b) { \
        for (int i = 0; i < N; i++) a[i] = a[i] op b[i]; \
        return a; \
    } \
    MSL_INLINE V& operator op##=(V& a, V b) { return a = a op b; }
MSL_BF_VECTOR(bfloat2, 2, x, y)
MSL_BF_VECTOR(bfloat3, 3, x, y, z)
MSL_BF_VECTOR(bfloat4, 4, x, y, z, w)
#endif
typedef bfloat bfloat16_t;
typedef half float16_t;

// ---------------------------------------------------------------- float4(a, b.xy, c): constructors of vectors
template <class T, bool V> struct msl_put {
    template <class D> static MSL_INLINE void f(D& d, int& i, T x) { d[i++] = (typename msl_vt<D>::elem)x; }
};
template <class T> struct msl_put<T, true> {
    template <class D> static MSL_INLINE void f(D& d, int& i, T x) {
        for (int k = 0; k < msl_vt<T>::n; k++) d[i++] = (typename msl_vt<D>::elem)x[k];
    }
};
template <class D> MSL_INLINE void msl_fill(D&, int&) {}
template <class D, class A, class... R> MSL_INLINE void msl_fill(D& d, int& i, A a, R... r) {
    msl_put<A, (msl_vt<A>::n > 1)>::f(d, i, a);
    msl_fill(d, i, r...);
}
template <class... A> struct msl_count {
    enum { n = 0 };
};
template <class A, class... R> struct msl_count<A, R...> {
    enum { n = (int)msl_vt<A>::n + (int)msl_count<R...>::n };
};
template <class D, bool is_vector> struct msl_if {};
template <class D> struct msl_if<D, true> {
    typedef D type;
};
template <class D, class... A> MSL_INLINE typename msl_if<D, (msl_vt<D>::n > 1)>::type msl_mk(A... a) {
    constexpr int c = msl_count<A...>::n;
    static_assert(c == 1 || c == (int)msl_vt<D>::n || sizeof...(A) == 0,
        "wrong number of components in a vector constructor");
    D d{};
    int i = 0;
    msl_fill(d, i, a...);
    if (c == 1)
        for (int k = 1; k < msl_vt<D>::n; k++) d[k] = d[0];
    return d;
}
template <class D, class... A> MSL_INLINE constexpr typename msl_if<D, msl_vt<D>::n == 1>::type msl_mk(A... a) {
    return D(a...);
}
#define char2(...) (msl_mk<char2>(__VA_ARGS__))
#define char3(...) (msl_mk<char3>(__VA_ARGS__))
#define char4(...) (msl_mk<char4>(__VA_ARGS__))
#define uchar2(...) (msl_mk<uchar2>(__VA_ARGS__))
#define uchar3(...) (msl_mk<uchar3>(__VA_ARGS__))
#define uchar4(...) (msl_mk<uchar4>(__VA_ARGS__))
#define short2(...) (msl_mk<short2>(__VA_ARGS__))
#define short3(...) (msl_mk<short3>(__VA_ARGS__))
#define short4(...) (msl_mk<short4>(__VA_ARGS__))
#define ushort2(...) (msl_mk<ushort2>(__VA_ARGS__))
#define ushort3(...) (msl_mk<ushort3>(__VA_ARGS__))
#define ushort4(...) (msl_mk<ushort4>(__VA_ARGS__))
#define int2(...) (msl_mk<int2>(__VA_ARGS__))
#define int3(...) (msl_mk<int3>(__VA_ARGS__))
#define int4(...) (msl_mk<int4>(__VA_ARGS__))
#define uint2(...) (msl_mk<uint2>(__VA_ARGS__))
#define uint3(...) (msl_mk<uint3>(__VA_ARGS__))
#define uint4(...) (msl_mk<uint4>(__VA_ARGS__))
#define long2(...) (msl_mk<long2>(__VA_ARGS__))
#define long3(...) (msl_mk<long3>(__VA_ARGS__))
#define long4(...) (msl_mk<long4>(__VA_ARGS__))
#define ulong2(...) (msl_mk<ulong2>(__VA_ARGS__))
#define ulong3(...) (msl_mk<ulong3>(__VA_ARGS__))
#define ulong4(...) (msl_mk<ulong4>(__VA_ARGS__))
#define half2(...) (msl_mk<half2>(__VA_ARGS__))
#define half3(...) (msl_mk<half3>(__VA_ARGS__))
#define half4(...) (msl_mk<half4>(__VA_ARGS__))
#define float2(...) (msl_mk<float2>(__VA_ARGS__))
#define float3(...) (msl_mk<float3>(__VA_ARGS__))
#define float4(...) (msl_mk<float4>(__VA_ARGS__))
#define bool2(...) (msl_mk<bool2>(__VA_ARGS__))
#define bool3(...) (msl_mk<bool3>(__VA_ARGS__))
#define bool4(...) (msl_mk<bool4>(__VA_ARGS__))
#define bfloat2(...) (msl_mk<bfloat2>(__VA_ARGS__))
#define bfloat3(...) (msl_mk<bfloat3>(__VA_ARGS__))
#define bfloat4(...) (msl_mk<bfloat4>(__VA_ARGS__))

namespace metal {
template <class T, int N> using vec = msl_vec<T, N>;
#define MSL_USING(T) \
    using ::T; \
    using ::T##2; \
    using ::T##3; \
    using ::T##4;
using ::char2;
using ::char3;
using ::char4;
MSL_USING(uchar)
using ::short2;
using ::short3;
using ::short4;
MSL_USING(ushort)
using ::int2;
using ::int3;
using ::int4;
MSL_USING(uint)
using ::long2;
using ::long3;
using ::long4;
MSL_USING(ulong)
MSL_USING(half)
using ::float2;
using ::float3;
using ::float4;
using ::bool2;
using ::bool3;
using ::bool4;
MSL_USING(bfloat)
using ::size_t;
using ::ptrdiff_t;

// Packed vectors are aligned as one element. Of three: a class, since clang's vector of three takes the room of four.
#define MSL_PACKED(T) \
    typedef T packed_##T##2 __attribute__((ext_vector_type(2), aligned(sizeof(T)))); \
    typedef T packed_##T##4 __attribute__((ext_vector_type(4), aligned(sizeof(T)))); \
    struct packed_##T##3 { \
        T x, y, z; \
        packed_##T##3() = default; \
        MSL_MEMBER packed_##T##3(T a) : x(a), y(a), z(a) {} \
        MSL_MEMBER packed_##T##3(T a, T b, T c) : x(a), y(b), z(c) {} \
        MSL_MEMBER packed_##T##3(msl_vec<T, 3> v) : x(v.x), y(v.y), z(v.z) {} \
        MSL_MEMBER operator msl_vec<T, 3>() const { return msl_vec<T, 3>{x, y, z}; } \
        MSL_INDEX(T) \
        MSL_PACKED_OP(packed_##T##3, T, +) \
        MSL_PACKED_OP(packed_##T##3, T, -) \
        MSL_PACKED_OP(packed_##T##3, T, *) \
        MSL_PACKED_OP(packed_##T##3, T, /) \
    };
#define MSL_PACKED_OP(P, T, op) \
    friend MSL_MEMBER msl_vec<T, 3> operator op(P a, P b) { return (msl_vec<T, 3>)a op(msl_vec<T, 3>) b; } \
    friend MSL_MEMBER msl_vec<T, 3> operator op(P a, msl_vec<T, 3> b) { return (msl_vec<T, 3>)a op b; } \
    friend MSL_MEMBER msl_vec<T, 3> operator op(msl_vec<T, 3> a, P b) { return a op(msl_vec<T, 3>) b; } \
    friend MSL_MEMBER msl_vec<T, 3> operator op(P a, T b) { return (msl_vec<T, 3>)a op b; } \
    friend MSL_MEMBER msl_vec<T, 3> operator op(T a, P b) { return a op(msl_vec<T, 3>) b; } \
    MSL_MEMBER P& operator op##=(msl_vec<T, 3> b) { return *this = *this op b; }
MSL_PACKED(char)
MSL_PACKED(uchar)
MSL_PACKED(short)
MSL_PACKED(ushort)
MSL_PACKED(int)
MSL_PACKED(uint)
MSL_PACKED(long)
MSL_PACKED(ulong)
MSL_PACKED(half)
MSL_PACKED(float)
} // namespace metal
#define MSL_PACKED3(T) MSL_VT(metal::packed_##T##3, T, 3)
MSL_PACKED3(char)
MSL_PACKED3(uchar)
MSL_PACKED3(short)
MSL_PACKED3(ushort)
MSL_PACKED3(int)
MSL_PACKED3(uint)
MSL_PACKED3(long)
MSL_PACKED3(ulong)
MSL_PACKED3(half)
MSL_PACKED3(float)

// ---------------------------------------------------------------- the runtime's interface (rt.cpp)
struct msl_thread {
    uint tg[3], lid[3], gid[3], lane, simd, index, tgsz[3], ntg[3], gsz[3], nsimd;
    uint active; // lanes that took part in the last collective
};
extern "C" {
extern msl_thread* msl_cur;
void* msl_collective(int kind, uint line, uint col, const void* val, uint size); // 32 slots of 64 bytes
void msl_barrier(uint flags, uint line, uint col);
void msl_fence(uint flags);
threadgroup void* msl_tg_static(int id, unsigned long size, unsigned long align, const char* name);
void* msl_tg_dynamic(int slot);
void msl_access(const volatile void* p, uint size, int write, uint line); // bounds check only (atomics)
void msl_fail(const char* what, uint line);
}
#define MSL_SITE uint line_ = __builtin_LINE(), uint col_ = __builtin_COLUMN()

// What an entry point hands to a kernel, whatever the type of its parameter is called there.
struct msl_pointer {
    void* p;
    template <class T> MSL_MEMBER operator T*() const { return (T*)p; }
};
struct msl_reference {
    void* p;
    template <class T> MSL_MEMBER operator T&() const { return *(T*)p; }
};
template <class T, int N> struct msl_position_ {
    static MSL_INLINE T f(const uint* p) {
        T r;
        for (int i = 0; i < N; i++) r[i] = p[i];
        return r;
    }
};
template <class T> struct msl_position_<T, 1> {
    static MSL_INLINE T f(const uint* p) { return (T)p[0]; }
};
struct msl_position {
    const uint* p;
    template <class T> MSL_MEMBER operator T() const { return msl_position_<T, msl_vt<T>::n>::f(p); }
};

#include "msl_traits.h"
#include "msl_simd.h"
#include "msl_math.h"
#include "msl_matrix.h"
#include "msl_atomic.h"
namespace simd = metal;
