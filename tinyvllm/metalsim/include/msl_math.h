// msl_math.h - functions of numbers and of vectors: math, common, integer, relational, geometric, packing.
#pragma once
namespace metal {
// The same function for each element of a vector, with results of type R.
#define MSL_V1R(name, R) \
    template <class T, int N> MSL_INLINE R name(msl_vec<T, N> v) { \
        R r; \
        for (int i = 0; i < N; i++) r[i] = name((T)v[i]); \
        return r; \
    }
#define MSL_V1(name) MSL_V1R(name, MSL_T(msl_vec<T, N>))
#define MSL_T(...) __VA_ARGS__
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
#define MSL_F3(name, fn) \
    MSL_INLINE float name(float x, float y, float z) { return fn(x, y, z); } \
    MSL_INLINE half name(half x, half y, half z) { return (half)fn((float)x, (float)y, (float)z); } \
    MSL_V3(name)

// ---------------------------------------------------------------- math
MSL_INLINE float msl_rsqrtf(float x) { return 1.0f / __builtin_sqrtf(x); }
MSL_INLINE float msl_fractf(float x) { return __builtin_fminf(x - __builtin_floorf(x), 0.99999994f); }
MSL_INLINE float msl_exp10f(float x) { return __builtin_powf(10.0f, x); }
#define MSL_PI(fn, x) (float)fn((double)3.14159265358979323846L * (double)__builtin_fmodf(x, 2.0f))
MSL_INLINE float msl_sinpif(float x) { return x == __builtin_truncf(x) ? x * 0.0f : MSL_PI(__builtin_sin, x); }
MSL_INLINE float msl_cospif(float x) { return MSL_PI(__builtin_cos, x); }
MSL_INLINE float msl_tanpif(float x) { return msl_sinpif(x) / msl_cospif(x); }
MSL_INLINE float msl_fdimf(float x, float y) { return x > y ? x - y : x <= y ? 0.0f : x + y; }
MSL_INLINE float msl_dividef(float x, float y) { return x / y; }
MSL_INLINE float msl_min3f(float x, float y, float z) { return __builtin_fminf(x, __builtin_fminf(y, z)); }
MSL_INLINE float msl_max3f(float x, float y, float z) { return __builtin_fmaxf(x, __builtin_fmaxf(y, z)); }
MSL_INLINE float msl_median3f(float x, float y, float z) {
    return __builtin_fmaxf(__builtin_fminf(x, y), __builtin_fminf(__builtin_fmaxf(x, y), z));
}
MSL_F1(exp, __builtin_expf)
MSL_F1(exp2, __builtin_exp2f)
MSL_F1(exp10, msl_exp10f)
MSL_F1(log, __builtin_logf)
MSL_F1(log2, __builtin_log2f)
MSL_F1(log10, __builtin_log10f)
MSL_F1(sin, __builtin_sinf)
MSL_F1(cos, __builtin_cosf)
MSL_F1(tan, __builtin_tanf)
MSL_F1(sinpi, msl_sinpif)
MSL_F1(cospi, msl_cospif)
MSL_F1(tanpi, msl_tanpif)
MSL_F1(tanh, __builtin_tanhf)
MSL_F1(asin, __builtin_asinf)
MSL_F1(acos, __builtin_acosf)
MSL_F1(atan, __builtin_atanf)
MSL_F1(sinh, __builtin_sinhf)
MSL_F1(cosh, __builtin_coshf)
MSL_F1(asinh, __builtin_asinhf)
MSL_F1(acosh, __builtin_acoshf)
MSL_F1(atanh, __builtin_atanhf)
MSL_F1(sqrt, __builtin_sqrtf)
MSL_F1(rsqrt, msl_rsqrtf)
MSL_F1(floor, __builtin_floorf)
MSL_F1(ceil, __builtin_ceilf)
MSL_F1(round, __builtin_roundf)
MSL_F1(rint, __builtin_rintf)
MSL_F1(trunc, __builtin_truncf)
MSL_F1(fract, msl_fractf)
MSL_F1(fabs, __builtin_fabsf)
MSL_F2(pow, __builtin_powf)
MSL_F2(powr, __builtin_powf)
MSL_F2(atan2, __builtin_atan2f)
MSL_F2(fmin, __builtin_fminf)
MSL_F2(fmax, __builtin_fmaxf)
MSL_F2(fmod, __builtin_fmodf)
MSL_F2(fdim, msl_fdimf)
MSL_F2(copysign, __builtin_copysignf)
MSL_F2(divide, msl_dividef)
MSL_F3(fmin3, msl_min3f)
MSL_F3(fmax3, msl_max3f)
MSL_F3(fmedian3, msl_median3f)
MSL_F2(nextafter, __builtin_nextafterf)
MSL_F3(fma, __builtin_fmaf)
MSL_INLINE float ldexp(float x, int e) { return __builtin_ldexpf(x, e); }
MSL_INLINE half ldexp(half x, int e) { return (half)__builtin_ldexpf((float)x, e); }
template <class T, int N> MSL_INLINE msl_vec<T, N> ldexp(msl_vec<T, N> x, msl_vec<int, N> e) {
    for (int i = 0; i < N; i++) x[i] = ldexp((T)x[i], (int)e[i]);
    return x;
}
MSL_INLINE int ilogb(float x) { return __builtin_ilogbf(x); }
MSL_INLINE int ilogb(half x) { return __builtin_ilogbf((float)x); }
MSL_V1R(ilogb, MSL_T(msl_vec<int, N>))

// Those that give back a second number, through a reference.
#define MSL_SECOND(name, S, of_float) \
    MSL_INLINE float name(float x, thread S(float) & second) { return of_float; } \
    MSL_INLINE half name(half h, thread S(half) & half_second) { \
        float x = (float)h; \
        S(float) second; \
        half r = (half)(of_float); \
        half_second = (S(half))second; \
        return r; \
    } \
    template <class T, int N> \
    MSL_INLINE msl_vec<T, N> name(msl_vec<T, N> v, thread msl_vec<S(T), N>& second) { \
        for (int i = 0; i < N; i++) { \
            S(T) s; \
            v[i] = name((T)v[i], s); \
            second[i] = s; \
        } \
        return v; \
    }
#define MSL_ITSELF(T) T
#define MSL_AN_INT(T) int
MSL_SECOND(modf, MSL_ITSELF, __builtin_modff(x, &second))
MSL_SECOND(frexp, MSL_AN_INT, __builtin_frexpf(x, &second))
MSL_SECOND(sincos, MSL_ITSELF, (second = __builtin_cosf(x), __builtin_sinf(x)))

// ---------------------------------------------------------------- the smaller, the larger
#define MSL_ORDER(T, min_of_two, max_of_two) \
    MSL_INLINE T min(T a, T b) { return (T)(min_of_two); } \
    MSL_INLINE T max(T a, T b) { return (T)(max_of_two); } \
    MSL_INLINE T clamp(T x, T a, T b) { return min(max(x, a), b); } \
    MSL_INLINE T min3(T a, T b, T c) { return min(a, min(b, c)); } \
    MSL_INLINE T max3(T a, T b, T c) { return max(a, max(b, c)); } \
    MSL_INLINE T median3(T a, T b, T c) { return max(min(a, b), min(max(a, b), c)); }
#define MSL_ORDER_INT(T) MSL_ORDER(T, b < a ? b : a, a < b ? b : a)
MSL_ORDER_INT(char)
MSL_ORDER_INT(signed char)
MSL_ORDER_INT(uchar)
MSL_ORDER_INT(short)
MSL_ORDER_INT(ushort)
MSL_ORDER_INT(int)
MSL_ORDER_INT(uint)
MSL_ORDER_INT(long)
MSL_ORDER_INT(ulong)
#define MSL_ORDER_FLOAT(T) MSL_ORDER(T, __builtin_fminf(a, b), __builtin_fmaxf(a, b))
MSL_ORDER_FLOAT(float)
MSL_ORDER_FLOAT(half)
#ifndef MSL_LINT
MSL_ORDER_FLOAT(bfloat)
MSL_INLINE bfloat abs(bfloat x) { return bfloat(__builtin_fabsf(x)); }
MSL_INLINE bfloat fma(bfloat x, bfloat y, bfloat z) { return bfloat(__builtin_fmaf(x, y, z)); }
#endif
MSL_V2(min)
MSL_V2(max)
MSL_V3(clamp)
MSL_V3(min3)
MSL_V3(max3)
MSL_V3(median3)
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
#define MSL_ABS(T) \
    MSL_INLINE T abs(T x) { return x < 0 ? (T)-x : x; }
MSL_ABS(char)
MSL_ABS(short)
MSL_ABS(int)
MSL_ABS(long)
MSL_INLINE float abs(float x) { return __builtin_fabsf(x); }
MSL_INLINE half abs(half x) { return (half)__builtin_fabsf(x); }
MSL_V1(abs)

// ---------------------------------------------------------------- common
MSL_INLINE float msl_signf(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : x == 0 ? x : 0.0f; }
MSL_INLINE float msl_saturatef(float x) { return __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f); }
MSL_INLINE float msl_mixf(float a, float b, float t) { return a + (b - a) * t; }
MSL_INLINE float msl_stepf(float edge, float x) { return x < edge ? 0.0f : 1.0f; }
MSL_INLINE float msl_smoothstepf(float a, float b, float x) {
    float t = msl_saturatef((x - a) / (b - a));
    return t * t * (3.0f - 2.0f * t);
}
MSL_F1(sign, msl_signf)
MSL_F1(saturate, msl_saturatef)
MSL_F2(step, msl_stepf)
MSL_F3(mix, msl_mixf)
MSL_F3(smoothstep, msl_smoothstepf)
template <class T, int N>
MSL_INLINE msl_vec<T, N> mix(msl_vec<T, N> a, msl_vec<T, N> b, typename msl_id<T>::type t) {
    return a + (b - a) * t;
}
namespace fast { // the same here: Apple's differ in the last digits
using namespace metal;
}
namespace precise {
using namespace metal;
}

