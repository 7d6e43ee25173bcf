// What the machine gives, to hold the kernels' rates against: reading memory, and dot products of what is near.
#pragma once
#include "abi.h"
#include "dot.h"
#include "team.h"

#define ML_LIMIT_PIECE ((int64_t)1 << 13) // words
#define ML_LIMIT_AHEAD 512                 // words: 4 KiB

typedef struct {
    const uint64_t *data;
    int64_t words, rounds;
    uint64_t sum;
} ml_limit;

static void read_program(ml_team team, void *argument) {
    ml_limit *a = (ml_limit *)argument;
    uint64_t sums[8] = {0}, sum = 0;
    for (int64_t first; (first = ml_take(team) * ML_LIMIT_PIECE) < a->words;) {
        int64_t end = first + ML_LIMIT_PIECE < a->words ? first + ML_LIMIT_PIECE : a->words;
        int64_t i = first;
        for (; i + 8 <= end; i += 8) {
            __builtin_prefetch(a->data + i + ML_LIMIT_AHEAD); // as the products do
            for (int64_t j = 0; j < 8; j++) sums[j] += a->data[i + j];
        }
        for (; i < end; i++) sums[0] += a->data[i];
    }
    for (int64_t j = 0; j < 8; j++) sum += sums[j];
    __atomic_fetch_add(&a->sum, sum, __ATOMIC_RELAXED);
}

// The inner loop of a tile alone: what it reads stays in the nearest cache, and no group ends.
static void dot_program(ml_team team, void *argument) {
    ml_limit *a = (ml_limit *)argument;
    (void)team;
    alignas(64) int8_t codes[128];
    uint8_t u[ML_TILE * 4];
    memset(codes, 3, sizeof codes);
    memset(u, 5, sizeof u);
    vi dots[ML_TILE][2];
#pragma GCC unroll 8
    for (int r = 0; r < ML_TILE; r++) dots[r][0] = dots[r][1] = vi_zero();
    for (int64_t round = 0; round < a->rounds; round++) {
        __asm__ volatile("" : : "r"(codes), "r"(u) : "memory"); // they may have changed
        vw low = load_bytes(codes), high = load_bytes(codes + 64);
#pragma GCC unroll 8
        for (int r = 0; r < ML_TILE; r++) {
            vx x = load_word(u + r * 4);
            dots[r][0] = dot(dots[r][0], x, low);
            dots[r][1] = dot(dots[r][1], x, high);
        }
    }
    vi all = vi_zero();
#pragma GCC unroll 8
    for (int r = 0; r < ML_TILE; r++) all = vi_add(all, vi_add(dots[r][0], dots[r][1]));
    uint64_t sum;
    memcpy(&sum, &all, sizeof sum);
    __atomic_fetch_add(&a->sum, sum, __ATOMIC_RELAXED);
}

// Read `words` words of 64 bits.
static int64_t read_words(ml_pool *pool, const uint64_t *data, int64_t words) {
    ml_limit a = {data, words, 0, 0};
    ml_run(pool, read_program, &a);
    return (int64_t)a.sum;
}

// Let each member multiply and add for `rounds` rounds; returns how many multiply-adds a round of one member has.
static int64_t dot_words(ml_pool *pool, int64_t rounds) {
    ml_limit a = {nullptr, 0, rounds, 0};
    ml_run(pool, dot_program, &a);
    return (int64_t)ML_TILE * 2 * VW * 4;
}

#define ML_LIMITS_EXPORTS ML_EXPORT(read_words), ML_EXPORT(dot_words),
