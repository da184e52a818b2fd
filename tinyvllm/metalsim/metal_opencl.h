// Metal's standard library (compute), declared in C++ for OpenCL: for the linter, which compiles but never runs.
// The address spaces are clang's own, so they are as strict as on a Mac; what Metal lacks isn't declared here.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable

// ---------------------------------------------------------------- words
#define device __global
#define threadgroup __local
#define thread __private
#define kernel __attribute__((annotate("kernel")))
#define vertex __attribute__((annotate("vertex")))
#define fragment __attribute__((annotate("fragment")))
#define METAL_FUNC inline __attribute__((always_inline))
#define coherent(scope)
// Words of OpenCL that are plain names in Metal.
#define global metal_global
#define local metal_local
#define generic metal_generic
#define pipe metal_pipe
#define uniform metal_uniform
#define read_only metal_read_only
#define write_only metal_write_only
#define read_write metal_read_write
#define atomic_int metal_atomic_int
#define atomic_uint metal_atomic_uint
#define atomic_ulong metal_atomic_ulong
#define atomic_float metal_atomic_float
#define atomic_bool metal_atomic_bool
#define memory_order metal_memory_order
#define __METAL__ 1
#define __METAL_MACOS__ 1
#define __METAL_VERSION__ 320
#define __HAVE_BFLOAT__ 1
#undef __OPENCL_VERSION__

