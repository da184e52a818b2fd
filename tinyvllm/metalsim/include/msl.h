// msl.h - Metal Shading Language (compute subset) on top of clang C++14, so that .metal source runs on a CPU.
// No standard header is included: keywords such as `device`, `thread`, `constant` are macros here.
#pragma once
#pragma clang diagnostic ignored "-Wuser-defined-literals"
#pragma clang diagnostic ignored "-Wreserved-user-defined-literal"
#pragma clang diagnostic ignored "-Wduplicate-decl-specifier"

// ---------------------------------------------------------------- address spaces
#ifdef MSL_LINT // type-check only: real (numbered) address spaces, so a missing/mixed qualifier is a compile
                // error like on Metal
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2))) const
#define threadgroup __attribute__((address_space(3)))
#else
#define device
#define constant const
#define threadgroup
#endif
#ifdef MSL_LINT
#define MSL_VP(p) ((const void*)0)
#else
#define MSL_VP(p) ((const void*)(p))
#endif
#define thread
#define kernel
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
// Every operation rounds to half, as on Metal: -fnative-half-type, or -ffloat16-excess-precision=none.
#if __clang_major__ >= 16 // where __fp16 may be no argument any more
typedef _Float16 half;
#else
typedef __fp16 half;
#endif
constexpr half operator"" h(long double x) { return (half)x; }
constexpr half operator"" h(unsigned long long x) { return (half)x; }
template <class T, int N> using msl_vec = T __attribute__((ext_vector_type(N)));
#define MSL_VT(T) \
    typedef T T##2 __attribute__((ext_vector_type(2))); \
    typedef T T##3 __attribute__((ext_vector_type(3))); \
    typedef T T##4 __attribute__((ext_vector_type(4)));
MSL_VT(char)
MSL_VT(uchar)
MSL_VT(short)
MSL_VT(ushort)
MSL_VT(int)
MSL_VT(uint)
MSL_VT(long)
MSL_VT(ulong)
MSL_VT(half)
MSL_VT(float)
typedef uchar bool2 __attribute__((ext_vector_type(2)));
typedef uchar bool3 __attribute__((ext_vector_type(3)));
typedef uchar bool4 __attribute__((ext_vector_type(4)));

template <class T> struct msl_vt {
    typedef T elem;
    enum { n = 1 };
};
template <class T, int N> struct msl_vt<msl_vec<T, N>> {
    typedef T elem;
    enum { n = N };
};
template <class T> struct msl_id {
    typedef T type;
};
template <class T> struct msl_rmq {
    typedef T type;
};
template <class T> struct msl_rmq<const T> {
    typedef T type;
};
template <class A, class B> struct msl_same {
    enum { v = 0 };
};
template <class A> struct msl_same<A, A> {
    enum { v = 1 };
};

#ifdef MSL_LINT
typedef half
    bfloat; // class members cannot be called through numbered address spaces; lint only needs the shape
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
    template <class T> bfloat& operator+=(T o) { return *this = bfloat((float)*this + (float)o); }
    template <class T> bfloat& operator*=(T o) { return *this = bfloat((float)*this * (float)o); }
};
#define MSL_BOP(op) \
    MSL_INLINE bfloat operator op(bfloat a, bfloat b) { return bfloat((float)a op(float) b); }
MSL_BOP(+)
MSL_BOP(-)
MSL_BOP(*)
MSL_BOP(/)
struct bfloat2 {
    bfloat x, y;
    bfloat& operator[](int i) { return (&x)[i]; }
    bfloat operator[](int i) const { return (&x)[i]; }
};
struct alignas(8) bfloat4 {
    bfloat x, y, z, w;
    bfloat& operator[](int i) { return (&x)[i]; }
    bfloat operator[](int i) const { return (&x)[i]; }
};
template <> struct msl_vt<bfloat2> {
    typedef bfloat elem;
    enum { n = 2 };
};
template <> struct msl_vt<bfloat4> {
    typedef bfloat elem;
    enum { n = 4 };
};
#define bfloat2(...) (msl_mk<bfloat2>(__VA_ARGS__))
#define bfloat4(...) (msl_mk<bfloat4>(__VA_ARGS__))
#endif
typedef bfloat bfloat16_t;
typedef half float16_t;

