// msl_traits.h - limits and constants of the number types, and what templates ask of a type.
#pragma once
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define HUGE_VALH ((half)__builtin_inff())
#define MAXFLOAT 3.402823466e+38f
#define MAXHALF ((half)65504.0f)
#define FLT_DIG 6
#define FLT_MANT_DIG 24
#define FLT_MAX_10_EXP 38
#define FLT_MAX_EXP 128
#define FLT_MIN_10_EXP -37
#define FLT_MIN_EXP -125
#define FLT_RADIX 2
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define HALF_DIG 2
#define HALF_MANT_DIG 11
#define HALF_MAX_10_EXP 4
#define HALF_MAX_EXP 16
#define HALF_MIN_10_EXP -4
#define HALF_MIN_EXP -13
#define HALF_RADIX 2
#define HALF_MAX ((half)65504.0f)
#define HALF_MIN ((half)6.103515625e-05f)
#define HALF_EPSILON ((half)9.765625e-04f)
#define CHAR_BIT 8
#define SCHAR_MAX 127
#define SCHAR_MIN (-128)
#define CHAR_MAX SCHAR_MAX
#define CHAR_MIN SCHAR_MIN
#define UCHAR_MAX 255
#define SHRT_MAX 32767
#define SHRT_MIN (-32768)
#define USHRT_MAX 65535
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define LONG_MAX 0x7fffffffffffffffl
#define LONG_MIN (-LONG_MAX - 1)
#define ULONG_MAX 0xfffffffffffffffful
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.434294481903251827651f
#define M_LN2_F 0.693147180559945309417f
#define M_LN10_F 2.30258509299404568402f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_PI_4_F 0.785398163397448309616f
#define M_1_PI_F 0.318309886183790671538f
#define M_2_PI_F 0.636619772367581343076f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.707106781186547524401f
#define M_E_H ((half)M_E_F)
#define M_LOG2E_H ((half)M_LOG2E_F)
#define M_LOG10E_H ((half)M_LOG10E_F)
#define M_LN2_H ((half)M_LN2_F)
#define M_LN10_H ((half)M_LN10_F)
#define M_PI_H ((half)M_PI_F)
#define M_PI_2_H ((half)M_PI_2_F)
#define M_PI_4_H ((half)M_PI_4_F)
#define M_1_PI_H ((half)M_1_PI_F)
#define M_2_PI_H ((half)M_2_PI_F)
#define M_2_SQRTPI_H ((half)M_2_SQRTPI_F)
#define M_SQRT2_H ((half)M_SQRT2_F)
#define M_SQRT1_2_H ((half)M_SQRT1_2_F)