// ---------------------------------------------------------------- integer
#define MSL_INT typename enable_if<is_integral<T>::value, T>::type
template <class T> constexpr int msl_bits = (int)sizeof(T) * 8;
template <class T> MSL_INLINE MSL_INT popcount(T x) { return (T)__builtin_popcountll((make_unsigned_t<T>)x); }
template <class T> MSL_INLINE MSL_INT clz(T x) {
    return (T)(x ? __builtin_clzll((make_unsigned_t<T>)x) - (64 - msl_bits<T>) : msl_bits<T>);
}
template <class T> MSL_INLINE MSL_INT ctz(T x) {
    return (T)(x ? __builtin_ctzll((make_unsigned_t<T>)x) : msl_bits<T>);
}
template <class T> MSL_INLINE MSL_INT reverse_bits(T x) {
    return (T)(__builtin_bitreverse64((ulong)x) >> (64 - msl_bits<T>));
}
template <class T> MSL_INLINE MSL_INT rotate(T x, typename msl_id<T>::type n) {
    typedef make_unsigned_t<T> U;
    uint k = (uint)n & (msl_bits<T> - 1);
    return k ? (T)((U)((U)x << k) | (U)((U)x >> (msl_bits<T> - k))) : x;
}
template <class T> MSL_INLINE MSL_INT mulhi(T x, typename msl_id<T>::type y) {
    return (T)((__int128)x * y >> msl_bits<T>);
}
MSL_INLINE ulong mulhi(ulong x, ulong y) { return (ulong)((unsigned __int128)x * y >> 64); }
template <class T>
MSL_INLINE MSL_INT madhi(T x, typename msl_id<T>::type y, typename msl_id<T>::type z) {
    return (T)(mulhi(x, y) + z);
}
template <class T> MSL_INLINE MSL_INT msl_saturated(__int128 x) {
    typedef numeric_limits<T> L;
    return x < (__int128)L::lowest() ? L::lowest() : x > (__int128)L::max() ? L::max() : (T)x;
}
template <class T> MSL_INLINE MSL_INT addsat(T x, typename msl_id<T>::type y) {
    return msl_saturated<T>((__int128)x + y);
}
template <class T> MSL_INLINE MSL_INT subsat(T x, typename msl_id<T>::type y) {
    return msl_saturated<T>((__int128)x - y);
}
template <class T>
MSL_INLINE MSL_INT madsat(T x, typename msl_id<T>::type y, typename msl_id<T>::type z) {
    __int128 limit = (__int128)1 << 126, product = (__int128)x * y; // below 2^128 without a sign
    if (!is_signed<T>::value && (product < 0 || product > limit)) product = limit;
    return msl_saturated<T>(product + z);
}
template <class T> MSL_INLINE MSL_INT hadd(T x, typename msl_id<T>::type y) { return (T)(((__int128)x + y) >> 1); }
template <class T> MSL_INLINE MSL_INT rhadd(T x, typename msl_id<T>::type y) { return (T)(((__int128)x + y + 1) >> 1); }
template <class T> MSL_INLINE make_unsigned_t<MSL_INT> absdiff(T x, typename msl_id<T>::type y) {
    return (make_unsigned_t<T>)(x > y ? (__int128)x - y : (__int128)y - x);
}
MSL_INLINE int mul24(int x, int y) { return (int)((uint)(x << 8 >> 8) * (uint)(y << 8 >> 8)); }
MSL_INLINE uint mul24(uint x, uint y) { return (x & 0xffffff) * (y & 0xffffff); }
MSL_INLINE int mad24(int x, int y, int z) { return (int)((uint)mul24(x, y) + (uint)z); }
MSL_INLINE uint mad24(uint x, uint y, uint z) { return mul24(x, y) + z; }
template <class T> MSL_INLINE MSL_INT extract_bits(T x, uint offset, uint bits) {
    if (!bits) return 0;
    typedef make_unsigned_t<T> U;
    return (T)((T)(U)((U)x << (msl_bits<T> - offset - bits)) >> (msl_bits<T> - bits));
}
template <class T>
MSL_INLINE MSL_INT insert_bits(T base, typename msl_id<T>::type x, uint offset, uint bits) {
    ulong mask = (bits < 64 ? (1ul << bits) - 1 : ~0ul) << offset;
    return (T)(((ulong)base & ~mask) | ((ulong)x << offset & mask));
}
MSL_V1(popcount)
MSL_V1(clz)
MSL_V1(ctz)
MSL_V1(reverse_bits)
MSL_V2(rotate)
MSL_V2(mulhi)
MSL_V3(madhi)
MSL_V2(addsat)
MSL_V2(subsat)
MSL_V3(madsat)
MSL_V2(hadd)
MSL_V2(rhadd)
MSL_V2(mul24)
MSL_V3(mad24)
template <class T, int N>
MSL_INLINE msl_vec<make_unsigned_t<T>, N> absdiff(msl_vec<T, N> a, msl_vec<T, N> b) {
    msl_vec<make_unsigned_t<T>, N> r;
    for (int i = 0; i < N; i++) r[i] = absdiff((T)a[i], (T)b[i]);
    return r;
}
template <class T, int N> MSL_INLINE msl_vec<T, N> extract_bits(msl_vec<T, N> x, uint offset, uint bits) {
    for (int i = 0; i < N; i++) x[i] = extract_bits((T)x[i], offset, bits);
    return x;
}
template <class T, int N>
MSL_INLINE msl_vec<T, N> insert_bits(msl_vec<T, N> base, msl_vec<T, N> x, uint offset, uint bits) {
    for (int i = 0; i < N; i++) base[i] = insert_bits((T)base[i], (T)x[i], offset, bits);
    return base;
}

