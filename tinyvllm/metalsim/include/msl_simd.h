// msl_simd.h - barriers, and the functions by which the lanes of a simdgroup or of a quad talk to each other.
#pragma once
enum { // kinds of meetings; rt.cpp has their names
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
    MSL_OR,
    MSL_XOR,
    MSL_QUAD
};

namespace metal {
enum class mem_flags : uint {
    mem_none = 0,
    mem_device = 1,
    mem_threadgroup = 2,
    mem_texture = 4,
    mem_threadgroup_imageblock = 8,
    mem_object_data = 16
};
enum thread_scope {
    thread_scope_thread,
    thread_scope_simdgroup,
    thread_scope_threadgroup,
    thread_scope_device,
    thread_scope_system
};
MSL_INLINE constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((uint)a | (uint)b); }
MSL_INLINE constexpr mem_flags operator&(mem_flags a, mem_flags b) { return (mem_flags)((uint)a & (uint)b); }
MSL_INLINE void threadgroup_barrier(mem_flags f, MSL_SITE) { msl_barrier((uint)f, line_, col_); }
MSL_INLINE void simdgroup_barrier(mem_flags f, MSL_SITE) {
    uint v = (uint)f;
    msl_collective(MSL_SBAR, line_, col_, &v, 4);
}

template <class T> struct msl_slot { // what a lane brought: 64 bytes in rt.cpp
    T v;
    char pad[64 - sizeof(T)];
};
template <class T> MSL_INLINE const msl_slot<T>* msl_gather(int kind, T x, uint line, uint col) {
    return (const msl_slot<T>*)msl_collective(kind, line, col, &x, sizeof(T));
}
MSL_INLINE bool msl_is_active(uint lane) { return msl_cur->active >> lane & 1; }
MSL_INLINE uint msl_quad() { return msl_cur->lane & ~3u; } // the first lane of the quad

// The result of `step` over lanes first..first+n-1, those that are active.
#define MSL_REDUCE(name, kind, first_lane, n, step) \
    template <class T> MSL_NOHOOK static inline T name(T x, MSL_SITE) { \
        const msl_slot<T>* s = msl_gather(kind, x, line_, col_); \
        T a = x; \
        bool is_first = true; \
        for (uint i = first_lane; i < first_lane + n; i++) \
            if (msl_is_active(i)) { \
                T b = s[i].v; \
                a = is_first ? b : (T)(step); \
                is_first = false; \
            } \
        return a; \
    }
#define MSL_REDUCE_BOTH(name, kind, step) \
    MSL_REDUCE(simd_##name, kind, 0, 32, step) MSL_REDUCE(quad_##name, MSL_QUAD, msl_quad(), 4, step)
MSL_REDUCE_BOTH(sum, MSL_SUM, a + b)
MSL_REDUCE_BOTH(product, MSL_PROD, a* b)
MSL_REDUCE_BOTH(max, MSL_MAX, b > a ? b : a)
MSL_REDUCE_BOTH(min, MSL_MIN, b < a ? b : a)
MSL_REDUCE_BOTH(and, MSL_AND, a& b)
MSL_REDUCE_BOTH(or, MSL_OR, a | b)
MSL_REDUCE_BOTH(xor, MSL_XOR, a ^ b)

// Over the active lanes before this one; the inclusive ones take it along.
#define MSL_PREFIX(name, kind, first_lane, start, step) \
    template <class T> MSL_NOHOOK static inline T name(T x, MSL_SITE) { \
        const msl_slot<T>* s = msl_gather(kind, x, line_, col_); \
        T a = start; \
        for (uint i = first_lane; i < msl_cur->lane; i++) \
            if (msl_is_active(i)) { \
                T b = s[i].v; \
                a = step; \
            } \
        return a; \
    }
MSL_PREFIX(simd_prefix_exclusive_sum, MSL_SCAN, 0, (T)0, a + b)
MSL_PREFIX(simd_prefix_exclusive_product, MSL_SCAN, 0, (T)1, a* b)
MSL_PREFIX(quad_prefix_exclusive_sum, MSL_QUAD, msl_quad(), (T)0, a + b)
MSL_PREFIX(quad_prefix_exclusive_product, MSL_QUAD, msl_quad(), (T)1, a* b)
#define MSL_INCLUSIVE(group, name, op) \
    template <class T> MSL_INLINE T group##_prefix_inclusive_##name(T x, MSL_SITE) { \
        return group##_prefix_exclusive_##name(x, line_, col_) op x; \
    }
