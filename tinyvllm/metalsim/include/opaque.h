// opaque.h - what the lanes of a simdgroup do together, and functions that a GPU has an instruction for: only declared,
// so that each stays one call between the instructions around it. For operations.py, behind msl.h with MSL_LINT.
#pragma once
namespace opaque {
#define MSL_PURE __attribute__((const))
template <class T> MSL_PURE T simd_sum(T);
template <class T> MSL_PURE T simd_max(T);
template <class T> MSL_PURE T simd_min(T);
template <class T> MSL_PURE T simd_broadcast(T, ushort);
template <class T> MSL_PURE T simd_shuffle(T, ushort);
template <class T> MSL_PURE T simd_shuffle_xor(T, ushort);
template <class T> MSL_PURE T simd_shuffle_down(T, ushort);
void threadgroup_barrier(metal::mem_flags);
MSL_PURE float exp(float);
MSL_PURE float exp2(float);
MSL_PURE float rsqrt(float);
MSL_PURE float fast_exp(float);
MSL_PURE float fast_exp2(float);

// A matrix is a value: one whose address leaves the function would have to lie in memory.
template <class T> using msl_matrix = metal::simdgroup_matrix<T, 8, 8>;
template <class V> V matrix_load(const threadgroup void*, ulong, bool);
template <class V> V matrix_load(const device void*, ulong, bool);
template <class V> void matrix_store(V, threadgroup void*, ulong);
template <class V> void matrix_store(V, device void*, ulong);
template <class D, class A, class B> MSL_PURE D matrix_multiply(A, B, D);
template <class T, class P>
MSL_INLINE void simdgroup_load(
    thread msl_matrix<T>& m, P p, ulong stride = 8, ulong2 = ulong2(0), bool turned = false) {
    m.e = matrix_load<typename msl_matrix<T>::storage>(p, stride, turned);
}
template <class T, class P> MSL_INLINE void simdgroup_store(msl_matrix<T> m, P p, ulong stride = 8) {
    matrix_store(m.e, p, stride);
}
template <class D, class A, class B>
MSL_INLINE void simdgroup_multiply_accumulate(
    thread msl_matrix<D>& d, msl_matrix<A> a, msl_matrix<B> b, msl_matrix<D> c) {
    d.e = matrix_multiply(a.e, b.e, c.e);
}
} // namespace opaque