// float4(a, b.xy, c) style constructors
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
template <class D, class... A> MSL_INLINE D msl_mk(A... a) {
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
#define long4(...) (msl_mk<long4>(__VA_ARGS__))
#define ulong2(...) (msl_mk<ulong2>(__VA_ARGS__))
#define ulong4(...) (msl_mk<ulong4>(__VA_ARGS__))
#define half2(...) (msl_mk<half2>(__VA_ARGS__))
#define half3(...) (msl_mk<half3>(__VA_ARGS__))
#define half4(...) (msl_mk<half4>(__VA_ARGS__))
#define float2(...) (msl_mk<float2>(__VA_ARGS__))
#define float3(...) (msl_mk<float3>(__VA_ARGS__))
#define float4(...) (msl_mk<float4>(__VA_ARGS__))
#define bool2(...) (msl_mk<bool2>(__VA_ARGS__))
#define bool4(...) (msl_mk<bool4>(__VA_ARGS__))

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define HALF_MAX ((half)65504.0f)
#define M_PI_F 3.14159265358979323846264338327950288f
#define M_LOG2E_F 1.44269504088896340735992468100189214f
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u

// ---------------------------------------------------------------- the runtime's interface (rt.cpp)
struct msl_thread {
    uint tg[3], lid[3], gid[3], lane, simd, index, tgsz[3], ntg[3], gsz[3], nsimd;
    uint active; // lanes that took part in the last collective
};
extern "C" {
extern msl_thread* msl_cur;
void* msl_collective(int kind, uint line, uint col, const void* val, uint size); // 32 slots of 64 bytes
void msl_barrier(uint flags, uint line, uint col);
threadgroup void* msl_tg_static(int id, unsigned long size, unsigned long align, const char* name);
void* msl_tg_dynamic(int slot);
void msl_access(const volatile void* p, uint size, int write, uint line); // bounds check only (atomics)
void msl_fail(const char* what, uint line);
}
#define MSL_SITE uint line_ = __builtin_LINE(), uint col_ = __builtin_COLUMN()
enum {
    MSL_SUM = 1,
    MSL_MAX,
    MSL_MIN,
    MSL_PROD,
    MSL_SHUF,
    MSL_BCAST,
    MSL_BALLOT,
    MSL_SCAN,
    MSL_SBAR,
    MSL_MMA,
    MSL_MLOAD,
    MSL_MSTORE,
    MSL_AND,
    MSL_OR
};

namespace metal {
template <class T, int N> using vec = msl_vec<T, N>;
enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
MSL_INLINE mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((uint)a | (uint)b); }
MSL_INLINE void threadgroup_barrier(mem_flags f, MSL_SITE) { msl_barrier((uint)f, line_, col_); }
MSL_INLINE void simdgroup_barrier(mem_flags f, MSL_SITE) {
    uint v = (uint)f;
    msl_collective(MSL_SBAR, line_, col_, &v, 4);
}

template <class T> struct msl_slot {
    T v;
    char pad[64 - sizeof(T)];
};
template <class T> MSL_INLINE const msl_slot<T>* msl_gather(int kind, T x, uint line, uint col) {
    return (const msl_slot<T>*)msl_collective(kind, line, col, &x, sizeof(T));
}
#define MSL_REDUCE(name, kind, init, step) \
    template <class T> MSL_NOHOOK static inline T name(T x, MSL_SITE) { \
        const msl_slot<T>* s = msl_gather(kind, x, line_, col_); \
        uint m = msl_cur->active; \
        T a = init; \
        bool first = true; \
        for (int i = 0; i < 32; i++) \
            if (m >> i & 1) { \
                T b = s[i].v; \
                if (first) { \
                    a = b; \
                    first = false; \
                } else step; \
            } \
        return a; \
    }
MSL_REDUCE(simd_sum, MSL_SUM, x, a = a + b)
MSL_REDUCE(simd_product, MSL_PROD, x, a = a * b)
MSL_REDUCE(simd_max, MSL_MAX, x, a = b > a ? b : a)
MSL_REDUCE(simd_min, MSL_MIN, x, a = b < a ? b : a)
MSL_REDUCE(simd_and, MSL_AND, x, a = a & b)
MSL_REDUCE(simd_or, MSL_OR, x, a = a | b)
template <class T> MSL_NOHOOK static inline T msl_from(int kind, T x, uint src, uint line, uint col) {
    const msl_slot<T>* s = msl_gather(kind, x, line, col);
    if (src > 31 || !(msl_cur->active >> src & 1))
        msl_fail("simd shuffle/broadcast reads a lane that is not active", line);
    return s[src & 31].v;
}
template <class T> MSL_INLINE T simd_shuffle(T x, ushort l, MSL_SITE) {
    return msl_from(MSL_SHUF, x, l, line_, col_);
}
template <class T> MSL_INLINE T simd_shuffle_xor(T x, ushort m, MSL_SITE) {
    return msl_from(MSL_SHUF, x, msl_cur->lane ^ m, line_, col_);
}
// out-of-range lanes keep their own value (the result is undefined on Metal for them)
template <class T> MSL_INLINE T simd_shuffle_down(T x, ushort d, MSL_SITE) {
    uint l = msl_cur->lane + d;
    return msl_from(MSL_SHUF, x, l > 31 ? msl_cur->lane : l, line_, col_);
}
template <class T> MSL_INLINE T simd_shuffle_up(T x, ushort d, MSL_SITE) {
    uint l = msl_cur->lane;
    return msl_from(MSL_SHUF, x, l < d ? l : l - d, line_, col_);
}
template <class T> MSL_INLINE T simd_shuffle_rotate_down(T x, ushort d, MSL_SITE) {
    return msl_from(MSL_SHUF, x, (msl_cur->lane + d) & 31, line_, col_);
}
template <class T> MSL_INLINE T simd_broadcast(T x, ushort l, MSL_SITE) {
    return msl_from(MSL_BCAST, x, l, line_, col_);
}
template <class T> MSL_NOHOOK static inline T simd_broadcast_first(T x, MSL_SITE) {
    const msl_slot<T>* s = msl_gather(MSL_BCAST, x, line_, col_);
    return s[__builtin_ctz(msl_cur->active)].v;
}
MSL_INLINE bool simd_is_first(MSL_SITE) {
    uint v = 0;
    msl_collective(MSL_BALLOT, line_, col_, &v, 4);
    return (uint)__builtin_ctz(msl_cur->active) == msl_cur->lane;
}
MSL_NOHOOK static inline bool simd_any(bool x, MSL_SITE) {
    const msl_slot<bool>* s = msl_gather(MSL_BALLOT, x, line_, col_);
    bool r = false;
    for (int i = 0; i < 32; i++)
        if (msl_cur->active >> i & 1) r |= s[i].v;
    return r;
}
MSL_NOHOOK static inline bool simd_all(bool x, MSL_SITE) {
    const msl_slot<bool>* s = msl_gather(MSL_BALLOT, x, line_, col_);
    bool r = true;
    for (int i = 0; i < 32; i++)
        if (msl_cur->active >> i & 1) r &= s[i].v;
    return r;
}
template <class T> MSL_NOHOOK static inline T simd_prefix_inclusive_sum(T x, MSL_SITE) {
    const msl_slot<T>* s = msl_gather(MSL_SCAN, x, line_, col_);
    T a = s[0].v;
    for (uint i = 1; i <= msl_cur->lane; i++) a = a + s[i].v;
    return a;
}
template <class T> MSL_NOHOOK static inline T simd_prefix_exclusive_sum(T x, MSL_SITE) {
    const msl_slot<T>* s = msl_gather(MSL_SCAN, x, line_, col_);
    T a = (T)0;
    for (uint i = 0; i < msl_cur->lane; i++) a = a + s[i].v;
    return a;
}
template <class T> MSL_NOHOOK static inline T quad_sum(T x, MSL_SITE) {
    const msl_slot<T>* s = msl_gather(MSL_SUM, x, line_, col_) + (msl_cur->lane & ~3u);
    return (s[0].v + s[1].v) + (s[2].v + s[3].v);
}
template <class T> MSL_INLINE T quad_shuffle_xor(T x, ushort m, MSL_SITE) {
    return msl_from(MSL_SHUF, x, msl_cur->lane ^ (m & 3), line_, col_);
}

// ---------------------------------------------------------------- simdgroup_matrix (8x8; each lane holds two
// neighbours in a row)
template <class T> struct msl_v2 {
    typedef msl_vec<T, 2> type;
};
#ifndef MSL_LINT
template <> struct msl_v2<bfloat> {
    typedef bfloat2 type;
};
#endif
template <class T, int R, int C> struct simdgroup_matrix {
    static_assert(R == 8 && C == 8, "only 8x8");
    typedef typename msl_v2<T>::type storage;
    storage e;
    simdgroup_matrix() = default;
    simdgroup_matrix(T d); // diagonal
    storage& thread_elements() { return e; }
    const storage& thread_elements() const { return e; }
    static MSL_INLINE uint row() {
        uint l = msl_cur->lane;
        return ((l / 4) & 4) + (l / 2) % 4;
    }
    static MSL_INLINE uint col() {
        uint l = msl_cur->lane;
        return ((l / 4) & 2) * 2 + (l % 2) * 2;
    }
};
template <class T, int R, int C> simdgroup_matrix<T, R, C>::simdgroup_matrix(T d) {
    e[0] = row() == col() ? d : (T)0;
    e[1] = row() == col() + 1 ? d : (T)0;
}
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
template <class T, int R, int C> MSL_INLINE simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T v) {
    simdgroup_matrix<T, R, C> m;
    m.e[0] = m.e[1] = v;
    return m;
}
struct msl_mem {
    const volatile void* p;
    ulong stride;
    ulong ox, oy;
    bool t;
};
MSL_NOHOOK static inline void msl_uniform(int kind, msl_mem a, uint line, uint col) {
    const msl_slot<msl_mem>* s = msl_gather(kind, a, line, col);
    for (int i = 0; i < 32; i++)
        if ((msl_cur->active >> i & 1) && (s[i].v.p != a.p || s[i].v.stride != a.stride ||
                                              s[i].v.ox != a.ox || s[i].v.oy != a.oy || s[i].v.t != a.t))
            msl_fail("simdgroup_load/store arguments differ between lanes", line);
    if (msl_cur->active != 0xffffffffu) msl_fail("simdgroup_load/store with a partial simdgroup", line);
}
#define MSL_MLS(AS) \
    template <class T> \
    MSL_INLINE void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& m, const AS T* p, ulong stride = 8, \
        ulong2 o = {0, 0}, bool tr = false, MSL_SITE) { \
        msl_uniform(MSL_MLOAD, msl_mem{MSL_VP(p), stride, o[0], o[1], tr}, line_, col_); \
        for (uint k = 0; k < 2; k++) { \
            ulong r = m.row(), c = m.col() + k; \
            m.e[k] = tr ? p[(c + o[1]) * stride + r + o[0]] : p[(r + o[1]) * stride + c + o[0]]; \
        } \
    } \
    template <class T> \
    MSL_INLINE void simdgroup_store(simdgroup_matrix<T, 8, 8> m, AS T* p, ulong stride = 8, \
        ulong2 o = {0, 0}, bool tr = false, MSL_SITE) { \
        msl_uniform(MSL_MSTORE, msl_mem{MSL_VP(p), stride, o[0], o[1], tr}, line_, col_); \
        for (uint k = 0; k < 2; k++) { \
            ulong r = m.row(), c = m.col() + k; \
            (tr ? p[(c + o[1]) * stride + r + o[0]] : p[(r + o[1]) * stride + c + o[0]]) = m.e[k]; \
        } \
    }