// A threadgroup variable: a reference, which any function may declare; `size` is read from the syntax tree.
threadgroup void* threadgroup_storage();
#define MSL_TG(name, dims, ...) \
    typedef __VA_ARGS__ threadgroup_type_##name dims; \
    enum { threadgroup_size_##name = sizeof(threadgroup_type_##name) }; \
    threadgroup threadgroup_type_##name& name = *(threadgroup threadgroup_type_##name*)threadgroup_storage();

// ---------------------------------------------------------------- types
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef unsigned long size_t;
typedef unsigned long uintptr_t;
typedef long intptr_t;
typedef long ptrdiff_t;
typedef char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;

namespace metal {
template <class T> struct remove_const { typedef T type; };
template <class T> struct remove_const<const T> { typedef T type; };
template <class T> struct remove_volatile { typedef T type; };
template <class T> struct remove_volatile<volatile T> { typedef T type; };
template <class T> struct remove_address_space { typedef T type; };
template <class T> struct remove_address_space<device T> { typedef T type; };
template <class T> struct remove_address_space<threadgroup T> { typedef T type; };
template <class T> struct remove_address_space<thread T> { typedef T type; };
template <class T> struct remove_address_space<constant T> { typedef T type; };
template <class T> struct remove_cv {
    typedef typename remove_const<typename remove_volatile<T>::type>::type type;
};
template <class T> struct remove_reference { typedef typename remove_address_space<T>::type type; };
template <class T> struct remove_reference<thread T&> { typedef T type; };
template <class T> struct remove_reference<device T&> { typedef T type; };
template <class T> struct remove_reference<threadgroup T&> { typedef T type; };
template <class T> struct remove_reference<constant T&> { typedef T type; };
template <class T> struct remove_pointer { typedef T type; };
template <class T> struct remove_pointer<thread T*> { typedef T type; };
template <class T> struct remove_pointer<device T*> { typedef T type; };
template <class T> struct remove_pointer<threadgroup T*> { typedef T type; };
template <class T> struct remove_pointer<constant T*> { typedef T type; };
template <class T> struct decay { typedef typename remove_cv<typename remove_reference<T>::type>::type type; };
template <class T> using remove_const_t = typename remove_const<T>::type;
template <class T> using remove_cv_t = typename remove_cv<T>::type;
template <class T> using remove_reference_t = typename remove_reference<T>::type;
template <class T> using remove_pointer_t = typename remove_pointer<T>::type;
template <class T> using remove_addrspace_t = typename remove_address_space<T>::type;
template <class T> using decay_t = typename decay<T>::type;
template <bool C, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { typedef T type; };
template <bool C, class T = void> using enable_if_t = typename enable_if<C, T>::type;
template <bool C, class A, class B> struct conditional { typedef A type; };
template <class A, class B> struct conditional<false, A, B> { typedef B type; };
template <bool C, class A, class B> using conditional_t = typename conditional<C, A, B>::type;
template <class T, T V> struct integral_constant {
    static constant constexpr const T value = V;
    typedef T value_type;
    typedef integral_constant type;
    constexpr operator T() const { return V; }
    constexpr T operator()() const { return V; }
};
template <bool V> using bool_constant = integral_constant<bool, V>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;
template <class... T> struct _disjunction : false_type {};
template <class A, class... B> struct _disjunction<A, B...> : bool_constant<A::value || _disjunction<B...>::value> {};
template <class A, class B> struct is_same_bare : false_type {};
template <class A> struct is_same_bare<A, A> : true_type {};
template <class A, class B>
struct is_same : is_same_bare<typename remove_address_space<A>::type, typename remove_address_space<B>::type> {};
template <class A, class... B> struct is_one_of : false_type {};
template <class A, class B, class... C> struct is_one_of<A, B, C...>
    : bool_constant<is_same<A, B>::value || is_one_of<A, C...>::value> {};
template <class T> struct is_pointer : bool_constant<__is_pointer(T)> {};
template <class T> struct is_enum : bool_constant<__is_enum(T)> {};
template <class T> struct is_class : bool_constant<__is_class(T)> {};
template <class T> struct is_void : bool_constant<__is_void(T)> {};
template <class T> struct is_const : bool_constant<__is_const(T)> {};
template <class T> struct is_trivial : bool_constant<__is_trivial(T)> {};
template <class A, class B> struct is_base_of : bool_constant<__is_base_of(A, B)> {};
template <class A, class B> struct is_convertible : bool_constant<__is_convertible_to(A, B)> {};
template <class T, class... A> struct is_constructible : bool_constant<__is_constructible(T, A...)> {};

} // namespace metal

// clang has another half beside OpenCL's, which plays bfloat; the linter finds where one becomes the other.
typedef _Float16 bfloat;
typedef bfloat bfloat16_t;
typedef half float16_t;

template <class T, int N> using metal_vec = T __attribute__((ext_vector_type(N)));
// Comparisons of vectors make vectors of int here, of bool in Metal.
#define VECTORS(T) \
    typedef T T##2 __attribute__((ext_vector_type(2))); \
    typedef T T##3 __attribute__((ext_vector_type(3))); \
    typedef T T##4 __attribute__((ext_vector_type(4)));
VECTORS(char) VECTORS(uchar) VECTORS(short) VECTORS(ushort) VECTORS(int) VECTORS(uint) VECTORS(long) VECTORS(ulong)
VECTORS(half) VECTORS(float) VECTORS(bfloat)
typedef int bool2 __attribute__((ext_vector_type(2)));
typedef int bool3 __attribute__((ext_vector_type(3)));
typedef int bool4 __attribute__((ext_vector_type(4)));

namespace metal {
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
// Element and number of components of a scalar or a vector.
template <class T> struct shape_bare { typedef T element; enum { n = 1 }; };
template <class T, int N> struct shape_bare<metal_vec<T, N>> { typedef T element; enum { n = N }; };
template <class T> struct shape : shape_bare<typename remove_cv<typename remove_address_space<T>::type>::type> {};
template <class T> using element_t = typename shape<T>::element;
template <class... A> struct count { enum { n = 0 }; };
template <class A, class... R> struct count<A, R...> { enum { n = (int)shape<A>::n + (int)count<R...>::n }; };
template <class T> struct identity { typedef T type; };
template <class T> using same_t = typename identity<T>::type;

template <class T> struct is_floating_point : is_one_of<remove_cv_t<T>, float, half, bfloat> {};
template <class T> struct is_integral : is_one_of<remove_cv_t<T>, bool, char, uchar, short, ushort, int, uint,
    long, ulong> {};
template <class T> struct is_unsigned : is_one_of<remove_cv_t<T>, bool, uchar, ushort, uint, ulong> {};
template <class T> struct is_signed : is_one_of<remove_cv_t<T>, char, int8_t, short, int, long, float, half, bfloat> {};
template <class T> struct is_arithmetic : bool_constant<is_integral<T>::value || is_floating_point<T>::value> {};
template <class T> struct is_scalar : is_arithmetic<T> {};
template <class T> struct is_vector : bool_constant<(shape<T>::n > 1)> {};
template <class T> struct make_scalar { typedef element_t<T> type; };
template <class T> using make_scalar_t = typename make_scalar<T>::type;
template <class T> struct make_unsigned { typedef T type; };
template <> struct make_unsigned<char> { typedef uchar type; };
template <> struct make_unsigned<short> { typedef ushort type; };
template <> struct make_unsigned<int> { typedef uint type; };
template <> struct make_unsigned<long> { typedef ulong type; };
template <class T> using make_unsigned_t = typename make_unsigned<T>::type;
template <class T> struct make_signed { typedef T type; };
template <> struct make_signed<uchar> { typedef char type; };
template <> struct make_signed<ushort> { typedef short type; };
template <> struct make_signed<uint> { typedef int type; };
template <> struct make_signed<ulong> { typedef long type; };
template <class T> using make_signed_t = typename make_signed<T>::type;
#define VALUE(name) template <class T> constant constexpr const bool name##_v = name<T>::value;
VALUE(is_pointer) VALUE(is_enum) VALUE(is_class) VALUE(is_void) VALUE(is_const) VALUE(is_trivial)
VALUE(is_floating_point) VALUE(is_integral) VALUE(is_unsigned) VALUE(is_signed) VALUE(is_arithmetic) VALUE(is_scalar)
VALUE(is_vector)
#undef VALUE
template <class A, class B> constant constexpr const bool is_same_v = is_same<A, B>::value;
template <class A, class B> constant constexpr const bool is_convertible_v = is_convertible<A, B>::value;
template <class A, class B> constant constexpr const bool is_base_of_v = is_base_of<A, B>::value;
template <class T, class... A> constant constexpr const bool is_constructible_v = is_constructible<T, A...>::value;
template <class T> T declval();
template <class T> constexpr thread T&& forward(thread T&);
template <class T> T move(T);
} // namespace metal

// float4(a, b.xy, c): one number for all components, or one for each.
template <class V, class... A> constexpr V make_vector(A...) {
    static_assert(sizeof...(A) == 0 || metal::count<A...>::n == metal::shape<V>::n ||
            (sizeof...(A) == 1 && metal::count<A...>::n == 1),
        "wrong number of components in a vector constructor");
    return V();
}
#define char2(...) make_vector<char2>(__VA_ARGS__)
#define char3(...) make_vector<char3>(__VA_ARGS__)
#define char4(...) make_vector<char4>(__VA_ARGS__)
#define uchar2(...) make_vector<uchar2>(__VA_ARGS__)
#define uchar3(...) make_vector<uchar3>(__VA_ARGS__)
#define uchar4(...) make_vector<uchar4>(__VA_ARGS__)
#define short2(...) make_vector<short2>(__VA_ARGS__)
#define short3(...) make_vector<short3>(__VA_ARGS__)
#define short4(...) make_vector<short4>(__VA_ARGS__)
#define ushort2(...) make_vector<ushort2>(__VA_ARGS__)
#define ushort3(...) make_vector<ushort3>(__VA_ARGS__)
#define ushort4(...) make_vector<ushort4>(__VA_ARGS__)
#define int2(...) make_vector<int2>(__VA_ARGS__)
#define int3(...) make_vector<int3>(__VA_ARGS__)
#define int4(...) make_vector<int4>(__VA_ARGS__)
#define uint2(...) make_vector<uint2>(__VA_ARGS__)
#define uint3(...) make_vector<uint3>(__VA_ARGS__)
#define uint4(...) make_vector<uint4>(__VA_ARGS__)
#define long2(...) make_vector<long2>(__VA_ARGS__)
#define long3(...) make_vector<long3>(__VA_ARGS__)
#define long4(...) make_vector<long4>(__VA_ARGS__)
#define ulong2(...) make_vector<ulong2>(__VA_ARGS__)
#define ulong3(...) make_vector<ulong3>(__VA_ARGS__)
#define ulong4(...) make_vector<ulong4>(__VA_ARGS__)
#define half2(...) make_vector<half2>(__VA_ARGS__)
#define half3(...) make_vector<half3>(__VA_ARGS__)
#define half4(...) make_vector<half4>(__VA_ARGS__)
#define float2(...) make_vector<float2>(__VA_ARGS__)
#define float3(...) make_vector<float3>(__VA_ARGS__)
#define float4(...) make_vector<float4>(__VA_ARGS__)
#define bfloat2(...) make_vector<bfloat2>(__VA_ARGS__)
#define bfloat3(...) make_vector<bfloat3>(__VA_ARGS__)
#define bfloat4(...) make_vector<bfloat4>(__VA_ARGS__)
#define bool2(...) make_vector<bool2>(__VA_ARGS__)
#define bool3(...) make_vector<bool3>(__VA_ARGS__)
#define bool4(...) make_vector<bool4>(__VA_ARGS__)

// ---------------------------------------------------------------- constants
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define HUGE_VALH ((half)__builtin_inff())
#define MAXFLOAT 3.402823466e+38f
#define MAXHALF ((half)65504.0f)
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define FLT_DIG 6
#define FLT_MANT_DIG 24
#define FLT_MAX_EXP 128
#define FLT_MIN_EXP (-125)
#define FLT_RADIX 2
#define HALF_MAX ((half)65504.0f)
#define HALF_MIN ((half)6.103515625e-05f)
#define HALF_EPSILON ((half)0.0009765625f)
#define HALF_DIG 3
#define HALF_MANT_DIG 11
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.43429448190325182765f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_PI_4_F 0.78539816339744830962f
#define M_1_PI_F 0.31830988618379067154f
#define M_2_PI_F 0.63661977236758134308f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
#define M_PI_H ((half)M_PI_F)
#define M_E_H ((half)M_E_F)
#define CHAR_BIT 8
#define SCHAR_MAX 127
#define SCHAR_MIN (-127 - 1)
#define CHAR_MAX 127
#define CHAR_MIN (-127 - 1)
#define UCHAR_MAX 255
#define SHRT_MAX 32767
#define SHRT_MIN (-32767 - 1)
#define USHRT_MAX 65535
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define LONG_MAX 9223372036854775807l
#define LONG_MIN (-9223372036854775807l - 1)
#define ULONG_MAX 18446744073709551615ul

namespace metal {
template <class T> struct numeric_limits {
    static constant constexpr const bool is_specialized = true, is_signed = is_signed_v<T>,
        is_integer = is_integral_v<T>, is_exact = is_integral_v<T>, has_infinity = is_floating_point_v<T>,
        has_quiet_NaN = is_floating_point_v<T>;
    static constant constexpr const int digits = 0, digits10 = 0, max_digits10 = 0, radix = 2, max_exponent = 0,
        min_exponent = 0;
    static constexpr T min() { return T(0); }
    static constexpr T max() { return T(0); }
    static constexpr T lowest() { return T(0); }
    static constexpr T epsilon() { return T(0); }
    static constexpr T infinity() { return T(0); }
    static constexpr T quiet_NaN() { return T(0); }
    static constexpr T denorm_min() { return T(0); }
};
using ::float2; using ::float3; using ::float4; using ::half2; using ::half3; using ::half4;
using ::bool2; using ::bool3; using ::bool4; using ::bfloat2; using ::bfloat3; using ::bfloat4;
using ::char2; using ::char3; using ::char4; using ::uchar2; using ::uchar3; using ::uchar4;
using ::short2; using ::short3; using ::short4; using ::ushort2; using ::ushort3; using ::ushort4;
using ::int2; using ::int3; using ::int4; using ::uint2; using ::uint3; using ::uint4;
using ::long2; using ::long3; using ::long4; using ::ulong2; using ::ulong3; using ::ulong4;
using ::bfloat; using ::uchar; using ::ushort; using ::uint; using ::ulong; using ::make_vector;
using ::int8_t; using ::uint8_t; using ::int16_t; using ::uint16_t; using ::int32_t; using ::uint32_t;
using ::int64_t; using ::uint64_t; using ::size_t; using ::ptrdiff_t;

// ---------------------------------------------------------------- mathematics: float, half, and vectors of them
template <class T> using if_float = enable_if_t<is_one_of<T, float, half, bfloat>::value, T>;
#define ONE(name, T) T name(T);
#define TWO(name, T) T name(T, T);
#define THREE(name, T) T name(T, T, T);
#define EACH_SIZE(M, name, T) M(name, T) M(name, T##2) M(name, T##3) M(name, T##4)
#define F1(name) EACH_SIZE(ONE, name, float) EACH_SIZE(ONE, name, half) EACH_SIZE(ONE, name, bfloat)
#define F2(name) EACH_SIZE(TWO, name, float) EACH_SIZE(TWO, name, half) EACH_SIZE(TWO, name, bfloat)
#define F3(name) EACH_SIZE(THREE, name, float) EACH_SIZE(THREE, name, half) EACH_SIZE(THREE, name, bfloat)
#define MATH \
    F1(acos) F1(acosh) F1(asin) F1(asinh) F1(atan) F1(atanh) F1(ceil) F1(cos) F1(cosh) F1(cospi) F1(exp) F1(exp2) \
    F1(exp10) F1(fabs) F1(floor) F1(fract) F1(log) F1(log2) F1(log10) F1(rint) F1(round) F1(rsqrt) F1(sin) F1(sinh) \
    F1(sinpi) F1(sqrt) F1(tan) F1(tanh) F1(tanpi) F1(trunc) F1(saturate) F1(sign) F1(normalize) \
    F2(atan2) F2(copysign) F2(fdim) F2(fmax) F2(fmin) F2(fmod) F2(pow) F2(powr) F2(nextafter) F2(step) F2(divide) \
    F3(fma) F3(fmax3) F3(fmin3) F3(fmedian3) F3(mix) F3(smoothstep)
MATH
float fma(half, float, float);
#define OUT(name, S) \
    float name(float, thread S(float)&); \
    half name(half, thread S(half)&); \
    template <class T, int N> metal_vec<if_float<T>, N> name(metal_vec<T, N>, thread metal_vec<S(T), N>&);
#define SAME(T) T
#define INT(T) int
OUT(modf, SAME) OUT(sincos, SAME) OUT(frexp, INT)
#undef OUT
float ldexp(float, int);
half ldexp(half, int);
template <class T, int N> metal_vec<if_float<T>, N> ldexp(metal_vec<T, N>, metal_vec<int, N>);
int ilogb(float);
int ilogb(half);
#define TEST(name) \
    bool name(float); \
    bool name(half); \
    bool name(bfloat); \
    template <class T, int N> metal_vec<int, N> name(metal_vec<T, N>);
TEST(isnan) TEST(isinf) TEST(isfinite) TEST(isnormal) TEST(signbit)
#undef TEST
bool isunordered(float, float);
bool isordered(float, float);
template <class T, int N> T dot(metal_vec<T, N>, metal_vec<T, N>);
template <class T, int N> T length(metal_vec<T, N>);
template <class T, int N> T length_squared(metal_vec<T, N>);
template <class T, int N> T distance(metal_vec<T, N>, metal_vec<T, N>);
template <class T, int N> T distance_squared(metal_vec<T, N>, metal_vec<T, N>);
template <class T> metal_vec<if_float<T>, 3> cross(metal_vec<T, 3>, metal_vec<T, 3>);
template <class T, int N> metal_vec<if_float<T>, N> reflect(metal_vec<T, N>, metal_vec<T, N>);
template <class T, int N> metal_vec<if_float<T>, N> refract(metal_vec<T, N>, metal_vec<T, N>, same_t<T>);
template <class T, int N> metal_vec<if_float<T>, N> faceforward(metal_vec<T, N>, metal_vec<T, N>, metal_vec<T, N>);

// ---------------------------------------------------------------- any number, and whole numbers
#define N1(name, T) EACH_SIZE(ONE, name, T)
#define N2(name, T) EACH_SIZE(TWO, name, T)
#define N3(name, T) EACH_SIZE(THREE, name, T)
#define NUMBER(T) N1(abs, T) N2(min, T) N2(max, T) N3(clamp, T) N3(min3, T) N3(max3, T) N3(median3, T)
#define EXTRACT(name, T) T name(T, uint, uint);
#define INSERT(name, T) T name(T, T, uint, uint);
#define WHOLE(T) \
    N2(absdiff, T) N2(addsat, T) N2(subsat, T) N2(hadd, T) N2(rhadd, T) N2(mulhi, T) N2(rotate, T) N3(madhi, T) \
    N3(madsat, T) N1(clz, T) N1(ctz, T) N1(popcount, T) N1(reverse_bits, T) \
    EACH_SIZE(EXTRACT, extract_bits, T) EACH_SIZE(INSERT, insert_bits, T)
#define EACH_WHOLE(M) M(char) M(uchar) M(short) M(ushort) M(int) M(uint) M(long) M(ulong)
EACH_WHOLE(NUMBER) EACH_WHOLE(WHOLE) NUMBER(float) NUMBER(half) NUMBER(bfloat)
int mul24(int, int);
uint mul24(uint, uint);
int mad24(int, int, int);
uint mad24(uint, uint, uint);

// ---------------------------------------------------------------- choice and comparison
#define CHOOSE(name, T) T name(T, T, bool);
#define SELECT(T) EACH_SIZE(CHOOSE, select, T)
EACH_WHOLE(SELECT) SELECT(float) SELECT(half) SELECT(bfloat)
bool select(bool, bool, bool);
template <class T, class B, int N> metal_vec<T, N> select(metal_vec<T, N>, metal_vec<T, N>, metal_vec<B, N>);
template <class T, int N> bool any(metal_vec<T, N>);
template <class T, int N> bool all(metal_vec<T, N>);
bool any(bool);
bool all(bool);

template <class To, class From> To as_type(From) {
    static_assert(sizeof(To) == sizeof(From), "as_type: the sizes differ");
    return To();
}

namespace fast {
MATH
NUMBER(float)
NUMBER(half)
} // namespace fast
namespace precise {
MATH
NUMBER(float)
NUMBER(half)
} // namespace precise
#undef MATH

// ---------------------------------------------------------------- packed vectors, arrays, matrices
// A member for each address space of its object.
#define SUBSCRIPT(T) \
    device T& operator[](size_t) device; \
    threadgroup T& operator[](size_t) threadgroup; \
    thread T& operator[](size_t) thread; \
    const device T& operator[](size_t) const device; \
    const threadgroup T& operator[](size_t) const threadgroup; \
    const thread T& operator[](size_t) const thread; \
    const constant T& operator[](size_t) const constant;
template <class T, size_t N> struct array {
    T values[N];
    SUBSCRIPT(T)
    constexpr size_t size() const { return N; }
    constexpr size_t size() const constant { return N; }
    constexpr bool empty() const { return N == 0; }
    thread T* data() thread;
    const thread T* data() const thread;
    thread T* begin() thread;
    thread T* end() thread;
};
} // namespace metal
template <class T, int N> struct packed_vector {
    T values[N];
    packed_vector() = default;
    packed_vector(metal_vec<T, N>);
    packed_vector(T);
    template <class... A> packed_vector(T, T, A...);
    operator metal_vec<T, N>() const;
    operator metal_vec<T, N>() const constant;
    SUBSCRIPT(T)
};
#define PACKED(T) \
    struct packed_##T##2 : packed_vector<T, 2> { using packed_vector<T, 2>::packed_vector; T x, y; }; \
    struct packed_##T##3 : packed_vector<T, 3> { using packed_vector<T, 3>::packed_vector; T x, y, z; }; \
    struct packed_##T##4 : packed_vector<T, 4> { using packed_vector<T, 4>::packed_vector; T x, y, z, w; };
PACKED(char) PACKED(uchar) PACKED(short) PACKED(ushort) PACKED(int) PACKED(uint) PACKED(half) PACKED(float)
namespace metal {
using ::packed_float2; using ::packed_float3; using ::packed_float4;
using ::packed_half2; using ::packed_half3; using ::packed_half4;

template <class T, int C, int R> struct matrix {
    typedef vec<T, R> column;
    column columns[C];
    matrix() = default;
    explicit matrix(T);
    template <class U> explicit matrix(matrix<U, C, R>);
    template <class... A> explicit matrix(column, column, A...);
    template <class... A> explicit matrix(T, T, A...);
    SUBSCRIPT(column)
    thread matrix& operator*=(T) thread;
    thread matrix& operator*=(matrix) thread;
    thread matrix& operator+=(matrix) thread;
    thread matrix& operator-=(matrix) thread;
};
template <class T, int C, int R> matrix<T, C, R> operator*(matrix<T, C, R>, same_t<T>);
template <class T, int C, int R> matrix<T, C, R> operator*(same_t<T>, matrix<T, C, R>);
template <class T, int C, int R> vec<T, R> operator*(matrix<T, C, R>, vec<T, C>);
template <class T, int C, int R> vec<T, C> operator*(vec<T, R>, matrix<T, C, R>);
template <class T, int C, int R, int K> matrix<T, C, R> operator*(matrix<T, K, R>, matrix<T, C, K>);
template <class T, int C, int R> matrix<T, C, R> operator+(matrix<T, C, R>, matrix<T, C, R>);
template <class T, int C, int R> matrix<T, C, R> operator-(matrix<T, C, R>, matrix<T, C, R>);
template <class T, int C, int R> matrix<T, R, C> transpose(matrix<T, C, R>);
template <class T, int C> T determinant(matrix<T, C, C>);
} // namespace metal
#define MATRICES(T) \
    typedef metal::matrix<T, 2, 2> T##2x2; typedef metal::matrix<T, 2, 3> T##2x3; typedef metal::matrix<T, 2, 4> T##2x4; \
    typedef metal::matrix<T, 3, 2> T##3x2; typedef metal::matrix<T, 3, 3> T##3x3; typedef metal::matrix<T, 3, 4> T##3x4; \
    typedef metal::matrix<T, 4, 2> T##4x2; typedef metal::matrix<T, 4, 3> T##4x3; typedef metal::matrix<T, 4, 4> T##4x4;
MATRICES(float) MATRICES(half)
namespace metal {
using ::float2x2; using ::float2x3; using ::float2x4; using ::float3x2; using ::float3x3; using ::float3x4;
using ::float4x2; using ::float4x3; using ::float4x4;
using ::half2x2; using ::half2x3; using ::half2x4; using ::half3x2; using ::half3x3; using ::half3x4;
using ::half4x2; using ::half4x3; using ::half4x4;

// ---------------------------------------------------------------- threads
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4, mem_threadgroup_imageblock = 8 };
mem_flags operator|(mem_flags, mem_flags);
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
enum class thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };
constant constexpr thread_scope thread_scope_thread = thread_scope::thread_scope_thread,
    thread_scope_simdgroup = thread_scope::thread_scope_simdgroup,
    thread_scope_threadgroup = thread_scope::thread_scope_threadgroup,
    thread_scope_device = thread_scope::thread_scope_device;