// ---------------------------------------------------------------- relational
template <int N> struct msl_bools;
template <> struct msl_bools<2> {
    typedef bool2 type;
};
template <> struct msl_bools<3> {
    typedef bool3 type;
};
template <> struct msl_bools<4> {
    typedef bool4 type;
};
#define MSL_IS1(name, of_float) \
    MSL_INLINE bool name(float x) { return of_float; } \
    MSL_INLINE bool name(half h) { \
        float x = (float)h; \
        return of_float; \
    } \
    MSL_V1R(name, typename msl_bools<N>::type)
MSL_IS1(isnan, x != x)
MSL_IS1(isinf, __builtin_isinf(x))
MSL_IS1(isfinite, __builtin_isfinite(x))
MSL_IS1(signbit, __builtin_signbitf(x) != 0)
MSL_INLINE bool isnormal(float x) { return __builtin_isnormal(x); }
MSL_INLINE bool isnormal(half x) { return __builtin_isfinite((float)x) && __builtin_fabsf((float)x) >= HALF_MIN; }
MSL_V1R(isnormal, typename msl_bools<N>::type)
#define MSL_IS2(name, of_float) \
    MSL_INLINE bool name(float x, float y) { return of_float; } \
    MSL_INLINE bool name(half x, half y) { return of_float; } \
    template <class T, int N> MSL_INLINE typename msl_bools<N>::type name(msl_vec<T, N> a, msl_vec<T, N> b) { \
        typename msl_bools<N>::type r; \
        for (int i = 0; i < N; i++) r[i] = name((T)a[i], (T)b[i]); \
        return r; \
    }