MSL_MLS(device)
#ifdef MSL_LINT
MSL_MLS(threadgroup)
#endif
struct msl_ab {
    float a[2], b[2];
};
template <class D, class A, class B, class C>
MSL_NOHOOK static inline void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d,
    simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c, MSL_SITE) {
    const msl_slot<msl_ab>* s = msl_gather(
        MSL_MMA, msl_ab{{(float)a.e[0], (float)a.e[1]}, {(float)b.e[0], (float)b.e[1]}}, line_, col_);
    if (msl_cur->active != 0xffffffffu)
        msl_fail("simdgroup_multiply_accumulate with a partial simdgroup", line_);
    uint r = a.row(), cc = a.col();
    float acc[2] = {(float)c.e[0], (float)c.e[1]};
    for (uint k = 0; k < 8; k++) {
        // lane that holds (row, col): bit0 = col.1, bits1-2 = row.0-1, bit3 = col.2, bit4 = row.2
        uint la = (k >> 1 & 1) | (r & 3) << 1 | (k >> 2 & 1) << 3 | (r >> 2 & 1) << 4;
        float av = s[la].v.a[k & 1];
        for (uint e = 0; e < 2; e++) {
            uint c2 = cc + e, lb = (c2 >> 1 & 1) | (k & 3) << 1 | (c2 >> 2 & 1) << 3 | (k >> 2 & 1) << 4;
            acc[e] += av * s[lb].v.b[c2 & 1];
        }
    }
    d.e[0] = (D)acc[0];
    d.e[1] = (D)acc[1];
}
template <class D, class A, class B>
MSL_INLINE void simdgroup_multiply(
    thread simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b, MSL_SITE) {
    simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8, 8>((D)0.0f), line_, col_);
}

