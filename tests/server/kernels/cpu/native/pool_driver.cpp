// Holds the pool (team.h) to what it says, under whichever sanitizer this is compiled with. Prints what fails.
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "team.h"

#define PIECES 1000
#define PHASES 20
#define CHECK(what) check(what, #what, __LINE__)

static int failures;

static void check(bool right, const char *what, int line) {
    if (right) return;
    fprintf(stderr, "line %d: not %s\n", line, what);
    __atomic_store_n(&failures, 1, __ATOMIC_RELAXED);
}

static void rest(long microseconds) {
    struct timespec time = {0, microseconds * 1000};
    nanosleep(&time, nullptr);
}

// Each phase adds one to every piece that the phase before wrote; plain ints, so that only barriers keep them in order.
typedef struct {
    int piece[2][PIECES];
    int64_t pauses;
} Sums;

static void add_up(ml_team team, void *argument) {
    Sums *sums = (Sums *)argument;
    for (int phase = 0; phase < PHASES; phase++) {
        for (int64_t i; (i = ml_take(team)) < PIECES;) sums->piece[1 - phase % 2][i] = sums->piece[phase % 2][PIECES - 1 - i] + 1;
        if (sums->pauses && team.member == phase % team.members) rest(sums->pauses); // the others fall asleep
        ml_barrier(team);
    }
}

static void phases_follow_each_other(ml_pool *pool, int programs, int64_t pauses) {
    Sums *sums = (Sums *)calloc(1, sizeof(Sums));
    sums->pauses = pauses;
    for (int i = 0; i < programs; i++) {
        if (pauses) rest(pauses);
        ml_run(pool, add_up, sums);
    }
    for (int i = 0; i < PIECES; i++) CHECK(sums->piece[0][i] == programs * PHASES);
    free(sums);
}

typedef struct {
    int members;
    int came[64];
    void *own[64];
    unsigned char *common;
    size_t bytes;
} Memory;

static void use_memory(ml_team team, void *argument) {
    Memory *memory = (Memory *)argument;
    memory->came[team.member]++;
    memory->own[team.member] = ml_own_scratch(team, memory->bytes);
    memset(memory->own[team.member], team.member, memory->bytes);
    if (team.member == 0) {
        memory->members = team.members;
        memory->common = (unsigned char *)ml_scratch(team.pool, memory->bytes);
    }
    ml_barrier(team);
    size_t share = memory->bytes / (size_t)team.members;
    memset(memory->common + share * (size_t)team.member, team.member, share);
}

static void members_have_memory(ml_pool *pool, int members) {
    static Memory memory;
    memory = Memory();
    const size_t sizes[] = {1, 64, 1000, (size_t)3 << 20, 10};
    const unsigned char *largest = nullptr;
    for (size_t bytes : sizes) {
        memory.bytes = bytes;
        ml_run(pool, use_memory, &memory);
        CHECK((uintptr_t)memory.common % 64 == 0);
        for (int i = 0; i < members; i++) CHECK((uintptr_t)memory.own[i] % 64 == 0);
        if (bytes > (size_t)1 << 20) largest = memory.common;
    }
    CHECK(memory.common == largest); // a smaller wish is met by what there is
    CHECK(memory.members == members);
    for (int i = 0; i < members; i++) {
        CHECK(memory.came[i] == 5);
        CHECK(((unsigned char *)memory.own[i])[9] == i);
        for (int other = 0; other < i; other++) CHECK(memory.own[i] != memory.own[other]);
    }
    CHECK(ml_scratch(pool, SIZE_MAX) == nullptr);
    CHECK(ml_scratch(pool, 10) != nullptr);
}

static void *call_often(void *pool) {
    phases_follow_each_other((ml_pool *)pool, 4, 0);
    return nullptr;
}

static void callers_wait_their_turn(ml_pool *pool) {
    pthread_t thread[3];
    for (pthread_t &each : thread) pthread_create(&each, nullptr, call_often, pool);
    for (pthread_t &each : thread) pthread_join(each, nullptr);
}

static void a_forked_child_has_threads_of_its_own(ml_pool *pool, int members) {
    pid_t child = fork();
    if (child == 0) {
        alarm(30); // a child that hangs fails
        phases_follow_each_other(pool, 3, 0);
        members_have_memory(pool, members);
        ml_pool_destroy(pool);
        _exit(failures);
    }
    int status = -1;
    waitpid(child, &status, 0);
    CHECK(status == 0);
    phases_follow_each_other(pool, 3, 0);
}

typedef struct {
    float smallest, halved[64];
} Halves;

static void halve(ml_team team, void *argument) {
    Halves *halves = (Halves *)argument;
    volatile float x = halves->smallest;
    halves->halved[team.member] = x * 0.5f;
}

// The caller's flushing of denormals is its own.
static void members_compute_alike(int members) {
#if defined(__x86_64__)
    Halves halves = {1.17549435e-38f, {}};
    unsigned flushing = _mm_getcsr() | 0x8040;
    _mm_setcsr(flushing);
    ml_pool *pool = ml_pool_create(members, nullptr);
    ml_run(pool, halve, &halves);
    CHECK((_mm_getcsr() & 0x8040) == 0x8040);
    ml_pool_destroy(pool);
    _mm_setcsr(0x1f80);
    for (int i = 0; i < members; i++) CHECK(halves.halved[i] == 5.87747175e-39f);
#else
    (void)members, (void)halve;
#endif
}

static void look_where(ml_team team, void *argument) {
    cpu_set_t set;
    sched_getaffinity(0, sizeof set, &set);
    ((int *)argument)[team.member] = CPU_COUNT(&set) == 1 ? sched_getcpu() : -1;
}

static void threads_are_held_and_the_caller_is_not() {
    cpu_set_t before, after;
    sched_getaffinity(0, sizeof before, &before);
    int32_t core = 0;
    while (!CPU_ISSET(core, &before)) core++;
    const int32_t cores[] = {core, core};
    cpu_set_t only;
    CPU_ZERO(&only);
    CPU_SET(core, &only);
    sched_setaffinity(0, sizeof only, &only); // so that the caller is where a member must be
    sched_setaffinity(0, sizeof before, &before);
    int held[2] = {-1, -1};
    ml_pool *pool = ml_pool_create(2, cores);
    ml_run(pool, look_where, held);
    sched_getaffinity(0, sizeof after, &after);
    CHECK(CPU_EQUAL(&before, &after));
    CHECK(held[1] == core);
    ml_pool_destroy(pool);
}

int main(int count, char **arguments) {
    const int sizes[] = {1, 2, 5}; // more than there are cores, too
    for (int members : sizes) {
        ml_pool *pool = ml_pool_create(members, nullptr);
        phases_follow_each_other(pool, 10, 0);
        phases_follow_each_other(pool, 2, 300);
        members_have_memory(pool, members);
        callers_wait_their_turn(pool);
        if (count < 2 || strcmp(arguments[1], "no-fork")) a_forked_child_has_threads_of_its_own(pool, members);
        ml_pool_destroy(pool);
        members_compute_alike(members);
    }
    threads_are_held_and_the_caller_is_not();
    ml_pool_destroy(ml_pool_create(4, nullptr)); // without a program
    return failures;
}
