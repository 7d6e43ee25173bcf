// The threads behind team.h: they spin a little where they wait, since the next phase is a few microseconds away, and
// then sleep in the kernel. What is shared is on cache lines of its own. Only __atomic builtins and POSIX.
#include "team.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#define LINE 64
#define HUGE_PAGE ((size_t)2 << 20)
#define SPIN_NANOSECONDS 100000 // longer than any gap within a step, shorter than what a scheduler's turn is worth
#define PAUSES 32               // between two looks at the clock

// A number that threads wait for to change.
typedef struct {
    alignas(LINE) uint32_t value;
    alignas(LINE) uint32_t sleepers;
} Signal;

typedef struct {
    void *data;
    size_t bytes;
} Scratch;

typedef struct {
    alignas(LINE) ml_pool *pool;
    pthread_t thread;
    int number;
    uint32_t seen; // the program that it has done last
    Scratch scratch;
    alignas(LINE) uint64_t dealt[2]; // of its share of an even and an odd phase: pieces from the front, and << 32 the end
} Member;

struct ml_pool {
    alignas(LINE) int64_t next;     // ml_take
    alignas(LINE) uint32_t arrived; // at the barrier
    Signal passed;                  // barriers
    Signal started;                 // programs; the threads end when one starts without a function
    void (*program)(ml_team, void *);
    void *argument;
    int wanted, members; // members: 0 while there are no threads
    int32_t *cores;      // null: not held
    Member *member;
    Scratch scratch;
    pthread_mutex_t turn;
    ml_pool *previous, *following; // all pools, for fork()
};

static pthread_mutex_t pools_lock = PTHREAD_MUTEX_INITIALIZER;
static ml_pool *pools;

