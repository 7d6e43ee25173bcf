// Entries of a step: memory for its intermediate results, and the programs that the team runs.
#pragma once
#include "forward.h"

// LORA_MODULES' places in a projection: which of up to three matrices that read the same rows.
static const int ml_place[ML_MODULES] = {0, 1, 2, 0, 0, 1, 0};

enum { ML_EMBED, ML_ATTN_IN, ML_ATTEND, ML_ATTN_OUT, ML_MLP_IN, ML_MLP_OUT, ML_FORWARD };

typedef struct {
    const ml_call *call;
    int32_t op;
    int32_t failed; // a member found no memory
    char *scratch;
} ml_program;

static void *carve(char *base, size_t *used, size_t bytes) {
    char *found = base ? base + *used : base;
    *used += whole_lines(bytes);
    return found;
}

static float *given_or_carved(float *given, char *base, size_t *used, int64_t count) {
    return given ? given : (float *)carve(base, used, (size_t)count * sizeof(float));
}

// f32 of what the adapters of a projection shrink its rows to, at most.
static int64_t shrunk_width(const ml_step *step) {
    int64_t width[] = {0, 0, 0, 0}, most = 0;
    static const int projection[ML_MODULES] = {0, 0, 0, 1, 2, 2, 3};
    for (int module = 0; module < ML_MODULES; module++) width[projection[module]] += step->jobs[module].width;
    for (int i = 0; i < 4; i++)
        if (width[i] > most) most = width[i];
    return most;
}

static size_t most_of(const ml_model *model, int place, size_t (*bytes)(const ml_matrix *m, int64_t rows), int64_t rows) {
    size_t most = 0;
    for (int32_t layer = 0; layer < model->layers; layer++)
        for (int module = 0; module < ML_MODULES; module++) {
            if (place >= 0 && ml_place[module] != place) continue;
            const size_t own = bytes(&model->layer[layer].module[module], rows);
            if (own > most) most = own;
        }
    return most;
}

static size_t unpacked_bytes(const ml_matrix *m, int64_t rows) {
    (void)rows;
    return linear_own_bytes(m);
}

// Bytes of a member's own memory, whatever the phase.
static size_t own_bytes(const ml_call *call) {
    const size_t linear = 2 * block_bytes(call->step) + most_of(call->model, -1, unpacked_bytes, 0);
    const size_t attention = attention_scratch(call->model);
    return linear > attention ? linear : attention;
}

// Lay out in `base` what the call doesn't bring; returns the bytes that it takes.
static size_t lay_out_step(ml_work *work, const ml_call *call, char *base) {
    const ml_model *model = call->model;
    const int64_t rows = call->step->tokens;
    size_t used = 0;
    work->call = *call;
    work->normed = (float *)carve(base, &used, (size_t)(rows * model->hidden) * sizeof(float));
    work->call.qkv = given_or_carved(call->qkv, base, &used, rows * qkv_width(model));
    work->call.o = given_or_carved(call->o, base, &used, rows * model->heads * model->head_dim);
    work->call.h = given_or_carved(call->h, base, &used, rows * model->intermediate);
    work->parts = (float *)carve(base, &used, attention_part_bytes(model, &work->deal));
    work->shrunk = (float *)carve(base, &used, (size_t)shrunk_width(call->step) * sizeof(float));
    for (int place = 0; place < 3; place++)
        work->quantized[place] = carve(base, &used, most_of(model, place, quantized_bytes, rows));
    return used;
}

static void step_program(ml_team team, void *argument) {
    ml_program *program = (ml_program *)argument;
    ml_work work;
    memset(&work, 0, sizeof work);
    work.team = team;
    work.deal = attention_begin(program->call->model, program->call->step, team.members);
    if (team.member == 0) program->scratch = (char *)ml_scratch(team.pool, lay_out_step(&work, program->call, 0));
    work.own = (char *)ml_own_scratch(team, own_bytes(program->call));
    if (!work.own || (team.member == 0 && !program->scratch)) __atomic_store_n(&program->failed, 1, __ATOMIC_RELAXED);
    ml_barrier(team);
    if (program->failed) return;
    lay_out_step(&work, program->call, program->scratch);
    static void (*const phases[])(ml_work *) = {embed_phase,     attn_in_phases, attend_phases, attn_out_phases,
                                                mlp_in_phases,   mlp_out_phases, forward_phases};
    phases[program->op](&work);
}

// Run an op of a step, or all of it. Returns 0, or 1 if there was no memory.
static int32_t step(ml_pool *pool, int32_t op, const ml_call *call) {
    ml_program program = {call, op, 0, 0};
    ml_run(pool, step_program, &program);
    return program.failed;
}

typedef struct {
    const ml_model *model;
    const float *x;
    const int32_t *rows;
    int64_t count;
    float *out;
} ml_hidden;

static void hidden_program(ml_team team, void *argument) {
    const ml_hidden *a = (const ml_hidden *)argument;
    const int32_t width = a->model->hidden;
    for (int64_t i; (i = ml_take(team)) < a->count;)
        rms_norm_row(a->x + (int64_t)a->rows[i] * width, a->model->final_norm, a->model->eps, width, a->out + i * width);
}

// out [count, hidden] = rows `rows` of x, by the final norm.
static void hidden(ml_pool *pool, const ml_model *model, const float *x, const int32_t *rows, int64_t count, float *out) {
    ml_hidden a = {model, x, rows, count, out};
    ml_run(pool, hidden_program, &a);
}

#define ML_FORWARD_EXPORTS ML_EXPORT(step), ML_EXPORT(hidden),