MSL_INCLUSIVE(simd, sum, +)
MSL_INCLUSIVE(simd, product, *)
MSL_INCLUSIVE(quad, sum, +)
MSL_INCLUSIVE(quad, product, *)

template <class T> MSL_NOHOOK static inline T msl_from(int kind, T x, uint src, uint line, uint col) {
    const msl_slot<T>* s = msl_gather(kind, x, line, col);
    if (src > 31 || !msl_is_active(src)) msl_fail("simd shuffle/broadcast reads a lane that is not active", line);
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
template <class T> MSL_INLINE T simd_shuffle_rotate_up(T x, ushort d, MSL_SITE) {
    return msl_from(MSL_SHUF, x, (msl_cur->lane - d) & 31, line_, col_);
}
template <class T> MSL_INLINE T simd_broadcast(T x, ushort l, MSL_SITE) {
    return msl_from(MSL_BCAST, x, l, line_, col_);
}
template <class T> MSL_NOHOOK static inline T simd_broadcast_first(T x, MSL_SITE) {
    const msl_slot<T>* s = msl_gather(MSL_BCAST, x, line_, col_);
    return s[__builtin_ctz(msl_cur->active)].v;
}
template <class T> MSL_INLINE T quad_shuffle(T x, ushort l, MSL_SITE) {
    return msl_from(MSL_QUAD, x, msl_quad() + l, line_, col_);
}
template <class T> MSL_INLINE T quad_shuffle_xor(T x, ushort m, MSL_SITE) {
    return msl_from(MSL_QUAD, x, msl_cur->lane ^ (m & 3), line_, col_);
}
template <class T> MSL_INLINE T quad_shuffle_down(T x, ushort d, MSL_SITE) {
    uint l = msl_cur->lane;
    return msl_from(MSL_QUAD, x, l % 4 + d > 3 ? l : l + d, line_, col_);
}
template <class T> MSL_INLINE T quad_shuffle_up(T x, ushort d, MSL_SITE) {
    uint l = msl_cur->lane;
    return msl_from(MSL_QUAD, x, l % 4 < d ? l : l - d, line_, col_);
}
template <class T> MSL_INLINE T quad_shuffle_rotate_down(T x, ushort d, MSL_SITE) {
    return msl_from(MSL_QUAD, x, msl_quad() + ((msl_cur->lane + d) & 3), line_, col_);
}
template <class T> MSL_INLINE T quad_shuffle_rotate_up(T x, ushort d, MSL_SITE) {
    return msl_from(MSL_QUAD, x, msl_quad() + ((msl_cur->lane - d) & 3), line_, col_);
}
template <class T> MSL_INLINE T quad_broadcast(T x, ushort l, MSL_SITE) {
    return msl_from(MSL_QUAD, x, msl_quad() + l, line_, col_);
}
template <class T> MSL_NOHOOK static inline T quad_broadcast_first(T x, MSL_SITE) {
    const msl_slot<T>* s = msl_gather(MSL_QUAD, x, line_, col_) + msl_quad();
    return s[__builtin_ctz(msl_cur->active >> msl_quad() & 15)].v;
}

// As if the lanes of `fill` stood behind (down) or before (up) those of `x`, in groups of `modulo` lanes.
template <class T> struct msl_filled {
    T x, fill;
};
template <class T>
MSL_NOHOOK static inline T msl_fill_from(
    int kind, T x, T fill, int shift, uint modulo, uint line, uint col) {
    const msl_slot<msl_filled<T>>* s = msl_gather(kind, msl_filled<T>{x, fill}, line, col);
    uint first = msl_cur->lane & ~(modulo - 1);
    int l = (int)(msl_cur->lane - first) + shift, n = (int)modulo;
    uint from = first + (uint)(l < 0 ? l + n : l >= n ? l - n : l);
    if (from > 31 || !msl_is_active(from)) msl_fail("simd shuffle and fill reads a lane that is not active", line);
    return l < 0 || l >= n ? s[from & 31].v.fill : s[from & 31].v.x;
}
template <class T>
MSL_INLINE T simd_shuffle_and_fill_down(
    T x, typename msl_id<T>::type fill, ushort d, ushort modulo = 32, MSL_SITE) {
    return msl_fill_from<T>(MSL_SHUF, x, fill, d, modulo, line_, col_);
}
template <class T>
MSL_INLINE T simd_shuffle_and_fill_up(
    T x, typename msl_id<T>::type fill, ushort d, ushort modulo = 32, MSL_SITE) {
    return msl_fill_from<T>(MSL_SHUF, x, fill, -(int)d, modulo, line_, col_);
}
template <class T>
MSL_INLINE T quad_shuffle_and_fill_down(T x, typename msl_id<T>::type fill, ushort d, ushort modulo = 4, MSL_SITE) {
    return msl_fill_from<T>(MSL_QUAD, x, fill, d, modulo, line_, col_);
}
template <class T>
MSL_INLINE T quad_shuffle_and_fill_up(T x, typename msl_id<T>::type fill, ushort d, ushort modulo = 4, MSL_SITE) {
    return msl_fill_from<T>(MSL_QUAD, x, fill, -(int)d, modulo, line_, col_);
}

// ---------------------------------------------------------------- votes
template <class Bits> struct msl_vote { // a bit for each lane; of all of them, those that are active count
    typedef Bits vote_t;
    Bits bits;
    uint active;
    explicit constexpr msl_vote(Bits b = 0) : bits(b), active(~0u) {}
    constexpr msl_vote(uint b, uint a) : bits((Bits)b), active(a) {}
    explicit constexpr operator Bits() const { return bits; }
    constexpr bool all() const { return (bits & active) == active; }
    constexpr bool any() const { return (bits & active) != 0; }
};
struct simd_vote : msl_vote<ulong> {
    using msl_vote<ulong>::msl_vote;
};
struct quad_vote : msl_vote<uint> {
    using msl_vote<uint>::msl_vote;
};
MSL_NOHOOK static inline uint msl_ballot(int kind, bool x, uint line, uint col) {
    const msl_slot<bool>* s = msl_gather(kind, x, line, col);
    uint bits = 0;
    for (uint i = 0; i < 32; i++)
        if (msl_is_active(i) && s[i].v) bits |= 1u << i;
    return bits;
}
MSL_INLINE simd_vote simd_ballot(bool x, MSL_SITE) {
    uint bits = msl_ballot(MSL_BALLOT, x, line_, col_);
    return simd_vote(bits, msl_cur->active);
}
MSL_INLINE simd_vote simd_active_threads_mask(MSL_SITE) { return simd_ballot(true, line_, col_); }
MSL_INLINE bool simd_any(bool x, MSL_SITE) { return msl_ballot(MSL_BALLOT, x, line_, col_) != 0; }
MSL_INLINE bool simd_all(bool x, MSL_SITE) { return msl_ballot(MSL_BALLOT, x, line_, col_) == msl_cur->active; }
MSL_INLINE bool simd_is_first(MSL_SITE) {
    msl_ballot(MSL_BALLOT, true, line_, col_);
    return (uint)__builtin_ctz(msl_cur->active) == msl_cur->lane;
}
MSL_INLINE quad_vote quad_ballot(bool x, MSL_SITE) {
    uint bits = msl_ballot(MSL_QUAD, x, line_, col_);
    return quad_vote(bits >> msl_quad() & 15, msl_cur->active >> msl_quad() & 15);
}
MSL_INLINE quad_vote quad_active_threads_mask(MSL_SITE) { return quad_ballot(true, line_, col_); }
MSL_INLINE bool quad_any(bool x, MSL_SITE) { return quad_ballot(x, line_, col_).any(); }
MSL_INLINE bool quad_all(bool x, MSL_SITE) { return quad_ballot(x, line_, col_).all(); }
MSL_INLINE bool quad_is_first(MSL_SITE) {
    uint active = quad_ballot(true, line_, col_).active;
    return (uint)__builtin_ctz(active) == msl_cur->lane % 4;
}
} // namespace metal
