// Runs one Metal dispatch on the CPU: a fiber for each thread, one threadgroup after another.
//
// Compiled once, without instrumentation. Kernels call msl_* (see include/msl.h) and, in check mode,
// the __tsan_* functions that clang's -fsanitize=thread puts before every read and write. Those are
// ours: they know the buffers that are bound, the threadgroup's memory, and who touched each byte.
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
typedef unsigned int uint;

// The few functions of the C library that are used, declared here: they are found in the process that
// loads this file, whichever library that has, and no header of one need be installed.
extern "C" {
void* calloc(size_t, size_t);
void free(void*);
void abort() __attribute__((noreturn));
int memcmp(const void*, const void*, size_t);
void* memcpy(void*, const void*, size_t);
void* memmove(void*, const void*, size_t);
void* memset(void*, int, size_t);
int snprintf(char*, size_t, const char*, ...);
int vsnprintf(char*, size_t, const char*, va_list);
}

struct msl_thread { // the same in msl.h
    uint tg[3], lid[3], gid[3], lane, simd, index, tgsz[3], ntg[3], gsz[3], nsimd;
    uint active; // lanes that took part in the last collective
};

enum State : uint8_t { READY, AT_SIMD, AT_BARRIER, DONE };
enum { MAX_THREADS = 1024, SIMD = 32, STACK = 128 << 10 };
enum { MAX_TG_BYTES = 32 << 10, ARENA = 256 << 10, RED_ZONE = 256, MAX_TG_VARS = 256 };
enum { SIMDGROUP_BARRIER = 9, FIRST_MATRIX = 10, LAST_MATRIX = 12 }; // kinds of collective, as in msl.h
enum { MEM_DEVICE = 1, MEM_THREADGROUP = 2 };                       // mem_flags

struct Fiber {
    msl_thread t;
    void* sp;
    char* stack;
    State state;
    int kind;                   // of the collective it waits at
    uint line, col, flags, seq; // where it waits, and how many collectives it has seen
    uint32_t wrote;             // when it last wrote to device memory; 0: never, or a fence came after it
};
struct Slot { char bytes[64]; };
struct Simdgroup {
    Slot slots[2][SIMD]; // what each lane brought; two sets, for lanes that are one collective ahead
    uint16_t tg_epoch, dev_epoch;
};

struct Cell { // access history of one byte: its last writer, its last two readers, and when
    uint32_t writer, written, reader, read, reader2, read2;
    uint32_t owner; // for threadgroup memory: the threadgroup that has initialised it
};
struct Traffic { uint64_t reads, writes, bytes_read, bytes_written; }; // as in counts.py
struct Region { uintptr_t lo, hi; const char* name; uint64_t writable; Traffic* traffic; };
struct Span { uintptr_t lo, hi; Cell* cells; };
struct TgVar { int id; size_t size, offset; const char* name; };

// The arguments of msl_launch, as ctypes structures in kernel.py.
struct Word { uintptr_t lo, hi; uint buffer; }; // that announces the rest of its buffer; hi 0: there is none
struct Binding { void* ptr; uint64_t size; const char* name; uint64_t writable; Traffic traffic; };
struct Launch {
    void* entry;
    void* const* buffers;
    Binding* bindings;
    uint count, ntg[3], tgsz[3];
    int order, check, strict, fill, flat, flush; // flat: `entry` runs all threads; flush: denormals are zero
    uint64_t seed, race_limit;                   // race_limit: bytes of the largest buffer with an access history
    uint32_t dynamic[8];
    uintptr_t image_lo, image_hi;                // where the kernel's code and constants are
    Word word;
    uint origin[3]; // the first threadgroup that runs, in each direction
};

static const Launch* launch;
static Fiber fibers[MAX_THREADS];
static Simdgroup simds[MAX_THREADS / SIMD];
static char stacks[MAX_THREADS][STACK] __attribute__((aligned(64)));
static char arena[ARENA] __attribute__((aligned(256))); // threadgroup memory
static Cell arena_cells[ARENA];
static size_t arena_top;
static TgVar tg_vars[MAX_TG_VARS];
static int num_tg_vars;
static Region regions[64];
static int num_regions;
static Span spans[64];
static int num_spans;
static uint num_threads, num_simds;          // threads and simdgroups of a threadgroup
static uint64_t group;                       // which one runs
static uint32_t owner;                       // a number for it that no other has, in any launch
static uint16_t tg_epoch, dev_epoch;         // threadgroup barriers so far
static uint64_t random_state;
static char error[1024];
static uintptr_t error_pc;
static uint error_line;
static bool failed;
static bool published, earlier_writes; // was the launch's word written; has an earlier threadgroup written