MSL_IS2(isordered, x == x && y == y)
MSL_IS2(isunordered, x != x || y != y)
template <class T> MSL_INLINE T select(T a, T b, bool c) { return c ? b : a; }
#define MSL_BOOLS(V, N) \
    template <class T> MSL_INLINE msl_vec<T, N> select(msl_vec<T, N> a, msl_vec<T, N> b, V c) { \
        for (int i = 0; i < N; i++) a[i] = c[i] ? b[i] : a[i]; \
        return a; \
    } \
    MSL_INLINE bool any(V v) { \
        bool r = false; \
        for (int i = 0; i < N; i++) r |= v[i]; \
        return r; \
    } \
    MSL_INLINE bool all(V v) { \
        bool r = true; \
        for (int i = 0; i < N; i++) r &= v[i]; \
        return r; \
    }
MSL_BOOLS(bool2, 2)
MSL_BOOLS(bool3, 3)
MSL_BOOLS(bool4, 4)
// What clang has made of a comparison: a vector of integers.
template <class T, class C, int N>
MSL_INLINE msl_vec<T, N> select(msl_vec<T, N> a, msl_vec<T, N> b, msl_vec<C, N> c) {
    for (int i = 0; i < N; i++) a[i] = c[i] ? b[i] : a[i];
    return a;
}
template <class T, int N> MSL_INLINE bool any(msl_vec<T, N> v) { return any(typename msl_bools<N>::type(v)); }
template <class T, int N> MSL_INLINE bool all(msl_vec<T, N> v) { return all(typename msl_bools<N>::type(v)); }
MSL_INLINE bool any(bool b) { return b; }
MSL_INLINE bool all(bool b) { return b; }