namespace metal {
template <class T, T V> struct integral_constant {
    static constexpr T value = V;
    typedef T value_type;
    constexpr operator T() const { return V; }
    constexpr T operator()() const { return V; }
};
template <bool B> using bool_constant = integral_constant<bool, B>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;
template <class A, class B> struct is_same : false_type {};
template <class A> struct is_same<A, A> : true_type {};
template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> {
    typedef T type;
};
template <bool B, class T, class F> struct conditional {
    typedef T type;
};
template <class T, class F> struct conditional<false, T, F> {
    typedef F type;
};
#define MSL_REMOVE(name, pattern) \
    template <class T> struct name { \
        typedef T type; \
    }; \
    template <class T> struct name<pattern> { \
        typedef T type; \
    };
MSL_REMOVE(remove_const, const T)
MSL_REMOVE(remove_volatile, volatile T)
MSL_REMOVE(remove_reference, T&)
MSL_REMOVE(remove_pointer, T*)
template <class T> struct remove_cv {
    typedef typename remove_const<typename remove_volatile<T>::type>::type type;
};
template <class T> struct decay {
    typedef typename remove_cv<typename remove_reference<T>::type>::type type;
};
template <class T> struct add_const {
    typedef const T type;
};
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class T, class F> using conditional_t = typename conditional<B, T, F>::type;
template <class T> using remove_const_t = typename remove_const<T>::type;
template <class T> using remove_volatile_t = typename remove_volatile<T>::type;
template <class T> using remove_cv_t = typename remove_cv<T>::type;
template <class T> using remove_reference_t = typename remove_reference<T>::type;
template <class T> using remove_pointer_t = typename remove_pointer<T>::type;
template <class T> using decay_t = typename decay<T>::type;
template <class T> using add_const_t = const T;
template <class...> using void_t = void;

#define MSL_TRAIT(name, ...) \
    template <class T> struct name : bool_constant<(__VA_ARGS__)> {}; \
    template <class T> constexpr bool name##_v = name<T>::value;
#define MSL_IS(T, ...) is_same<remove_cv_t<T>, __VA_ARGS__>::value
MSL_TRAIT(is_const, __is_const(T))
MSL_TRAIT(is_pointer, __is_pointer(T))
MSL_TRAIT(is_reference, __is_lvalue_reference(T))
MSL_TRAIT(is_array, __is_array(T))
MSL_TRAIT(is_class, __is_class(T))
MSL_TRAIT(is_enum, __is_enum(T))
MSL_TRAIT(is_void, __is_void(T))
MSL_TRAIT(is_trivially_copyable, __is_trivially_copyable(T))
MSL_TRAIT(is_integral, __is_integral(T))
MSL_TRAIT(is_floating_point, MSL_IS(T, float) || MSL_IS(T, half) || MSL_IS(T, bfloat))
MSL_TRAIT(is_arithmetic, is_integral<T>::value || is_floating_point<T>::value)
MSL_TRAIT(is_scalar, is_arithmetic<T>::value || __is_pointer(T) || __is_enum(T))
MSL_TRAIT(is_signed, is_floating_point<T>::value || __is_signed(T))
MSL_TRAIT(is_unsigned, is_integral<T>::value && !__is_signed(T))
MSL_TRAIT(is_vector, (msl_vt<remove_cv_t<T>>::n > 1))
template <class A, class B> constexpr bool is_same_v = is_same<A, B>::value;
template <class A, class B> struct is_convertible : bool_constant<__is_convertible_to(A, B)> {};
template <class A, class B> constexpr bool is_convertible_v = is_convertible<A, B>::value;
template <class A, class B> struct is_base_of : bool_constant<__is_base_of(A, B)> {};
template <class A, class B> constexpr bool is_base_of_v = is_base_of<A, B>::value;

template <class T> struct make_unsigned {
    typedef T type;
};
template <class T> struct make_signed {
    typedef T type;
};
#define MSL_SIGNS(S, U) \
    template <> struct make_unsigned<S> { \
        typedef U type; \
    }; \
    template <> struct make_signed<U> { \
        typedef S type; \
    };
MSL_SIGNS(char, uchar)
MSL_SIGNS(short, ushort)
MSL_SIGNS(int, uint)
MSL_SIGNS(long, ulong)
template <> struct make_unsigned<signed char> {
    typedef uchar type;
};
template <class T, int N> struct make_unsigned<msl_vec<T, N>> {
    typedef msl_vec<typename make_unsigned<T>::type, N> type;
};
template <class T> using make_unsigned_t = typename make_unsigned<T>::type;
template <class T> using make_signed_t = typename make_signed<T>::type;

template <class T> struct numeric_limits { // of integers
    static constexpr bool is_specialized = is_integral<T>::value, is_signed = metal::is_signed<T>::value,
                          is_integer = true, is_exact = true, has_infinity = false, has_quiet_NaN = false;
    static constexpr int digits = sizeof(T) * 8 - is_signed, digits10 = digits * 3 / 10, radix = 2;
    static constexpr T max() { return (T)(~0ul >> (64 - digits)); }
    static constexpr T lowest() { return is_signed ? (T)(-(long)max() - 1) : (T)0; }
    static constexpr T min() { return lowest(); }
    static constexpr T epsilon() { return (T)0; }
    static constexpr T infinity() { return (T)0; }
    static constexpr T quiet_NaN() { return (T)0; }
};
template <> struct numeric_limits<bool> {
    static constexpr bool is_specialized = true, is_signed = false, is_integer = true, is_exact = true;
    static constexpr int digits = 1, digits10 = 0, radix = 2;
    static constexpr bool min() { return false; }
    static constexpr bool lowest() { return false; }
    static constexpr bool max() { return true; }
};
#define MSL_LIMITS(T, MAX, MIN, EPSILON, DIGITS, DIGITS10, MAX_EXP, MIN_EXP) \
    template <> struct numeric_limits<T> { \
        static constexpr bool is_specialized = true, is_signed = true, is_integer = false, is_exact = false, \
                              has_infinity = true, has_quiet_NaN = true; \
        static constexpr int digits = DIGITS, digits10 = DIGITS10, radix = 2, max_exponent = MAX_EXP, \
                             min_exponent = MIN_EXP; \
        static MSL_MEMBER constexpr T max() { return (T)MAX; } \
        static MSL_MEMBER constexpr T lowest() { return (T)-MAX; } \
        static MSL_MEMBER constexpr T min() { return (T)MIN; } \
        static MSL_MEMBER constexpr T epsilon() { return (T)EPSILON; } \
        static MSL_MEMBER constexpr T infinity() { return (T)__builtin_inff(); } \
        static MSL_MEMBER constexpr T quiet_NaN() { return (T)__builtin_nanf(""); } \
        static MSL_MEMBER constexpr T signaling_NaN() { return (T)__builtin_nanf(""); } \
    };
MSL_LIMITS(float, 3.402823466e+38f, 1.175494351e-38f, 1.192092896e-07f, 24, 6, 128, -125)
MSL_LIMITS(half, 65504.0f, 6.103515625e-05f, 9.765625e-04f, 11, 3, 16, -13)
#ifndef MSL_LINT
template <> struct numeric_limits<bfloat> {
    static constexpr bool is_specialized = true, is_signed = true, is_integer = false, is_exact = false,
                          has_infinity = true, has_quiet_NaN = true;
    static constexpr int digits = 8, digits10 = 2, radix = 2, max_exponent = 128, min_exponent = -125;
    static MSL_MEMBER bfloat max() { return bfloat(3.38953139e+38f); }
    static MSL_MEMBER bfloat lowest() { return bfloat(-3.38953139e+38f); }
    static MSL_MEMBER bfloat min() { return bfloat(1.175494351e-38f); }
    static MSL_MEMBER bfloat epsilon() { return bfloat(0.0078125f); }
    static MSL_MEMBER bfloat infinity() { return bfloat(__builtin_inff()); }
    static MSL_MEMBER bfloat quiet_NaN() { return bfloat(__builtin_nanf("")); }
};
#endif

template <class T, unsigned long N> struct array {
    T d[N];
    MSL_MEMBER T& operator[](unsigned long i) { return d[i]; }
    MSL_MEMBER const T& operator[](unsigned long i) const { return d[i]; }
    MSL_MEMBER T* data() { return d; }
    MSL_MEMBER const T* data() const { return d; }
    static constexpr unsigned long size() { return N; }
    static constexpr bool empty() { return N == 0; }
    MSL_MEMBER T& front() { return d[0]; }
    MSL_MEMBER T& back() { return d[N - 1]; }
    MSL_MEMBER T* begin() { return d; }
    MSL_MEMBER T* end() { return d + N; }
    MSL_MEMBER const T* begin() const { return d; }
    MSL_MEMBER const T* end() const { return d + N; }
};
template <class To, class From> MSL_INLINE To as_type(From x) {
    static_assert(sizeof(To) == sizeof(From), "as_type sizes");
    return __builtin_bit_cast(To, x);
}
} // namespace metal