struct simd_vote {
    typedef ulong vote_t;
    explicit simd_vote(vote_t = 0);
    explicit operator vote_t() const;
    bool all() const;
    bool any() const;
};
typedef simd_vote quad_vote;
// 8, 16 and 32 bits; neither long nor bfloat (MSL 6.9.2).
template <class T> struct is_simd : is_one_of<element_t<T>, char, uchar, short, ushort, int, uint, half, float> {};
template <class T> struct is_simd_whole : is_one_of<element_t<T>, char, uchar, short, ushort, int, uint> {};
template <class T> using if_simd = enable_if_t<is_simd<T>::value, T>;
template <class T> using if_moved = enable_if_t<is_simd<T>::value || is_same<T, bool>::value, T>;
template <class T> using if_whole = enable_if_t<is_simd_whole<T>::value, T>;
#define EACH_GROUP(group) \
    template <class T> if_simd<T> group##_sum(T); \
    template <class T> if_simd<T> group##_product(T); \
    template <class T> if_simd<T> group##_max(T); \
    template <class T> if_simd<T> group##_min(T); \
    template <class T> if_whole<T> group##_and(T); \
    template <class T> if_whole<T> group##_or(T); \
    template <class T> if_whole<T> group##_xor(T); \
    template <class T> if_simd<T> group##_prefix_inclusive_sum(T); \
    template <class T> if_simd<T> group##_prefix_exclusive_sum(T); \
    template <class T> if_simd<T> group##_prefix_inclusive_product(T); \
    template <class T> if_simd<T> group##_prefix_exclusive_product(T); \
    template <class T> if_moved<T> group##_broadcast(T, ushort); \
    template <class T> if_moved<T> group##_broadcast_first(T); \
    template <class T> if_moved<T> group##_shuffle(T, ushort); \
    template <class T> if_moved<T> group##_shuffle_xor(T, ushort); \
    template <class T> if_moved<T> group##_shuffle_up(T, ushort); \
    template <class T> if_moved<T> group##_shuffle_down(T, ushort); \
    template <class T> if_moved<T> group##_shuffle_rotate_up(T, ushort); \
    template <class T> if_moved<T> group##_shuffle_rotate_down(T, ushort); \
    template <class T> if_moved<T> group##_shuffle_and_fill_up(T, T, ushort); \
    template <class T> if_moved<T> group##_shuffle_and_fill_up(T, T, ushort, ushort); \
    template <class T> if_moved<T> group##_shuffle_and_fill_down(T, T, ushort); \
    template <class T> if_moved<T> group##_shuffle_and_fill_down(T, T, ushort, ushort); \
    bool group##_all(bool); \
    bool group##_any(bool); \
    bool group##_is_first(); \
    bool group##_is_helper_thread(); \
    group##_vote group##_ballot(bool); \
    group##_vote group##_active_threads_mask();