static void relax() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t nanoseconds() {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static uint32_t look(const Signal *signal) { return __atomic_load_n(&signal->value, __ATOMIC_ACQUIRE); }

// Wait until the signal is not `old`. The order of the two counters is total (SEQ_CST), so that whoever changes the
// value either sees the sleeper or is seen by it.
static void await(Signal *signal, uint32_t old) {
    int64_t end = 0;
    for (;;) {
        for (int i = 0; i < PAUSES; i++) {
            if (look(signal) != old) return;
            relax();
        }
        int64_t now = nanoseconds();
        if (!end) end = now + SPIN_NANOSECONDS;
        if (now > end) break;
    }
    __atomic_fetch_add(&signal->sleepers, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&signal->value, __ATOMIC_SEQ_CST) == old) {
#ifdef __linux__
        syscall(SYS_futex, &signal->value, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
#else
        struct timespec rest = {0, 50000};
        nanosleep(&rest, nullptr);
#endif
    }
    __atomic_fetch_sub(&signal->sleepers, 1, __ATOMIC_SEQ_CST);
}

static void change(Signal *signal) {
    __atomic_fetch_add(&signal->value, 1, __ATOMIC_SEQ_CST);
#ifdef __linux__
    if (__atomic_load_n(&signal->sleepers, __ATOMIC_SEQ_CST))
        syscall(SYS_futex, &signal->value, FUTEX_WAKE_PRIVATE, 0x7fffffff, nullptr, nullptr, 0);
#endif
}

// The processor's mode of floating point is a thread's own, and a new thread has its creator's: a caller that flushes
// denormals, say, would get other bits from its own pieces than from the other members'.
#if defined(__x86_64__)
typedef uint32_t FloatMode;
static FloatMode float_mode() { return _mm_getcsr(); }
static void set_float_mode(FloatMode mode) { _mm_setcsr(mode); }
#define PLAIN_FLOATS 0x1f80 // to nearest, denormals kept, no traps
#elif defined(__aarch64__)
typedef uint64_t FloatMode;
static FloatMode float_mode() {
    FloatMode mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
static void set_float_mode(FloatMode mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
#define PLAIN_FLOATS 0
#else
typedef int FloatMode;
static FloatMode float_mode() { return 0; }
static void set_float_mode(FloatMode) {}
#define PLAIN_FLOATS 0
#endif

static void take_part(Member *member) {
    ml_pool *pool = member->pool;
    ml_team team = {pool, member->number, pool->members};
    pool->program(team, pool->argument);
    ml_barrier(team);
}

static void *serve(void *argument) {
    Member *member = (Member *)argument;
    ml_pool *pool = member->pool;
#ifdef __linux__
    prctl(PR_SET_NAME, "ml-kernels");
#endif
    set_float_mode(PLAIN_FLOATS);
    for (;;) {
        await(&pool->started, member->seen);
        member->seen++;
        if (!pool->program) return nullptr;
        take_part(member);
    }
}

static void hold(pthread_t thread, int core) {
#ifdef __linux__
    if (core < 0 || core >= CPU_SETSIZE) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    pthread_setaffinity_np(thread, sizeof set, &set); // a core that we may not have: the thread runs where it may
#else
    (void)thread, (void)core;
#endif
}

// A caller on the core of a member that can't leave it would wait for it and keep it out, for milliseconds. It is moved to
// its own and let go at once: there it mostly stays.
static void make_room(const ml_pool *pool) {
#ifdef __linux__
    if (!pool->cores || pool->members < 2) return;
    int here = sched_getcpu();
    bool taken = false;
    for (int i = 1; i < pool->members; i++) taken |= pool->cores[i] == here;
    cpu_set_t allowed;
    if (!taken || sched_getaffinity(0, sizeof allowed, &allowed)) return;
    hold(pthread_self(), pool->cores[0]);
    sched_setaffinity(0, sizeof allowed, &allowed);
#else
    (void)pool;
#endif
}

// As many threads as can be had. Python's signals are none of theirs.
static void start_threads(ml_pool *pool) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int members = 1;
    pool->member[0].dealt[0] = pool->member[0].dealt[1] = 0;
    for (; members < pool->wanted; members++) {
        Member *member = pool->member + members;
        member->dealt[0] = member->dealt[1] = 0;
        member->seen = look(&pool->started);
        if (pthread_create(&member->thread, nullptr, serve, member)) break;
        if (pool->cores) hold(member->thread, pool->cores[members]);
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pool->members = members;
}

static void end_threads(ml_pool *pool) {
    pool->program = nullptr;
    change(&pool->started);
    for (int i = 1; i < pool->members; i++) pthread_join(pool->member[i].thread, nullptr);
    pool->members = 0;
}

// A child of fork() has one thread, whatever its memory says of others. What was under way is not its own.
static void before_fork() { pthread_mutex_lock(&pools_lock); }
static void after_fork() { pthread_mutex_unlock(&pools_lock); }
static void after_fork_in_child() {
    for (ml_pool *pool = pools; pool; pool = pool->following) {
        pool->members = 0;
        pool->arrived = 0;
        pool->passed.sleepers = pool->started.sleepers = 0;
        pthread_mutex_init(&pool->turn, nullptr);
    }
    pthread_mutex_unlock(&pools_lock);
}
static void mind_forks() { pthread_atfork(before_fork, after_fork, after_fork_in_child); }

static void *aligned(size_t alignment, size_t bytes) {
    void *data = nullptr;
    return posix_memalign(&data, alignment, bytes) ? nullptr : data;
}

static void *keep(Scratch *scratch, size_t bytes) {
    if (bytes <= scratch->bytes && scratch->data) return scratch->data;
    if (bytes > (size_t)1 << 62) return nullptr;
    size_t grain = bytes < HUGE_PAGE ? LINE : HUGE_PAGE;
    bytes = (bytes + grain) / grain * grain; // one more than none
    void *old = scratch->data;
    *scratch = {nullptr, 0}; // nothing that is freed stands there when another thread forks
    free(old);
    void *data = aligned(grain, bytes);
    if (data) *scratch = {data, bytes};
#ifdef MADV_HUGEPAGE
    if (grain == HUGE_PAGE && data) madvise(data, bytes, MADV_HUGEPAGE);
#endif
    return data;
}

static ml_pool *new_pool(int32_t members, const int32_t *cores) {
    size_t count = (size_t)members;
    ml_pool *pool = (ml_pool *)aligned(LINE, sizeof(ml_pool));
    Member *member = (Member *)aligned(LINE, count * sizeof(Member));
    int32_t *kept = cores ? (int32_t *)malloc(count * sizeof(int32_t)) : nullptr;
    if (!pool || !member || (cores && !kept)) {
        free(pool);
        free(member);
        free(kept);
        return nullptr;
    }
    *pool = ml_pool();
    for (int i = 0; i < members; i++) {
        member[i] = Member();
        member[i].pool = pool;
        member[i].number = i;
        if (kept) kept[i] = cores[i];
    }
    pool->wanted = members;
    pool->member = member;
    pool->cores = kept;
    pthread_mutex_init(&pool->turn, nullptr);
    return pool;
}

extern "C" {
ml_pool *ml_pool_create(int32_t members, const int32_t *cores) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, mind_forks);
    ml_pool *pool = new_pool(members < 1 ? 1 : members, cores);
    if (!pool) return nullptr;
    pthread_mutex_lock(&pools_lock);
    pool->following = pools;
    if (pools) pools->previous = pool;
    pools = pool;
    pthread_mutex_unlock(&pools_lock);
    return pool;
}

void ml_pool_destroy(ml_pool *pool) {
    if (!pool) return;
    pthread_mutex_lock(&pools_lock);
    (pool->previous ? pool->previous->following : pools) = pool->following;
    if (pool->following) pool->following->previous = pool->previous;
    pthread_mutex_unlock(&pools_lock);
    end_threads(pool);
    for (int i = 0; i < pool->wanted; i++) free(pool->member[i].scratch.data);
    free(pool->scratch.data);
    free(pool->member);
    free(pool->cores);
    pthread_mutex_destroy(&pool->turn);
    free(pool);
}

void ml_run(ml_pool *pool, void (*program)(ml_team team, void *argument), void *argument) {
    pthread_mutex_lock(&pool->turn);
    FloatMode before = float_mode();
    set_float_mode(PLAIN_FLOATS);
    if (!pool->members) start_threads(pool);
    make_room(pool);
    pool->program = program;
    pool->argument = argument;
    pool->next = 0;
    change(&pool->started);
    take_part(pool->member);
    set_float_mode(before);
    pthread_mutex_unlock(&pool->turn);
}

int64_t ml_take(ml_team team) { return __atomic_fetch_add(&team.pool->next, 1, __ATOMIC_RELAXED); }

int64_t ml_take_near(ml_team team, int64_t count) {
    ml_pool *pool = team.pool;
    const uint32_t odd = look(&pool->passed) & 1;
    for (int i = 0; i < team.members; i++) {
        const int whose = (team.member + i) % team.members;
        const int64_t first = count * whose / team.members, size = count * (whose + 1) / team.members - first;
        uint64_t *dealt = &pool->member[whose].dealt[odd];
        const uint64_t before = __atomic_fetch_add(dealt, i ? (uint64_t)1 << 32 : 1, __ATOMIC_RELAXED);
        const int64_t front = (int64_t)(before & 0xffffffff), back = (int64_t)(before >> 32);
        if (front + back < size) return first + (i ? size - 1 - back : front);
    }
    return -1;
}

void ml_barrier(ml_team team) {
    ml_pool *pool = team.pool;
    uint32_t before = look(&pool->passed);
    // What is taken in the next phase. Nobody has been in the last one since this began.
    __atomic_store_n(&pool->member[team.member].dealt[~before & 1], 0, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&pool->arrived, 1, __ATOMIC_ACQ_REL) < (uint32_t)team.members) {
        await(&pool->passed, before);
        return;
    }
    // Nobody takes or arrives until the next line but two.
    __atomic_store_n(&pool->arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&pool->next, 0, __ATOMIC_RELAXED);
    change(&pool->passed);
}

void *ml_scratch(ml_pool *pool, size_t bytes) { return keep(&pool->scratch, bytes); }

void *ml_own_scratch(ml_team team, size_t bytes) { return keep(&team.pool->member[team.member].scratch, bytes); }
}