// ---------------------------------------------------------------- geometric
template <class T, int N> MSL_INLINE T dot(msl_vec<T, N> a, msl_vec<T, N> b) {
    T s = (T)(a[0] * b[0]);
    for (int i = 1; i < N; i++) s += (T)(a[i] * b[i]);
    return s;
}
template <class T, int N> MSL_INLINE T length_squared(msl_vec<T, N> a) { return dot(a, a); }
template <class T, int N> MSL_INLINE T length(msl_vec<T, N> a) { return sqrt(dot(a, a)); }
template <class T, int N> MSL_INLINE T distance_squared(msl_vec<T, N> a, msl_vec<T, N> b) {
    return length_squared<T, N>(a - b);
}
template <class T, int N> MSL_INLINE T distance(msl_vec<T, N> a, msl_vec<T, N> b) { return length<T, N>(a - b); }
template <class T, int N> MSL_INLINE msl_vec<T, N> normalize(msl_vec<T, N> a) { return a * rsqrt(dot(a, a)); }
template <class T> MSL_INLINE msl_vec<T, 3> cross(msl_vec<T, 3> a, msl_vec<T, 3> b) {
    return a.yzx * b.zxy - a.zxy * b.yzx;
}
template <class T, int N>
MSL_INLINE msl_vec<T, N> faceforward(msl_vec<T, N> n, msl_vec<T, N> i, msl_vec<T, N> reference) {
    return dot(reference, i) < (T)0 ? n : -n;
}
template <class T, int N> MSL_INLINE msl_vec<T, N> reflect(msl_vec<T, N> i, msl_vec<T, N> n) {
    return i - n * ((T)2 * dot(n, i));
}
template <class T, int N>
MSL_INLINE msl_vec<T, N> refract(msl_vec<T, N> i, msl_vec<T, N> n, typename msl_id<T>::type eta) {
    T d = dot(n, i), k = (T)1 - eta * eta * ((T)1 - d * d);
    return k < (T)0 ? msl_vec<T, N>((T)0) : i * eta - n * (eta * d + sqrt(k));
}