EACH_GROUP(simd) EACH_GROUP(quad)

// ---------------------------------------------------------------- matrices of a simdgroup
template <class T, int C, int R> struct simdgroup_matrix {
    static_assert(is_one_of<T, half, float, bfloat>::value, "simdgroup_matrix is of half, bfloat or float");
    static_assert(C == 8 && R == 8, "simdgroup_matrix is 8x8");
    simdgroup_matrix() = default;
    explicit simdgroup_matrix(T);
    thread vec<T, 2>& thread_elements() thread;
    const thread vec<T, 2>& thread_elements() const thread;
};
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
template <class T, int C, int R = C> simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T);
#define EACH_MEMORY(space) \
    template <class T> void simdgroup_load( \
        thread simdgroup_matrix<T, 8, 8>&, const space T*, ulong = 8, ulong2 = 0, bool = false); \
    template <class T> void simdgroup_store( \
        simdgroup_matrix<T, 8, 8>, space T*, ulong = 8, ulong2 = 0, bool = false);
EACH_MEMORY(device) EACH_MEMORY(threadgroup)
#undef EACH_MEMORY
template <class D, class A, class B, class C> void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>&,
    simdgroup_matrix<A, 8, 8>, simdgroup_matrix<B, 8, 8>, simdgroup_matrix<C, 8, 8>);