// ---------------------------------------------------------------- math
template <class To, class From> MSL_INLINE To as_type(From x) {
    static_assert(sizeof(To) == sizeof(From), "as_type sizes");
    return __builtin_bit_cast(To, x);
}
#define MSL_V1(name) \
    template <class T, int N> MSL_INLINE msl_vec<T, N> name(msl_vec<T, N> v) { \
        msl_vec<T, N> r; \
        for (int i = 0; i < N; i++) r[i] = name((T)v[i]); \
        return r; \
    }
#define MSL_V2(name) \
    template <class T, int N> MSL_INLINE msl_vec<T, N> name(msl_vec<T, N> a, msl_vec<T, N> b) { \
        msl_vec<T, N> r; \
        for (int i = 0; i < N; i++) r[i] = name((T)a[i], (T)b[i]); \
        return r; \
    }
#define MSL_V3(name) \
    template <class T, int N> \
    MSL_INLINE msl_vec<T, N> name(msl_vec<T, N> a, msl_vec<T, N> b, msl_vec<T, N> c) { \
        msl_vec<T, N> r; \
        for (int i = 0; i < N; i++) r[i] = name((T)a[i], (T)b[i], (T)c[i]); \
        return r; \
    }
#define MSL_F1(name, fn) \
    MSL_INLINE float name(float x) { return fn(x); } \
    MSL_INLINE half name(half x) { return (half)fn((float)x); } \
    MSL_V1(name)
