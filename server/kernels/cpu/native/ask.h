// Adapters' parts of B, asked for while the block of a matrix before them is multiplied: a few lines of memory with each group
// of weights, so that memory is never idle and the processor never waits with more asked for than it can hold.
#pragma once
#include "abi.h"
#include "simd.h"

#define ML_FAR 2 // the second cache, for __builtin_prefetch: a block is more than the first one holds

// Which of all rank rows, layer by layer, a job's first one is.
ML_INLINE int64_t first_row_of(const ml_pair *pair, int32_t start, int32_t rank) {
    return (int64_t)start * pair->layers + (int64_t)pair->layer * rank;
}

ML_INLINE int64_t first_row(const ml_pair *pair, const ml_job *job) { return first_row_of(pair, job->start, job->rank); }

// A block of an adapter's B [rank][32], of a module with so many blocks.
ML_INLINE const uint16_t *block_of(const ml_pair *pair, const ml_job *job, int64_t blocks, int64_t block) {
    return pair->b + (first_row(pair, job) * blocks + block * job->rank) * ML_BLOCK;
}

// A term's row of the same block.
ML_INLINE const uint16_t *values_of(const ml_pair *pair, const ml_term *term, int64_t blocks, int64_t block) {
    const int64_t first = first_row_of(pair, term->start, term->rank) * blocks + block * term->rank;
    return pair->b + (first + term->row) * ML_BLOCK;
}

typedef struct {
    const ml_pair *pair;
    const ml_job *job, *end; // those that are left
    int64_t blocks, block;   // of the module, and which of them is asked for
    const uint16_t *at;      // rank rows of B of the job before, each a line of memory
    int64_t left;            // of them
    int64_t each;            // lines to ask for with a group
} lora_asks;

// What to ask for in so many goes.
static lora_asks ask_for_block(const ml_pair *pair, const ml_jobs *jobs, int64_t blocks, int64_t block, int64_t times) {
    const int count = times && block < blocks ? jobs->count : 0;
    lora_asks asks = {pair, jobs->job, jobs->job + count, blocks, block, nullptr, 0, 0};
    for (const ml_job *job = asks.job; job < asks.end; job++) asks.each += job->rank;
    if (times) asks.each = (asks.each + times - 1) / times;
    return asks;
}

ML_INLINE void ask_for_more(lora_asks *asks) {
    for (int64_t lines = asks->each; lines > 0; lines--) {
        if (!asks->left) {
            if (asks->job == asks->end) {
                asks->each = 0;
                return;
            }
            asks->at = block_of(asks->pair, asks->job, asks->blocks, asks->block);
            asks->left = asks->job++->rank;
        }
        __builtin_prefetch(asks->at, 0, ML_FAR);
        asks->at += ML_BLOCK;
        asks->left--;
    }
}