template <class D, class A, class B> void simdgroup_multiply(
    thread simdgroup_matrix<D, 8, 8>&, simdgroup_matrix<A, 8, 8>, simdgroup_matrix<B, 8, 8>);
template <class T> simdgroup_matrix<T, 8, 8> operator*(simdgroup_matrix<T, 8, 8>, simdgroup_matrix<T, 8, 8>);

// ---------------------------------------------------------------- atomics
enum memory_order { memory_order_relaxed, memory_order_acquire, memory_order_release, memory_order_acq_rel,
    memory_order_seq_cst };
template <class T, class = enable_if_t<is_one_of<T, int, uint, bool, ulong, float>::value>> struct atomic {
    atomic() = default;
    atomic(const atomic&) = delete;
    T value;
};
template <class T, class... U> using if_one = enable_if_t<is_one_of<T, U...>::value, T>;
template <class T, class... U> using if_one_void = enable_if_t<is_one_of<T, U...>::value>;
#define RELAXED(order) __attribute__((enable_if((order) == memory_order_relaxed, "atomic functions take memory_order_relaxed")))
#define FETCH(space, name, ...) \
    template <class T> if_one<T, __VA_ARGS__> atomic_fetch_##name##_explicit( \
        volatile space atomic<T>*, same_t<T>, memory_order order) RELAXED(order);