#define MSL_F2(name, fn) \
    MSL_INLINE float name(float x, float y) { return fn(x, y); } \
    MSL_INLINE half name(half x, half y) { return (half)fn((float)x, (float)y); } \
    MSL_V2(name)
MSL_INLINE float msl_rsqrtf(float x) { return 1.0f / __builtin_sqrtf(x); }
MSL_INLINE float msl_fractf(float x) { return x - __builtin_floorf(x); }
MSL_INLINE float msl_exp10f(float x) { return __builtin_exp2f(x * 3.32192809488736234787f); }
#define MSL_ALLF1 \
    MSL_F1(exp, __builtin_expf) \
    MSL_F1(exp2, __builtin_exp2f) \
    MSL_F1(exp10, msl_exp10f) \
    MSL_F1(log, __builtin_logf) \
    MSL_F1(log2, __builtin_log2f) \
    MSL_F1(log10, __builtin_log10f) \
    MSL_F1(sin, __builtin_sinf) \
    MSL_F1(cos, __builtin_cosf) \
    MSL_F1(tan, __builtin_tanf) \
    MSL_F1(tanh, __builtin_tanhf) \
    MSL_F1(asin, __builtin_asinf) \
    MSL_F1(acos, __builtin_acosf) \
    MSL_F1(atan, __builtin_atanf) \
    MSL_F1(sinh, __builtin_sinhf) \
    MSL_F1(cosh, __builtin_coshf) \
    MSL_F1(sqrt, __builtin_sqrtf) \
    MSL_F1(rsqrt, msl_rsqrtf) \
    MSL_F2(pow, __builtin_powf) \
    MSL_F2(atan2, __builtin_atan2f)
