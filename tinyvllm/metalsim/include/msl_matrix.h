// msl_matrix.h - matrices of a thread (float2x2 to float4x4), and those of 8x8 that a simdgroup holds together.
#pragma once
namespace metal {
template <class T, int C, int R> struct matrix { // C columns of R rows
    msl_vec<T, R> columns[C];
    matrix() = default;
    MSL_MEMBER explicit matrix(T d) { // on the diagonal
        for (int c = 0; c < C; c++)
            for (int r = 0; r < R; r++) columns[c][r] = c == r ? d : (T)0;
    }
    template <class A, class... V, typename msl_if<int, (msl_vt<A>::n == R)>::type = 0>
    MSL_MEMBER matrix(A first, V... rest) : columns{first, rest...} {
        static_assert(sizeof...(V) == C - 1, "wrong number of columns in a matrix constructor");
    }
    template <class A, class... N, typename msl_if<int, msl_vt<A>::n == 1 && (sizeof...(N) > 0)>::type = 0>
    MSL_MEMBER matrix(A first, N... rest) { // column by column
        static_assert(sizeof...(N) == C * R - 1, "wrong number of elements in a matrix constructor");
        const T all[] = {(T)first, (T)rest...};
        for (int i = 0; i < C * R; i++) columns[i / R][i % R] = all[i];
    }
    template <class U> MSL_MEMBER explicit matrix(const matrix<U, C, R>& m) {
        for (int c = 0; c < C; c++)
            for (int r = 0; r < R; r++) columns[c][r] = (T)m.columns[c][r];
    }
    MSL_MEMBER msl_vec<T, R>& operator[](int c) { return columns[c]; }
    MSL_MEMBER const msl_vec<T, R>& operator[](int c) const { return columns[c]; }
};
#define MSL_MATRICES(T) \
    typedef matrix<T, 2, 2> T##2x2; \
    typedef matrix<T, 2, 3> T##2x3; \
    typedef matrix<T, 2, 4> T##2x4; \
    typedef matrix<T, 3, 2> T##3x2; \
    typedef matrix<T, 3, 3> T##3x3; \
    typedef matrix<T, 3, 4> T##3x4; \
    typedef matrix<T, 4, 2> T##4x2; \
    typedef matrix<T, 4, 3> T##4x3; \
    typedef matrix<T, 4, 4> T##4x4;
MSL_MATRICES(float)
MSL_MATRICES(half)
#define MSL_MATRIX_OP(op) \
    template <class T, int C, int R> \
    MSL_INLINE matrix<T, C, R> operator op(matrix<T, C, R> a, const matrix<T, C, R>& b) { \
        for (int c = 0; c < C; c++) a[c] = a[c] op b[c]; \
        return a; \
    } \
    template <class T, int C, int R> \
    MSL_INLINE matrix<T, C, R>& operator op##=(matrix<T, C, R>& a, const matrix<T, C, R>& b) { return a = a op b; }
MSL_MATRIX_OP(+)
MSL_MATRIX_OP(-)
template <class T, int C, int R> MSL_INLINE matrix<T, C, R> operator-(matrix<T, C, R> a) {
    for (int c = 0; c < C; c++) a[c] = -a[c];
    return a;
}
template <class T, int C, int R>
MSL_INLINE matrix<T, C, R> operator*(matrix<T, C, R> a, typename msl_id<T>::type s) {
    for (int c = 0; c < C; c++) a[c] *= s;
    return a;
}
template <class T, int C, int R>
MSL_INLINE matrix<T, C, R> operator*(typename msl_id<T>::type s, matrix<T, C, R> a) { return a * s; }
template <class T, int C, int R>
MSL_INLINE msl_vec<T, R> operator*(const matrix<T, C, R>& a, typename msl_id<msl_vec<T, C>>::type v) {
    msl_vec<T, R> r = a[0] * v[0];
    for (int c = 1; c < C; c++) r += a[c] * v[c];
    return r;
}
template <class T, int C, int R>
MSL_INLINE msl_vec<T, C> operator*(typename msl_id<msl_vec<T, R>>::type v, const matrix<T, C, R>& a) {
    msl_vec<T, C> r;
    for (int c = 0; c < C; c++) r[c] = dot(v, a[c]);
    return r;
}
template <class T, int C, int R, int K>
MSL_INLINE matrix<T, C, R> operator*(const matrix<T, K, R>& a, const matrix<T, C, K>& b) {
    matrix<T, C, R> m;
    for (int c = 0; c < C; c++) m[c] = a * b[c];
    return m;
}
template <class T, int C, int R, class B> MSL_INLINE matrix<T, C, R>& operator*=(matrix<T, C, R>& a, const B& b) {
    return a = a * b;
}
template <class T, int C, int R> MSL_INLINE bool operator==(const matrix<T, C, R>& a, const matrix<T, C, R>& b) {
    bool r = true;
    for (int c = 0; c < C; c++) r &= all(a[c] == b[c]);
    return r;
}
template <class T, int C, int R> MSL_INLINE bool operator!=(const matrix<T, C, R>& a, const matrix<T, C, R>& b) {
    return !(a == b);
}
template <class T, int C, int R> MSL_INLINE matrix<T, R, C> transpose(const matrix<T, C, R>& a) {
    matrix<T, R, C> m;
    for (int c = 0; c < C; c++)
        for (int r = 0; r < R; r++) m[r][c] = a[c][r];
    return m;
}
template <class T> MSL_INLINE T determinant(const matrix<T, 2, 2>& a) { return a[0][0] * a[1][1] - a[1][0] * a[0][1]; }
template <class T> MSL_INLINE T determinant(const matrix<T, 3, 3>& a) { return dot(a[0], cross(a[1], a[2])); }
template <class T> MSL_INLINE T determinant(const matrix<T, 4, 4>& a) { // by the first row
    T sum = (T)0;
    for (int k = 0; k < 4; k++) {
        matrix<T, 3, 3> minor;
        for (int c = 0, to = 0; c < 4; c++)
            if (c != k) minor[to++] = a[c].yzw;
        T part = a[k][0] * determinant(minor);
        sum = k % 2 ? sum - part : sum + part;
    }
    return sum;
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
template <class M> struct msl_operand { // of an operator: with the place of the expression
    M m;
    uint line, col;
    MSL_MEMBER msl_operand(M value, MSL_SITE) : m(value), line(line_), col(col_) {}
};
template <class T, int R, int C = R> struct simdgroup_matrix {
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
    friend MSL_MEMBER simdgroup_matrix operator*(simdgroup_matrix a, msl_operand<simdgroup_matrix> b) {
        simdgroup_matrix d;
        simdgroup_multiply(d, a, b.m, b.line, b.col);
        return d;
    }
};
template <class T, int R, int C> simdgroup_matrix<T, R, C>::simdgroup_matrix(T d) {
    e[0] = row() == col() ? d : (T)0;
    e[1] = row() == col() + 1 ? d : (T)0;
}
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
template <class T, int R, int C = R> MSL_INLINE simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T v) {
    simdgroup_matrix<T, R, C> m;
    m.e[0] = m.e[1] = v;
    return m;
}
template <class T, int R, int C = R> MSL_INLINE simdgroup_matrix<T, R, C> make_diagonal_simdgroup_matrix(T v) {
    return simdgroup_matrix<T, R, C>(v);
}
struct msl_mem {
    const volatile void* p;
    ulong stride;
    ulong ox, oy;
    bool t;
};
MSL_NOHOOK static inline void msl_uniform(int kind, msl_mem a, uint line, uint col) {
    const msl_slot<msl_mem>* s = msl_gather(kind, a, line, col);
    for (uint i = 0; i < 32; i++)
        if (msl_is_active(i) && (s[i].v.p != a.p || s[i].v.stride != a.stride || s[i].v.ox != a.ox ||
                                    s[i].v.oy != a.oy || s[i].v.t != a.t))
            msl_fail("simdgroup_load/store arguments differ between lanes", line);
    if (msl_cur->active != 0xffffffffu) msl_fail("simdgroup_load/store with a partial simdgroup", line);
}
#define MSL_LOAD_STORE(AS) \
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
MSL_EACH_SPACE(MSL_LOAD_STORE)
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
} // namespace metal
