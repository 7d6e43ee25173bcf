// Log probabilities of tokens and of the best beside them, from the logits as the model gave them; and the entries that
// sample and report rows.
#pragma once
#include "sample.h"

// log of the sum of exp(x - most): blocks are summed as float32, and over blocks as double.
static double log_total(const float *x, int32_t vocab, float most) {
    double total = 0.0;
    for (int32_t block = 0; block < blocks_of(vocab); block++) {
        int32_t i = block * SAMPLE_BLOCK, end = block_end(block, vocab);
        vf sum = vzero();
        for (; i + VW <= end; i += VW) {
            vf low = vsub(vload(x + i), vset(most));
            sum = vadd(sum, vpick(vless(low, vset(-87.3f)), vzero(), vexp(low)));
        }
        float rest = 0.0f;
        for (; i < end; i++) rest += expf(x[i] - most);
        total += (double)(vsum(sum) + rest);
    }
    return log(total);
}

// Tell of the row's token; a row that is not finite gets no token.
static void report_row(const ml_sampling *call, int32_t row, const sample_space *space) {
    const float *x = row_of(call, row);
    float most = find_maxima(x, call->vocab, space->maxima);
    if (!isfinite(most)) {
        call->ids[row] = SAMPLE_NOT_FINITE;
        return;
    }
    double offset = -(double)most - log_total(x, call->vocab, most);
    call->logprobs[row] = (double)x[call->ids[row]] + offset;
    int32_t count = call->told[row] < call->vocab ? call->told[row] : call->vocab;
    if (count > 0) find_best(x, call->vocab, count, -INFINITY, space);
    for (int32_t i = 0; i < count; i++) {
        call->top_ids[(int64_t)row * call->top + i] = space->best[i].id;
        call->top_logprobs[(int64_t)row * call->top + i] = (double)space->best[i].value + offset;
    }
}

typedef struct {
    const ml_sampling *call;
    int32_t draws;  // 0: the tokens are given
    int32_t failed; // a member found no memory
} ml_sampling_program;

static void sampling_program(ml_team team, void *argument) {
    ml_sampling_program *program = (ml_sampling_program *)argument;
    const ml_sampling *call = program->call;
    char *own = (char *)ml_own_scratch(team, sample_scratch(call->vocab));
    sample_space space = space_of(call->vocab, own);
    if (!own) __atomic_store_n(&program->failed, 1, __ATOMIC_RELAXED);
    for (int64_t taken; own && (taken = ml_take(team)) < call->rows;) {
        int32_t row = (int32_t)taken;
        if (program->draws) call->ids[row] = sample_row(call, row, &space);
        if (call->told[row] >= 0 && call->ids[row] >= 0) report_row(call, row, &space);
    }
}

// Choose a token for each row, and tell what is asked for. Returns 0, or 1 if there was no memory.
static int32_t sample(ml_pool *pool, const ml_sampling *call) {
    ml_sampling_program program = {call, 1, 0};
    ml_run(pool, sampling_program, &program);
    return program.failed;
}

// Tell what is asked for of tokens that are given.
static int32_t report(ml_pool *pool, const ml_sampling *call) {
    ml_sampling_program program = {call, 0, 0};
    ml_run(pool, sampling_program, &program);
    return program.failed;
}

#define ML_SAMPLE_EXPORTS ML_EXPORT(sample), ML_EXPORT(report),