MSL_ALLF1
MSL_F1(floor, __builtin_floorf)
MSL_F1(ceil, __builtin_ceilf)
MSL_F1(round, __builtin_roundf)
MSL_F1(rint, __builtin_rintf)
MSL_F1(trunc, __builtin_truncf)
MSL_F1(fract, msl_fractf)
MSL_F1(fabs, __builtin_fabsf)
MSL_F2(fmin, __builtin_fminf)
MSL_F2(fmax, __builtin_fmaxf)
MSL_F2(fmod, __builtin_fmodf)
MSL_F2(copysign, __builtin_copysignf)
MSL_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
MSL_INLINE half fma(half a, half b, half c) { return (half)__builtin_fmaf(a, b, c); }
MSL_V3(fma)
MSL_INLINE float ldexp(float x, int e) { return __builtin_ldexpf(x, e); }
namespace fast {
using metal::fma;
MSL_ALLF1
MSL_F2(fmax, __builtin_fmaxf)
MSL_F2(max, __builtin_fmaxf)
MSL_F2(min, __builtin_fminf)
MSL_INLINE float divide(float a, float b) { return a / b; }
MSL_INLINE float clamp(float x, float a, float b) { return __builtin_fminf(__builtin_fmaxf(x, a), b); }
} // namespace fast
namespace precise {
using metal::fma;
MSL_ALLF1
MSL_INLINE float divide(float a, float b) { return a / b; }
} // namespace precise
MSL_INLINE bool isnan(float x) { return x != x; }
MSL_INLINE bool isnan(half x) { return x != x; }
MSL_INLINE bool isinf(float x) { return __builtin_isinf(x); }
MSL_INLINE bool isinf(half x) { return __builtin_isinf((float)x); }
MSL_INLINE bool isfinite(float x) { return __builtin_isfinite(x); }
#define MSL_MM(T) \
    MSL_INLINE T min(T a, T b) { return b < a ? b : a; } \
    MSL_INLINE T max(T a, T b) { return a < b ? b : a; } \
    MSL_INLINE T clamp(T x, T a, T b) { return min(max(x, a), b); }