// ---------------------------------------------------------------- packing: the lowest bits hold the first element
#define MSL_UNPACK(name, T, N, I, BITS, SCALE) \
    MSL_INLINE msl_vec<T, N> unpack_##name(uint x) { \
        msl_vec<T, N> r; \
        for (int i = 0; i < N; i++) r[i] = (T)__builtin_fmaxf((float)(I)(x >> i * BITS) / SCALE, -1.0f); \
        return r; \
    }
#define MSL_PACK(name, T, N, LOW, BITS, SCALE) \
    MSL_INLINE uint pack_##name(msl_vec<T, N> v) { \
        uint r = 0; \
        for (int i = 0; i < N; i++) { \
            float x = __builtin_fminf(__builtin_fmaxf((float)v[i], LOW), 1.0f); \
            r |= ((uint)(int)__builtin_rintf(x * SCALE) & ((1u << BITS) - 1)) << i * BITS; \
        } \
        return r; \
    }
#define MSL_PACKING(T) \
    MSL_UNPACK(unorm4x8_to_##T, T, 4, uchar, 8, 255.0f) \
    MSL_UNPACK(snorm4x8_to_##T, T, 4, signed char, 8, 127.0f) \
    MSL_UNPACK(unorm2x16_to_##T, T, 2, ushort, 16, 65535.0f) \
    MSL_UNPACK(snorm2x16_to_##T, T, 2, short, 16, 32767.0f) \
    MSL_PACK(T##_to_unorm4x8, T, 4, 0.0f, 8, 255.0f) \
    MSL_PACK(T##_to_snorm4x8, T, 4, -1.0f, 8, 127.0f) \
    MSL_PACK(T##_to_unorm2x16, T, 2, 0.0f, 16, 65535.0f) \
    MSL_PACK(T##_to_snorm2x16, T, 2, -1.0f, 16, 32767.0f)
MSL_PACKING(float)
MSL_PACKING(half)
} // namespace metal