#define ATOMICS(space) \
    template <class T> if_one<T, int, uint, bool, float> atomic_load_explicit( \
        const volatile space atomic<T>*, memory_order order) RELAXED(order); \
    template <class T> if_one_void<T, int, uint, bool, float> atomic_store_explicit( \
        volatile space atomic<T>*, same_t<T>, memory_order order) RELAXED(order); \
    template <class T> if_one<T, int, uint, bool, float> atomic_exchange_explicit( \
        volatile space atomic<T>*, same_t<T>, memory_order order) RELAXED(order); \
    template <class T> enable_if_t<is_one_of<T, int, uint, bool, float>::value, bool> \
    atomic_compare_exchange_weak_explicit(volatile space atomic<T>*, thread same_t<T>*, same_t<T>, \
        memory_order order, memory_order failed) RELAXED(order) RELAXED(failed); \
    FETCH(space, sub, int, uint) FETCH(space, max, int, uint) FETCH(space, min, int, uint) \
    FETCH(space, and, int, uint) FETCH(space, or, int, uint) FETCH(space, xor, int, uint)
ATOMICS(device) ATOMICS(threadgroup)
FETCH(device, add, int, uint, float)
FETCH(threadgroup, add, int, uint)
template <class T> if_one_void<T, float> atomic_fetch_sub_explicit(
    volatile device atomic<T>*, float, memory_order order) RELAXED(order);