MSL_MM(char)
MSL_MM(signed char)
MSL_MM(uchar)
MSL_MM(short)
MSL_MM(ushort)
MSL_MM(int)
MSL_MM(uint)
MSL_MM(long)
MSL_MM(ulong)
#define MSL_MMF(T) \
    MSL_INLINE T min(T a, T b) { return (T)__builtin_fminf(a, b); } \
    MSL_INLINE T max(T a, T b) { return (T)__builtin_fmaxf(a, b); } \
    MSL_INLINE T clamp(T x, T a, T b) { return min(max(x, a), b); }
MSL_MMF(float)
MSL_MMF(half)
MSL_V2(min)
MSL_V2(max)
MSL_V3(clamp)
template <class T, int N>
MSL_INLINE msl_vec<T, N> clamp(msl_vec<T, N> x, typename msl_id<T>::type a, typename msl_id<T>::type b) {
    for (int i = 0; i < N; i++) x[i] = clamp((T)x[i], a, b);
    return x;
}
template <class T, int N> MSL_INLINE msl_vec<T, N> max(msl_vec<T, N> x, typename msl_id<T>::type a) {
    for (int i = 0; i < N; i++) x[i] = max((T)x[i], a);
    return x;
}
template <class T, int N> MSL_INLINE msl_vec<T, N> min(msl_vec<T, N> x, typename msl_id<T>::type a) {
    for (int i = 0; i < N; i++) x[i] = min((T)x[i], a);
    return x;
}
#define MSL_AB(T) \
    MSL_INLINE T abs(T x) { return x < 0 ? -x : x; }
MSL_AB(int)
MSL_AB(long)
MSL_AB(short)
MSL_INLINE float abs(float x) { return __builtin_fabsf(x); }
MSL_INLINE half abs(half x) { return (half)__builtin_fabsf(x); }
MSL_V1(abs)
MSL_INLINE float saturate(float x) { return clamp(x, 0.0f, 1.0f); }
MSL_INLINE float sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : x; }
MSL_INLINE float mix(float a, float b, float t) { return a + (b - a) * t; }
MSL_INLINE uint popcount(uint x) { return __builtin_popcount(x); }
MSL_INLINE uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
MSL_INLINE uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }
MSL_INLINE uint mulhi(uint a, uint b) { return (uint)((ulong)a * b >> 32); }
MSL_INLINE ulong mulhi(ulong a, ulong b) { return (ulong)((unsigned __int128)a * b >> 64); }
MSL_INLINE uint extract_bits(uint x, uint o, uint b) { return b ? x << (32 - o - b) >> (32 - b) : 0; }
template <class T> MSL_INLINE T select(T a, T b, bool c) { return c ? b : a; }
template <class T, int N> MSL_INLINE T dot(msl_vec<T, N> a, msl_vec<T, N> b) {
    T s = (T)(a[0] * b[0]);
    for (int i = 1; i < N; i++) s += (T)(a[i] * b[i]);
    return s;
}
template <class T, int N> MSL_INLINE T length(msl_vec<T, N> a) { return sqrt(dot(a, a)); }
template <class T, int N> MSL_INLINE bool any(msl_vec<T, N> a) {
    bool r = false;
    for (int i = 0; i < N; i++) r |= a[i] != 0;
    return r;
}
template <class T, int N> MSL_INLINE bool all(msl_vec<T, N> a) {
    bool r = true;
    for (int i = 0; i < N; i++) r &= a[i] != 0;
    return r;
}
template <class T, unsigned long N> struct array {
    T d[N];
    MSL_MEMBER T& operator[](unsigned long i) { return d[i]; }
    MSL_MEMBER const T& operator[](unsigned long i) const { return d[i]; }
};