extern "C" {
msl_thread* msl_cur;
const char* msl_error() { return error; }
uintptr_t msl_error_pc() { return error_pc; }   // in the kernel's code, or 0
uint msl_error_line() { return error_line; } // of its source, or 0
}
static Fiber* current() { return (Fiber*)msl_cur; }

// ---------------------------------------------------------------- fibers
extern "C" void msl_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(.text
.globl msl_switch
.type msl_switch,@function
msl_switch:
 pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
 movq %rsp, (%rdi); movq %rsi, %rsp
 popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
 ret
)");
static void* first_frame(char* top, void (*main)()) {
    void** sp = (void**)top;
    *--sp = 0; // keeps the stack aligned as after a call
    *--sp = (void*)main;
    for (int i = 0; i < 6; i++) *--sp = 0;
    return sp;
}
#elif defined(__aarch64__) // written, never run
asm(R"(.text
.globl msl_switch
.type msl_switch,%function
msl_switch:
 sub sp, sp, #176
 stp x19, x20, [sp]; stp x21, x22, [sp, #16]; stp x23, x24, [sp, #32]; stp x25, x26, [sp, #48]
 stp x27, x28, [sp, #64]; stp x29, x30, [sp, #80]; stp d8, d9, [sp, #96]; stp d10, d11, [sp, #112]
 stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
 mov x9, sp; str x9, [x0]; mov sp, x1
 ldp x19, x20, [sp]; ldp x21, x22, [sp, #16]; ldp x23, x24, [sp, #32]; ldp x25, x26, [sp, #48]
 ldp x27, x28, [sp, #64]; ldp x29, x30, [sp, #80]; ldp d8, d9, [sp, #96]; ldp d10, d11, [sp, #112]
 ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
 add sp, sp, #176
 ret
)");
static void* first_frame(char* top, void (*main)()) {
    char* sp = top - 176;
    memset(sp, 0, 176);
    *(void**)(sp + 88) = (void*)main; // x30, where `ret` goes
    return sp;
}
#else
#error "the simulator switches stacks on x86-64 and aarch64 only"
#endif

static void* scheduler_sp;
static void to_scheduler(Fiber* f) { msl_switch(&f->sp, scheduler_sp); }
static void resume(Fiber* f) {
    msl_cur = &f->t;
    msl_switch(&scheduler_sp, f->sp);
}

// ---------------------------------------------------------------- errors
static void set_error(const char* format, ...) { // the first one counts
    if (failed) return;
    failed = true;
    va_list args;
    va_start(args, format);
    int n = vsnprintf(error, sizeof error, format, args);
    va_end(args);
    if (!msl_cur || n > 800) return;
    const msl_thread& t = *msl_cur;
    snprintf(error + n, sizeof error - n, " [threadgroup (%u,%u,%u) thread (%u,%u,%u) simdgroup %u lane %u]",
        t.tg[0], t.tg[1], t.tg[2], t.lid[0], t.lid[1], t.lid[2], t.simd, t.lane);
}
static void die() { // the fiber is not resumed again
    to_scheduler(current());
    abort();
}
static void bad(uintptr_t pc, const char* format, ...) {
    if (failed) return;
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    set_error("%s", text);
    if ((error_pc = pc)) error_line = 0;
    die();
}
extern "C" void msl_fail(const char* what, uint line) {
    if (!failed) error_line = line;
    set_error("%s", what);
    die();
}

// A write over another thread's write, with no barrier between, is an error only if it changes the bytes:
// threads that all store the same value are common and harmless. The hook runs before the write, so the
// answer is known at the thread's next event.
static struct { uintptr_t at, pc; uint size; char old[16]; char what[256]; } pending;
static inline void settle() {
    if (!pending.size) return;
    uint size = pending.size;
    pending.size = 0;
    if (memcmp((void*)pending.at, pending.old, size)) bad(pending.pc, "%s", pending.what);
}

// ---------------------------------------------------------------- what kernels call
extern "C" void* msl_collective(int kind, uint line, uint col, const void* value, uint size) {
    settle();
    Fiber* f = current();
    Slot* slots = simds[f->t.simd].slots[f->seq++ & 1];
    memcpy(slots[f->t.lane].bytes, value, size);
    f->state = AT_SIMD, f->kind = kind, f->line = line, f->col = col;
    f->flags = kind == SIMDGROUP_BARRIER ? *(const uint*)value : 0;
    to_scheduler(f);
    return slots;
}
extern "C" void msl_barrier(uint flags, uint line, uint col) {
    settle();
    Fiber* f = current();
    f->state = AT_BARRIER, f->line = line, f->col = col, f->flags = flags;
    to_scheduler(f);
}
// In check mode a variable has the alignment that it declares, and no better: Metal promises no more. Without
// checks it has 16 bytes at least, so that a read of a wider vector does not end the process.
extern "C" void* msl_tg_static(int id, size_t size, size_t align, const char* name) {
    size_t used = size;
    for (int i = 0; i < num_tg_vars; i++) {
        if (tg_vars[i].id == id && tg_vars[i].size == size) return arena + tg_vars[i].offset;
        used += tg_vars[i].size;
    }
    if (used > MAX_TG_BYTES || num_tg_vars == MAX_TG_VARS) {
        set_error("threadgroup memory %zu bytes > %d", used, MAX_TG_BYTES);
        die();
    }
    if (!launch->check && align < 16) align = 16;
    size_t offset = (arena_top + 2 * align - 1) / (2 * align) * (2 * align) + align;
    tg_vars[num_tg_vars++] = TgVar{id, size, offset, name};
    arena_top = offset + size + RED_ZONE;
    return arena + offset;
}
extern "C" void* msl_tg_dynamic(int slot) {
    return msl_tg_static(1 << 20 | slot, launch->dynamic[slot], 16, "[[threadgroup(n)]]");
}

// ---------------------------------------------------------------- races and uninitialised memory
static uint32_t id_of(uint thread) { return (uint32_t)(group * MAX_THREADS + thread + 1); }
static inline uint32_t self_id() { return id_of(msl_cur->index); }
static void describe(uint32_t id, char* text, size_t size) {
    uint index = --id % MAX_THREADS;
    snprintf(text, size, "threadgroup #%u thread #%u (simdgroup %u lane %u)", id / MAX_THREADS, index,
        index / SIMD, index % SIMD);
}

// Do two accesses, one of them a write, have nothing that orders them? An epoch counts threadgroup
// barriers in its high half and simdgroup barriers in its low half.
static bool conflict(uint32_t other, uint32_t other_epoch, uint32_t me, uint32_t epoch) {
    if (!other || other == me) return false;
    other--, me--;
    if (other / MAX_THREADS != me / MAX_THREADS) return true;                    // another threadgroup
    if ((other_epoch ^ epoch) >> 16) return false;                               // a threadgroup_barrier
    if (other % MAX_THREADS / SIMD != me % MAX_THREADS / SIMD) return true;      // another simdgroup
    return (other_epoch & 0xffff) == (epoch & 0xffff);                           // no simdgroup_barrier
}

struct Access { uintptr_t at, pc; uint size; bool write; };
struct Place { const char* name; size_t offset; uint32_t epoch, owner; }; // owner 0: device memory

static void written_twice(const Access& a, const Place& where, size_t byte, const char* who) {
    if (pending.size) return;
    pending.at = a.at, pending.size = a.size, pending.pc = a.pc;
    memcpy(pending.old, (void*)a.at, a.size);
    snprintf(pending.what, sizeof pending.what,
        "data race: write of '%s' byte %zu, written (other value) by %s with no barrier between", where.name, byte,
        who);
}
static void note_read(Cell& c, uint32_t me, uint32_t epoch) {
    if (c.reader != me && c.reader) {
        if (c.reader2 == me) { c.read2 = epoch; return; }
        c.reader2 = c.reader, c.read2 = c.read;
    }
    c.reader = me, c.read = epoch;
}
static void check_cells(Cell* cells, const Access& a, const Place& where) {
    uint32_t me = self_id(), epoch = where.epoch;
    char who[96];
    for (uint i = 0; i < a.size; i++) {
        Cell& c = cells[i];
        size_t byte = where.offset + i;
        if (where.owner && c.owner != where.owner) {
            if (!a.write) bad(a.pc, "read of uninitialised threadgroup memory '%s' at byte %zu", where.name, byte);
            memset(&c, 0, sizeof c);
            c.owner = where.owner;
        }
        if (conflict(c.writer, c.written, me, epoch)) {
            describe(c.writer, who, sizeof who);
            if (a.write) written_twice(a, where, byte, who);
            else
                bad(a.pc, "data race: read of '%s' byte %zu, written by %s with no barrier between", where.name, byte,
                    who);
        }
        if (!a.write) { note_read(c, me, epoch); continue; }
        uint32_t reader = conflict(c.reader, c.read, me, epoch) ? c.reader
            : conflict(c.reader2, c.read2, me, epoch)           ? c.reader2 : 0;
        if (reader) {
            describe(reader, who, sizeof who);
            bad(a.pc, "data race: write of '%s' byte %zu, read by %s with no barrier between", where.name, byte, who);
        }
        c.writer = me, c.written = epoch;
    }
}

// ---------------------------------------------------------------- bounds
static uint32_t epoch_of(uint16_t threadgroup, uint16_t simdgroup) { return (uint32_t)threadgroup << 16 | simdgroup; }

static void check_threadgroup(const Access& a, bool race) {
    size_t offset = a.at - (uintptr_t)arena;
    const char* name = "?";
    long byte = 0;
    for (int i = 0; i < num_tg_vars; i++) {
        const TgVar& v = tg_vars[i];
        if (v.offset > offset) continue;
        name = v.name, byte = (long)(offset - v.offset);
        if (offset - v.offset >= v.size || offset + a.size > v.offset + v.size) continue;
        Cell* cells = arena_cells + offset;
        Place where = {v.name, offset - v.offset, epoch_of(tg_epoch, simds[msl_cur->simd].tg_epoch), owner};
        if (race) check_cells(cells, a, where);
        else if (a.write) // atomics initialise, and race with nobody
            for (uint k = 0; k < a.size; k++)
                if (cells[k].owner != owner) { memset(cells + k, 0, sizeof(Cell)); cells[k].owner = owner; }
        return;
    }
    bad(a.pc, "out-of-bounds %s of threadgroup memory: %u bytes at byte %ld of '%s'", a.write ? "write" : "read",
        a.size, byte, name);
}
static const Region* region_of(const Access& a) { // the strictest one, where a buffer is bound twice
    const Region* found = 0;
    for (int i = 0; i < num_regions; i++) {
        const Region& r = regions[i];
        if (a.at >= r.lo && a.at + a.size <= r.hi && (!found || (a.write && !found->writable))) found = &r;
    }
    return found;
}
// A word that announces data to a reader outside of the launch: what was written before it is ordered by a
// barrier for device memory, and nothing of its buffer is written after it.
static void check_published(const Access& a) {
    const Word& w = launch->word;
    const Binding& b = launch->bindings[w.buffer];
    Fiber* self = current();
    uint32_t now = epoch_of(dev_epoch, simds[self->t.simd].dev_epoch);
    bool is_word = a.at < w.hi && a.at + a.size > w.lo;
    if (is_word && earlier_writes)
        bad(a.pc, "publication of '%s': another threadgroup has written, and no barrier orders that before it", b.name);
    for (uint i = 0; is_word && i < num_threads; i++) {
        uint32_t wrote = fibers[i].wrote;
        if (wrote && (&fibers[i] == self ? wrote == now : conflict(id_of(i), wrote, self_id(), now)))
            bad(a.pc, "publication of '%s': thread #%u has written to device memory, with no barrier for it between",
                b.name, i);
    }
    if (is_word) published = true;
    else if (published && a.at - (uintptr_t)b.ptr < b.size)
        bad(a.pc, "write of '%s' byte %zu after its publication", b.name, (size_t)(a.at - (uintptr_t)b.ptr));
    else self->wrote = now;
}
extern "C" void msl_fence(uint flags) { // orders what this thread has written, for whoever reads its next write
    if (msl_cur && flags & MEM_DEVICE) current()->wrote = 0;
}
static void check_device(const Access& a, const Region& r, bool race) {
    if (a.write && !r.writable) bad(a.pc, "write to read-only buffer '%s'", r.name);
    if (a.write && launch->word.hi) check_published(a);
    if (a.write) r.traffic->writes++, r.traffic->bytes_written += a.size;
    else r.traffic->reads++, r.traffic->bytes_read += a.size;
    for (int i = 0; race && i < num_spans; i++) {
        if (a.at < spans[i].lo || a.at >= spans[i].hi) continue;
        Place where = {r.name, a.at - r.lo, epoch_of(dev_epoch, simds[msl_cur->simd].dev_epoch), 0};
        return check_cells(spans[i].cells + (a.at - spans[i].lo), a, where);
    }
}
static void out_of_bounds(const Access& a) { // told with the nearest buffer's name
    const Region* nearest = 0;
    uintptr_t least = ~(uintptr_t)0;
    for (int i = 0; i < num_regions; i++) {
        const Region& r = regions[i];
        uintptr_t distance = a.at < r.lo ? r.lo - a.at : a.at < r.hi ? 0 : a.at - r.hi;
        if (distance < least) { least = distance; nearest = &r; }
    }
    static const Region none = {0, 0, "?", 0, 0};
    if (!nearest) nearest = &none;
    bad(a.pc, "out-of-bounds %s: %u bytes at byte %ld of buffer '%s' (%zu bytes)", a.write ? "write" : "read", a.size,
        (long)(a.at - nearest->lo), nearest->name, nearest->hi - nearest->lo);
}
template <class T> static bool inside(uintptr_t p, const T& object) { return p - (uintptr_t)&object < sizeof object; }

static inline void check_access(const Access& a, bool race, bool aligned) {
    if (failed || !msl_cur || !launch->check) return;
    settle();
    if (a.at - (uintptr_t)current()->stack < STACK) return; // private
    if (aligned && (a.at & (a.size - 1)))
        bad(a.pc, "misaligned %u-byte %s (address %% %u = %zu)", a.size, a.write ? "write" : "read", a.size,
            (size_t)(a.at & (a.size - 1)));
    if (inside(a.at, arena)) check_threadgroup(a, race);
    else if (const Region* r = region_of(a)) check_device(a, *r, race);
    else if (inside(a.at, fibers) || inside(a.at, simds) || inside(a.at, msl_cur)) return;
    else if (a.at >= launch->image_lo && a.at < launch->image_hi) return; // constants of the kernel's own image
    else out_of_bounds(a);
}

#define HERE ((uintptr_t)__builtin_return_address(0))
extern "C" void msl_access(const volatile void* p, uint size, int write, uint line) {
    error_line = line; // the caller is a function of msl.h
    check_access({(uintptr_t)p, 0, size, write != 0}, false, true);
    error_line = 0;
}
static void check_range(const void* start, size_t n, bool write, uintptr_t pc) { // 16 bytes at a time
    uintptr_t p = (uintptr_t)start;
    if (msl_cur && p - (uintptr_t)current()->stack < STACK) return;
    for (size_t i = 0; i < n; i += 16) check_access({p + i, pc, n - i < 16 ? (uint)(n - i) : 16, write}, true, false);
}

#define HOOK(name, n, write, aligned) \
    void name##n(void* p) { check_access({(uintptr_t)p, HERE, n, write}, true, aligned); }
#define HOOK2(name, n, aligned) \
    void name##n(void* p) { \
        check_access({(uintptr_t)p, HERE, n, false}, true, aligned); \
        check_access({(uintptr_t)p, HERE, n, true}, true, aligned); \
    }
#define HOOKS(n) \
    HOOK(__tsan_read, n, false, true) HOOK(__tsan_write, n, true, true) HOOK2(__tsan_read_write, n, true) \
    HOOK(__tsan_unaligned_read, n, false, false) HOOK(__tsan_unaligned_write, n, true, false) \
    HOOK2(__tsan_unaligned_read_write, n, false)
extern "C" {
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void* __tsan_memcpy(void* to, const void* from, size_t n) {
    check_range(from, n, false, HERE);
    check_range(to, n, true, HERE);
    return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
    check_range(from, n, false, HERE);
    check_range(to, n, true, HERE);
    return memmove(to, from, n);
}
void* __tsan_memset(void* to, int value, size_t n) {
    check_range(to, n, true, HERE);
    return memset(to, value, n);
}
// clang 14 calls the plain functions; the linker sends them here (--wrap).
void* __wrap_memcpy(void*, const void*, size_t) __attribute__((alias("__tsan_memcpy")));
void* __wrap_memmove(void*, const void*, size_t) __attribute__((alias("__tsan_memmove")));
void* __wrap_memset(void*, int, size_t) __attribute__((alias("__tsan_memset")));
}

// ---------------------------------------------------------------- what the processor and the compiler notice
// x86 raises a signal for an integer division by zero, and of the smallest number by -1; aarch64 does not. The
// compiler puts a trap where an access through a pointer leaves a thread's array or a constant one.
enum { SIGNAL_FPE = 8, WITH_CONTEXT = 4 };
static const int SIGNALS[] = {4, 5, SIGNAL_FPE}; // SIGILL and SIGTRAP: the compiler's trap
struct Action { void (*handler)(int, void*, void*); unsigned long mask[16]; int flags; void (*restorer)(); };
extern "C" int sigaction(int, const Action*, Action*);
static uintptr_t fault_pc;
static int fault_signal;

#if defined(__x86_64__)
struct Context { char before[40]; uint64_t r8_to_rbx[12], rdx, rax, rcx, sp, pc; }; // ucontext_t
static uint float_mode() { return __builtin_ia32_stmxcsr(); }
static void set_float_mode(uint mode) { __builtin_ia32_ldmxcsr(mode); }
enum { FLUSH = 1 << 15 | 1 << 6 }; // results and operands of single precision; halves are kept
static void skip_division(Context* c) { // quotient and remainder are 0
    const uint8_t* p = (const uint8_t*)c->pc;
    bool is_short = false;
    for (; *p == 0x66 || (*p & 0xf0) == 0x40; p++) is_short |= *p == 0x66; // prefixes
    bool is_byte = *p == 0xf6;                                             // the opcode, else 0xf7
    uint mode = p[1] >> 6, base = p[1] & 7;                                // how the divisor is addressed
    p += 2;
    if (mode != 3 && base == 4) base = *p++ & 7;
    if (mode == 1) p += 1;
    if (mode == 2 || (mode == 0 && base == 5)) p += 4;
    uint64_t kept = is_byte || is_short ? ~(uint64_t)0xffff : 0;
    c->pc = (uintptr_t)p, c->rax &= kept;
    if (!is_byte) c->rdx &= kept;
}
#else
struct Context { char before[184]; uint64_t x[31], sp, pc; };
static uint float_mode() { uint64_t mode; asm("mrs %0, fpcr" : "=r"(mode)); return (uint)mode; }
static void set_float_mode(uint mode) { asm volatile("msr fpcr, %0" : : "r"((uint64_t)mode)); }
enum { FLUSH = 1 << 24 };
static void skip_division(Context*) {}
#endif

static void fault() { // runs as if the kernel had called it
    bad(fault_pc, "%s", fault_signal == SIGNAL_FPE ? "integer division by zero, or of the smallest number by -1"
        : "out-of-bounds access to an array of the thread, or to a constant one");
    die();
}
static Action old_actions[SIGNAL_FPE + 1];
static void restore_actions() {
    for (int signal : SIGNALS) sigaction(signal, &old_actions[signal], 0);
}
static void on_fault(int signal, void*, void* context) {
    Context* c = (Context*)context;
    if (c->pc < launch->image_lo || c->pc >= launch->image_hi) return restore_actions(); // not ours: it comes again
    if (!launch->check) return skip_division(c);
    fault_pc = c->pc + 1, fault_signal = signal;
    c->sp = ((c->sp - 256) & ~(uint64_t)15) - 8; // below what the kernel keeps there, aligned as in a call
    c->pc = (uintptr_t)fault;
}
struct Processor { // its state while kernels run
    uint mode;
    Processor() {
        Action ours = {on_fault, {}, WITH_CONTEXT, 0};
        for (int signal : SIGNALS) sigaction(signal, &ours, &old_actions[signal]);
        mode = float_mode();
        set_float_mode(launch->flush ? mode | FLUSH : mode);
    }
    ~Processor() {
        set_float_mode(mode);
        restore_actions();
    }
};

// clang's -fsanitize=array-bounds and integer-divide-by-zero call these before what is wrong.
struct ArrayType { uint16_t kind, info; char name[1]; };
struct BadIndex { const char* file; uint line, column; const ArrayType *array, *index; };
extern "C" {
void __ubsan_handle_out_of_bounds_abort(const BadIndex* data, uint64_t value) {
    bool is_short = data->index->info == (5 << 1 | 1); // 32 bits, with a sign
    long index = is_short ? (int)value : (long)value;
    const char* name = data->array->name; // such as 'float[4]', or 'msl_tgt_x' (aka 'float[4]')
    bool is_threadgroup = memcmp(name, "'msl_tgt_", 9) == 0;
    bad(HERE, "index %ld is out of bounds of %s%s", index, is_threadgroup ? "threadgroup array '" : "",
        name + (is_threadgroup ? 9 : 0));
    die();
}
void __ubsan_handle_divrem_overflow_abort(void*, uintptr_t, uintptr_t) {
    bad(HERE, "integer division by zero");
    die();
}
}

// ---------------------------------------------------------------- simdgroups
static const char* kind_name(int kind) { // the order of the enum in msl.h
    static const char* names[] = {"?", "simd_sum", "simd_max", "simd_min", "simd_product", "simd_shuffle",
        "simd_broadcast", "simd_ballot/all/any", "simd_prefix", "simdgroup_barrier", "simdgroup mma", "simdgroup_load",
        "simdgroup_store", "simd_and", "simd_or", "simd_xor", "quad function"};
    return kind > 0 && kind < (int)(sizeof names / sizeof *names) ? names[kind] : "?";
}
static uint lanes_of(uint simd) { return simd + 1 < num_simds ? SIMD : num_threads - simd * SIMD; }

struct Meeting { Fiber *first, *other; uint waiting, returned; }; // masks of lanes; other: at another place
static Meeting meeting_of(uint simd) {
    Meeting m = {0, 0, 0, 0};
    for (uint lane = 0; lane < lanes_of(simd); lane++) {
        Fiber* f = &fibers[simd * SIMD + lane];
        if (f->state == DONE) m.returned |= 1u << lane;
        else if (f->state != AT_SIMD) m.other = f;
        else {
            m.waiting |= 1u << lane;
            if (!m.first) m.first = f;
            else if (f->line != m.first->line || f->col != m.first->col || f->kind != m.first->kind) m.other = f;
        }
    }
    return m;
}
static void check_meeting(uint simd, const Meeting& m) {
    const Fiber& a = *m.first;
    const char* name = kind_name(a.kind);
    if (m.other && m.other->state == AT_BARRIER)
        set_error("divergence: %s at line %u in lanes %08x while lane %u is at threadgroup_barrier, line %u", name,
            a.line, m.waiting, m.other->t.lane, m.other->line);
    else if (m.other)
        set_error("divergence: %s at line %u while lane %u is at %s, line %u", name, a.line, m.other->t.lane,
            kind_name(m.other->kind), m.other->line);
    else if (m.returned && launch->strict)
        set_error("%s at line %u is called by lanes %08x only (the others have returned)", name, a.line, m.waiting);
    else if (lanes_of(simd) < SIMD && launch->strict && a.kind >= FIRST_MATRIX && a.kind <= LAST_MATRIX)
        set_error("%s at line %u in a simdgroup of only %u threads", name, a.line, lanes_of(simd));
    for (uint lane = 0; lane < lanes_of(simd); lane++) {
        const Fiber& f = fibers[simd * SIMD + lane];
        if (f.state == AT_SIMD && f.seq != a.seq)
            set_error("divergence: lanes reached %s at line %u after a different number of simdgroup calls", name,
                a.line);
    }
}
static bool release_simd(uint simd) { // true when the collective is complete and its lanes may go on
    Meeting m = meeting_of(simd);
    if (!m.first) return false;
    msl_cur = &m.first->t;
    check_meeting(simd, m);
    if (failed) return false;
    if (m.first->kind == SIMDGROUP_BARRIER) {
        if (m.first->flags & MEM_THREADGROUP) simds[simd].tg_epoch++;
        if (m.first->flags & MEM_DEVICE) simds[simd].dev_epoch++;
    }
    for (uint lane = 0; lane < lanes_of(simd); lane++) {
        Fiber& f = fibers[simd * SIMD + lane];
        if (f.state == AT_SIMD) { f.state = READY; f.t.active = m.waiting; }
    }
    return true;
}

// ---------------------------------------------------------------- threadgroups
static uint random_below(uint n) {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint)((random_state >> 33) % n);
}
static void make_order(uint* v, uint n) { // 0 forwards, 1 backwards, 2 and more shuffled
    for (uint i = 0; i < n; i++) v[i] = launch->order == 1 ? n - 1 - i : i;
    for (uint i = n; launch->order >= 2 && i > 1; i--) {
        uint j = random_below(i), t = v[i - 1];
        v[i - 1] = v[j];
        v[j] = t;
    }
}
static void run_simd(uint simd) {
    uint lanes[SIMD], n = lanes_of(simd);
    do {
        make_order(lanes, n);
        for (uint j = 0; j < n; j++) {
            Fiber* f = &fibers[simd * SIMD + lanes[j]];
            if (f->state == READY) resume(f);
            if (failed) return;
        }
    } while (release_simd(simd) && !(launch->order >= 3 && random_below(2))); // 3: leave half way, to interleave
}
static bool release_group() { // false when the threadgroup has ended, or failed
    uint waiting = 0, returned = 0;
    Fiber *first = 0, *other = 0;
    for (uint i = 0; i < num_threads; i++) {
        Fiber* f = &fibers[i];
        if (f->state == DONE) returned++;
        else if (f->state == AT_BARRIER) {
            waiting++;
            if (!first) first = f;
            else if (first->line != f->line || first->col != f->col) other = f;
        } else return true; // a simdgroup was left half way
    }
    if (!waiting) return false;
    msl_cur = &first->t;
    if (returned)
        set_error("threadgroup_barrier at line %u reached by %u of %u threads (the others have returned)", first->line,
            waiting, num_threads);
    else if (other)
        set_error("divergent threadgroup_barrier: lines %u and %u (thread %u)", first->line, other->line,
            other->t.index);
    if (failed) return false;
    if (first->flags & MEM_THREADGROUP) tg_epoch++;
    if (first->flags & MEM_DEVICE) dev_epoch++;
    for (uint i = 0; i < num_threads; i++) fibers[i].state = READY;
    return true;
}
static void fiber_main() {
    ((void (*)(void* const*))launch->entry)(launch->buffers);
    settle();
    current()->state = DONE;
    die();
}
static void find_group(uint* in_grid) { // the position of the threadgroup that runs
    uint64_t row = group / launch->ntg[0];
    in_grid[0] = (uint)(group % launch->ntg[0]);
    in_grid[1] = (uint)(row % launch->ntg[1]);
    in_grid[2] = (uint)(row / launch->ntg[1]);
}
static void place(uint i) { // thread i of the threadgroup: its numbers, its stack
    const Launch& l = *launch;
    Fiber& f = fibers[i];
    uint in_grid[3];
    find_group(in_grid);
    uint in_group[3] = {i % l.tgsz[0], i / l.tgsz[0] % l.tgsz[1], i / l.tgsz[0] / l.tgsz[1]};
    for (int k = 0; k < 3; k++) {
        f.t.tg[k] = in_grid[k], f.t.lid[k] = in_group[k];
        f.t.tgsz[k] = l.tgsz[k], f.t.ntg[k] = l.ntg[k];
        f.t.gid[k] = in_grid[k] * l.tgsz[k] + in_group[k], f.t.gsz[k] = l.ntg[k] * l.tgsz[k];
    }
    f.t.index = i, f.t.lane = i % SIMD, f.t.simd = i / SIMD, f.t.nsimd = num_simds, f.t.active = 0;
    f.state = READY, f.seq = f.wrote = 0;
    f.stack = stacks[i];
    f.sp = first_frame(f.stack + STACK, fiber_main);
}
static void run_group() {
    tg_epoch = dev_epoch = 1;
    owner++;
    for (uint s = 0; s < num_simds; s++) simds[s].tg_epoch = simds[s].dev_epoch = 0;
    for (uint i = 0; i < num_threads; i++) place(i);
    uint order[MAX_THREADS / SIMD];
    do {
        make_order(order, num_simds);
        for (uint i = 0; i < num_simds && !failed; i++) run_simd(order[i]);
    } while (!failed && release_group());
}

// ---------------------------------------------------------------- the launch
static bool overlap(uintptr_t lo, uintptr_t hi, const Span& s) { return lo < s.hi && s.lo < hi; }
static void widen(Span& s, uintptr_t lo, uintptr_t hi) {
    if (lo < s.lo) s.lo = lo;
    if (hi > s.hi) s.hi = hi;
}
static bool grow(Span& s) { // by one binding or span that overlaps it
    for (int i = 0; i < num_regions; i++)
        if (overlap(regions[i].lo, regions[i].hi, s) && (regions[i].lo < s.lo || regions[i].hi > s.hi))
            return widen(s, regions[i].lo, regions[i].hi), true;
    for (int i = 0; i < num_spans; i++)
        if (overlap(spans[i].lo, spans[i].hi, s)) {
            widen(s, spans[i].lo, spans[i].hi);
            spans[i] = spans[--num_spans];
            return true;
        }
    return false;
}
static bool bind() { // one access history for each set of overlapping bindings with a writable one
    num_regions = num_spans = 0;
    if (!launch->check) return true;
    for (uint i = 0; i < launch->count; i++) {
        Binding& b = launch->bindings[i];
        regions[num_regions++] = Region{(uintptr_t)b.ptr, (uintptr_t)b.ptr + b.size, b.name, b.writable, &b.traffic};
    }
    for (uint i = 0; i < launch->count; i++) {
        Span s = {regions[i].lo, regions[i].hi, 0};
        if (!regions[i].writable || s.hi - s.lo > launch->race_limit) continue;
        while (grow(s)) {}
        if (s.hi - s.lo <= launch->race_limit) spans[num_spans++] = s;
    }
    for (int i = 0; i < num_spans; i++) { // pages that stay untouched cost nothing
        spans[i].cells = (Cell*)calloc(spans[i].hi - spans[i].lo + 1, sizeof(Cell));
        if (!spans[i].cells)
            set_error("no memory for the access history of %zu bytes", (size_t)(spans[i].hi - spans[i].lo));
    }
    return !failed;
}
static void run_groups() {
    bool is_first = true;
    uint64_t groups = (uint64_t)launch->ntg[0] * launch->ntg[1] * launch->ntg[2];
    for (uint64_t i = 0; i < groups && !failed; i++) {
        group = launch->order == 1 ? groups - 1 - i : i;
        uint at[3];
        find_group(at);
        if (at[0] < launch->origin[0] || at[1] < launch->origin[1] || at[2] < launch->origin[2]) continue;
        memset(arena, launch->fill, is_first ? (size_t)ARENA : arena_top);
        is_first = false;
        run_group();
        for (uint k = 0; k < num_threads; k++) earlier_writes |= fibers[k].wrote != 0;
    }
}
extern "C" int msl_launch(const Launch* l) { // 0, or 1 with the reason in msl_error()
    launch = l;
    failed = published = earlier_writes = false, error[0] = 0, error_pc = error_line = 0, pending.size = 0, msl_cur = 0;
    random_state = l->seed, num_tg_vars = 0, arena_top = RED_ZONE;
    num_threads = l->tgsz[0] * l->tgsz[1] * l->tgsz[2];
    num_simds = (num_threads + SIMD - 1) / SIMD;
    if (num_threads == 0 || num_threads > MAX_THREADS)
        set_error("%u threads in a threadgroup (1..%d allowed)", num_threads, MAX_THREADS);
    Processor processor;
    typedef void Flat(void* const* buffers, const uint* groups, const uint* threads, const uint* origin);
    if (l->flat) ((Flat*)l->entry)(l->buffers, l->ntg, l->tgsz, l->origin);
    else if (!failed && bind()) run_groups();
    msl_cur = 0;
    if (l->check && l->word.hi && !published)
        set_error("nothing was published: the word of '%s' was not written", l->bindings[l->word.buffer].name);
    for (int i = 0; i < num_spans; i++) free(spans[i].cells);
    num_spans = 0;
    return failed;
}
