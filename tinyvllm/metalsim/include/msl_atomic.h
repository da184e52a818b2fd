// msl_atomic.h - atomic operations. Threads never run at the same time here: plain operations are atomic.
#pragma once
namespace metal {
enum memory_order {
    memory_order_relaxed,
    memory_order_acquire,
    memory_order_release,
    memory_order_acq_rel,
    memory_order_seq_cst
};
template <class T> struct atomic {
    T v;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<ulong> atomic_ulong;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;

MSL_INLINE void atomic_thread_fence(mem_flags f, memory_order, thread_scope = thread_scope_device) {
    msl_fence((uint)f);
}
// An operation that gives back the old value `o` and leaves `new_value`.
#define MSL_ATOMIC(AS, name, new_value) \
    template <class T> \
    MSL_NOHOOK static inline T name( \
        volatile AS atomic<T>* p, typename msl_id<T>::type x, memory_order, MSL_SITE) { \
        msl_access(MSL_VP(p), sizeof(T), 1, line_); \
        T o = p->v; \
        p->v = (T)(new_value); \
        return o; \
    }
#define MSL_ATOMICS(AS) \
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
    MSL_ATOMIC(AS, atomic_exchange_explicit, x) \
    MSL_ATOMIC(AS, atomic_fetch_add_explicit, o + x) \
    MSL_ATOMIC(AS, atomic_fetch_sub_explicit, o - x) \
    MSL_ATOMIC(AS, atomic_fetch_max_explicit, o > x ? o : x) \
    MSL_ATOMIC(AS, atomic_fetch_min_explicit, o < x ? o : x) \
    MSL_ATOMIC(AS, atomic_fetch_and_explicit, o & x) \
    MSL_ATOMIC(AS, atomic_fetch_or_explicit, o | x) \
    MSL_ATOMIC(AS, atomic_fetch_xor_explicit, o ^ x) \
    template <class T> \
    MSL_NOHOOK static inline bool atomic_compare_exchange_weak_explicit(volatile AS atomic<T>* p, \
        thread T* expected, typename msl_id<T>::type x, memory_order, memory_order, MSL_SITE) { \
        msl_access(MSL_VP(p), sizeof(T), 1, line_); \
        T o = p->v, e = *expected; \
        bool is_equal = __builtin_memcmp(&o, &e, sizeof(T)) == 0; \
        if (is_equal) p->v = x; \
        else *expected = o; \
        return is_equal; \
    } \
    MSL_INLINE void atomic_max_explicit(volatile AS atomic_ulong* p, ulong x, memory_order order, MSL_SITE) { \
        atomic_fetch_max_explicit(p, x, order, line_, col_); \
    } \
    MSL_INLINE void atomic_min_explicit(volatile AS atomic_ulong* p, ulong x, memory_order order, MSL_SITE) { \
        atomic_fetch_min_explicit(p, x, order, line_, col_); \
    }
MSL_EACH_SPACE(MSL_ATOMICS)
} // namespace metal