// ---------------------------------------------------------------- atomics (threads never run at the same
// time here: plain operations are atomic)
enum memory_order { memory_order_relaxed };
template <class T> struct atomic {
    T v;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;
#define MSL_ATOM(AS) \
    template <class T> \
    MSL_NOHOOK static inline T atomic_load_explicit(const volatile AS atomic<T>* p, memory_order, MSL_SITE) { \
        msl_access(MSL_VP(p), sizeof(T), 0, line_); \
        return p->v; \
    } \
    template <class T> \
    MSL_NOHOOK static inline void atomic_store_explicit( \
        volatile AS atomic<T>* p, typename msl_id<T>::type x, memory_order, MSL_SITE) { \
        msl_access(MSL_VP(p), sizeof(T), 1, line_); \
        p->v = x; \
    } \
    template <class T> \
    MSL_NOHOOK static inline T atomic_exchange_explicit( \
        volatile AS atomic<T>* p, typename msl_id<T>::type x, memory_order, MSL_SITE) { \
        msl_access(MSL_VP(p), sizeof(T), 1, line_); \
        T o = p->v; \
        p->v = x; \
        return o; \
    } \
    template <class T> \
    MSL_NOHOOK static inline T atomic_fetch_add_explicit( \
        volatile AS atomic<T>* p, typename msl_id<T>::type x, memory_order, MSL_SITE) { \
        msl_access(MSL_VP(p), sizeof(T), 1, line_); \
        T o = p->v; \
        p->v = o + x; \
        return o; \
    } \
    template <class T> \
    MSL_NOHOOK static inline T atomic_fetch_sub_explicit( \
        volatile AS atomic<T>* p, typename msl_id<T>::type x, memory_order, MSL_SITE) { \
        msl_access(MSL_VP(p), sizeof(T), 1, line_); \
        T o = p->v; \
        p->v = o - x; \
        return o; \
    } \
    template <class T> \
    MSL_NOHOOK static inline T atomic_fetch_max_explicit( \
        volatile AS atomic<T>* p, typename msl_id<T>::type x, memory_order, MSL_SITE) { \
        msl_access(MSL_VP(p), sizeof(T), 1, line_); \
        T o = p->v; \
        p->v = o > x ? o : x; \
        return o; \
    } \
    template <class T> \
    MSL_NOHOOK static inline T atomic_fetch_min_explicit( \
        volatile AS atomic<T>* p, typename msl_id<T>::type x, memory_order, MSL_SITE) { \
        msl_access(MSL_VP(p), sizeof(T), 1, line_); \
        T o = p->v; \
        p->v = o < x ? o : x; \
        return o; \
    } \
    template <class T> \
    MSL_NOHOOK static inline T atomic_fetch_or_explicit( \
        volatile AS atomic<T>* p, typename msl_id<T>::type x, memory_order, MSL_SITE) { \
        msl_access(MSL_VP(p), sizeof(T), 1, line_); \
        T o = p->v; \
        p->v = o | x; \
        return o; \
    }
MSL_ATOM(device)
#ifdef MSL_LINT
MSL_ATOM(threadgroup)
#endif

struct packed_float3 {
    float x, y, z;
    float operator[](int i) const { return (&x)[i]; }
};
typedef float packed_float4 __attribute__((ext_vector_type(4), aligned(4)));
typedef float packed_float2 __attribute__((ext_vector_type(2), aligned(4)));
typedef half packed_half4 __attribute__((ext_vector_type(4), aligned(2)));
typedef half packed_half2 __attribute__((ext_vector_type(2), aligned(2)));
typedef char packed_char4 __attribute__((ext_vector_type(4), aligned(1)));
typedef uchar packed_uchar4 __attribute__((ext_vector_type(4), aligned(1)));
} // namespace metal

// entry glue: build a kernel argument of type T from three unsigned ints
template <class T, int N> struct msl_arg_ {
    static MSL_INLINE T f(const uint* p) {
        T r;
        for (int i = 0; i < N; i++) r[i] = p[i];
        return r;
    }
};
template <class T> struct msl_arg_<T, 1> {
    static MSL_INLINE T f(const uint* p) { return (T)p[0]; }
};
template <class T> MSL_INLINE T msl_arg(const uint* p) { return msl_arg_<T, msl_vt<T>::n>::f(p); }