void atomic_max_explicit(volatile device atomic<ulong>*, ulong, memory_order order) RELAXED(order);
void atomic_min_explicit(volatile device atomic<ulong>*, ulong, memory_order order) RELAXED(order);
void atomic_thread_fence(mem_flags, memory_order);
void atomic_thread_fence(mem_flags, memory_order, thread_scope);
} // namespace metal
typedef metal::atomic<int> atomic_int;
typedef metal::atomic<uint> atomic_uint;
typedef metal::atomic<bool> atomic_bool;
typedef metal::atomic<ulong> atomic_ulong;
typedef metal::atomic<float> atomic_float;
namespace metal {
using ::atomic_int; using ::atomic_uint; using ::atomic_bool; using ::atomic_ulong; using ::atomic_float;

// ---------------------------------------------------------------- textures, in so far as a kernel may name them
enum class access { sample, read, write, read_write };
enum class coord { normalized, pixel };
enum class address { clamp_to_edge, clamp_to_zero, clamp_to_border, repeat, mirrored_repeat };
enum class filter { nearest, linear };
enum class mip_filter { none, nearest, linear };
struct sampler {
    template <class... A> constexpr sampler(A...) {}
};
template <class T, class P> struct texture {
    vec<T, 4> read(P, uint = 0) const;
    void write(vec<T, 4>, P, uint = 0) const;
    uint get_width(uint = 0) const;
    uint get_height(uint = 0) const;
    uint get_depth(uint = 0) const;
    uint get_array_size() const;
    uint get_num_mip_levels() const;
};
template <class T, access A = access::sample> struct texture1d : texture<T, uint> {
    vec<T, 4> sample(sampler, float) const;
};
template <class T, access A = access::sample> struct texture2d : texture<T, uint2> {
    vec<T, 4> sample(sampler, float2) const;
};
template <class T, access A = access::sample> struct texture3d : texture<T, uint3> {
    vec<T, 4> sample(sampler, float3) const;
};
template <class T, access A = access::read> struct texture_buffer : texture<T, uint> {};
template <class T, access A = access::sample> struct texture2d_array : texture<T, uint2> {
    vec<T, 4> read(uint2, uint, uint = 0) const;
    void write(vec<T, 4>, uint2, uint, uint = 0) const;
    vec<T, 4> sample(sampler, float2, uint) const;
};
template <class T, access A = access::sample> struct texturecube : texture<T, uint2> {
    vec<T, 4> sample(sampler, float3) const;
};
template <class T, access A = access::sample> struct depth2d : texture<T, uint2> {
    T read(uint2, uint = 0) const;
    T sample(sampler, float2) const;
};

// ---------------------------------------------------------------- the rest
#define PACKS(kind, n, word) \
    word pack_float_to_##kind(metal_vec<float, n>); \
    word pack_half_to_##kind(metal_vec<half, n>); \
    metal_vec<float, n> unpack_##kind##_to_float(word); \
    metal_vec<half, n> unpack_##kind##_to_half(word);
PACKS(unorm4x8, 4, uint) PACKS(snorm4x8, 4, uint) PACKS(unorm2x16, 2, uint) PACKS(snorm2x16, 2, uint)
template <class F> struct visible_function_table {
    uint size() const;
    F* operator[](uint) const;
};
template <class T> using metal_uniform = T;
template <class T> T make_uniform(T);
struct os_log {
    template <class... A> constexpr os_log(A...) {}
    template <class... A> void log(A...) const constant;
    template <class... A> void log_debug(A...) const constant;
    template <class... A> void log_info(A...) const constant;
    template <class... A> void log_error(A...) const constant;
};
constant constexpr os_log os_log_default = os_log(0);
template <class T> constexpr bool is_function_constant_defined(T) { return true; }
} // namespace metal
using metal::as_type;
