// A whole step in one call, from its tokens to the next ones: layers, last states, logits, and what is sampled of them.
// Whoever calls from an interpreter gives its lock up once.
#pragma once
#include <time.h>
#include <unistd.h>

#include "report.h"
#include "search.h"
#include "step.h"

static double seconds_now() {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

// Take note of states that are not finite: what isn't in between stays in the residual stream.
static void finite_program(ml_team team, void *argument) {
    const ml_call *call = (const ml_call *)argument;
    const int32_t width = call->model->hidden;
    for (int64_t token; (token = ml_take(team)) < call->step->tokens;) {
        const float *x = call->x + token * width;
        vf check = vzero();
        float rest = 0.0f;
        int32_t i = 0;
        for (; i + VW <= width; i += VW) check = vfma(vload(x + i), vzero(), check);
        for (; i < width; i++) rest += x[i] * 0.0f;
        if (!(vsum(check) + rest == 0.0f)) call->step->finite[token] = 0;
    }
}

// Let whoever sleeps on it go on: the caller has given the interpreter's lock up, so that nobody waits for it twice.
static void wake_up(int descriptor) {
    const char byte = 1;
    // A pipe that is full wakes as well.
    if (descriptor >= 0 && write(descriptor, &byte, 1) < 0) return;
}

// Returns 0, or 1 if there was no memory.
static int32_t run(ml_pool *pool, ml_run_call *a) {
    const ml_model *model = a->call->model;
    wake_up(a->wake);
    double began = seconds_now();
    if (step(pool, ML_FORWARD, a->call)) return 1;
    ml_run(pool, finite_program, (void *)a->call);
    a->strange = 0;
    for (int32_t token = 0; token < a->call->step->tokens; token++) a->strange += !a->call->step->finite[token];
    hidden(pool, model, a->call->x, a->rows, a->count, a->hidden);
    a->searched = can_search(model->head, a->sampling, a->count);
    int32_t failed = 0;
    if (a->searched) failed = search(pool, model->head, a->hidden, a->count, a->sampling->places, a->sampling->ids);
    else if (a->count) failed = linear(pool, model->head, a->hidden, a->count, a->logits);
    double computed = seconds_now();
    if (!failed && a->sampling && !a->searched) failed = sample(pool, a->sampling);
    a->seconds[0] = computed - began;
    a->seconds[1] = seconds_now() - computed;
    return failed;
}

#define ML_RUN_EXPORTS ML_EXPORT(run),
