// The ops of a step, and the whole of it as one program of the team. Phases are parted by barriers; within one, pieces
// are dealt out, and what a token gets doesn't depend on who works on which.
#pragma once
#include "abi.h"
#include "attention.h"
#include "embedding.h"
#include "linear.h"
#include "lora.h"
#include "norm.h"
#include "quantize.h"
#include "rope.h"
#include "team.h"

#define ML_ROWS_A_PIECE 4 // of norms and quantisation
#define ML_ROWS_A_RUN 16  // of what is written to the cache, at most

// What a member works with: a step, the team's memory for its intermediate results, and the member's own.
typedef struct {
    ml_team team;
    ml_call call; // with all of its buffers
    attention_deal deal;
    float *normed;         // [tokens, hidden]
    float *shrunk;         // x Aᵀ of all jobs of a projection
    float *parts;          // of attention
    void *quantized[3];    // memory of the inputs of up to three matrices
    char *own;             // own_bytes()
} ml_work;

// Up to three matrices that read the same rows, and the adapters of their modules.
typedef struct {
    int count;
    const ml_matrix *matrix[3];
    ml_quantized quantized[3];
    int shared[3]; // whether it takes the first one's
    lora_group lora;
} ml_projection;

static int64_t qkv_width(const ml_model *model) {
    return (int64_t)(model->heads + 2 * model->kv_heads) * model->head_dim;
}

static ml_projection project(const ml_work *work, int first, int count) {
    const ml_call *call = &work->call;
    ml_projection p;
    memset(&p, 0, sizeof p);
    p.count = p.lora.count = count;
    float *shrunk = work->shrunk;
    for (int i = 0; i < count; i++) {
        p.matrix[i] = &call->model->layer[call->layer].module[first + i];
        p.shared[i] = i && same_input(p.matrix[0], p.matrix[i]);
        place_quantized(&p.quantized[i], p.matrix[i], call->step->tokens, work->quantized[p.shared[i] ? 0 : i]);
        p.lora.pair[i] = call->arena->pair[first + i];
        p.lora.pair[i].layer = call->layer;
        p.lora.jobs[i] = &call->step->jobs[first + i];
        p.lora.shrunk[i] = shrunk;
        shrunk += p.lora.jobs[i]->width;
    }
    return p;
}

// Bring row `row` of x into the form in which the matrices read it.
static void quantize_inputs(ml_projection *p, const float *x, int64_t row) {
    for (int i = 0; i < p->count; i++)
        if (!p->shared[i]) quantize_row(x, p->matrix[i], &p->quantized[i], row);
}

static void quantize_phase(ml_work *work, ml_projection *p, const float *x) {
    const int64_t rows = work->call.step->tokens, width = p->matrix[0]->in;
    for (int64_t first; (first = ml_take(work->team) * ML_ROWS_A_PIECE) < rows;)
        for (int64_t row = first; row < rows && row < first + ML_ROWS_A_PIECE; row++)
            quantize_inputs(p, x + row * width, row);
    ml_barrier(work->team);
}

static void norm_phase(ml_work *work, ml_projection *p, const float *weight) {
    const ml_model *model = work->call.model;
    const int64_t rows = work->call.step->tokens, width = model->hidden;
    for (int64_t first; (first = ml_take(work->team) * ML_ROWS_A_PIECE) < rows;)
        for (int64_t row = first; row < rows && row < first + ML_ROWS_A_PIECE; row++) {
            float *normed = work->normed + row * width;
            rms_norm_row(work->call.x + row * width, weight, model->eps, (int32_t)width, normed);
            quantize_inputs(p, normed, row);
        }
    ml_barrier(work->team);
}

// x Aᵀ of every adapter of the projection's modules. Without adapters there is no such phase.
static void shrink_phase(ml_work *work, const ml_projection *p, const float *x) {
    const int64_t pieces = lora_shrink_pieces(&p->lora);
    if (!pieces) return;
    lora_walk walk = lora_begin(&p->lora);
    for (int64_t piece; (piece = ml_take_near(work->team, pieces)) >= 0;) lora_shrink_piece(&walk, piece, x, p->matrix[0]->in);
    ml_barrier(work->team);
}

static int32_t outputs_of(const ml_matrix *m, int64_t block) {
    const int64_t left = m->out - block * ML_BLOCK;
    return (int32_t)(left < ML_BLOCK ? left : ML_BLOCK);
}

// Outputs [32 · block, …) of matrix i for all tokens, adapters applied: y [tokens][32]. `rest` is for linear_block.
static void output_block(const ml_work *work, const ml_projection *p, int i, int32_t block, const float *x, float *y,
                         void *rest, const uint8_t *next) {
    const ml_matrix *m = p->matrix[i];
    const int64_t rows = work->call.step->tokens, times = linear_asks(m, &p->quantized[i], rows);
    lora_asks more = ask_for_block(&p->lora.pair[i], p->lora.jobs[i], m->blocks, block + 1, times);
    linear_block(m, &p->quantized[i], x, rows, block, y, ML_BLOCK, rest, next, &more);
    const int32_t outputs = outputs_of(m, block);
    lora_term_block(&p->lora.pair[i], p->lora.jobs[i], m->bias, m->blocks, block, outputs, y);
    lora_expand_block(&p->lora.pair[i], p->lora.jobs[i], p->lora.shrunk[i], m->blocks, block, outputs, y, ML_BLOCK);
}

// Bytes of [tokens][32] f32.
static size_t block_bytes(const ml_step *step) { return (size_t)step->tokens * ML_BLOCK * sizeof(float); }

// out[:, first column of the matrix + …] = the projection, or += where it goes to the residual stream.
static void output_phase(ml_work *work, const ml_projection *p, const float *x, float *out, int64_t width, int add) {
    const int64_t rows = work->call.step->tokens;
    float *y = (float *)(void *)work->own;
    int64_t all = 0;
    for (int i = 0; i < p->count; i++) all += p->matrix[i]->blocks;
    for (int64_t block; (block = ml_take_near(work->team, all)) >= 0;) {
        int i = 0;
        float *to = out;
        for (; block >= p->matrix[i]->blocks; block -= p->matrix[i++]->blocks) to += p->matrix[i]->out;
        to += block * ML_BLOCK;
        output_block(work, p, i, (int32_t)block, x, y, work->own + block_bytes(work->call.step), nullptr);
        const int32_t n = outputs_of(p->matrix[i], block);
        for (int64_t row = 0; row < rows; row++)
            for (int32_t j = 0; j < n; j++)
                to[row * width + j] = y[row * ML_BLOCK + j] + (add ? to[row * width + j] : 0.0f);
    }
    ml_barrier(work->team);
}

// h = silu(gate) · up: a piece has a block of the gate and the same of up.
static void gate_phase(ml_work *work, const ml_projection *p, const float *x) {
    const ml_step *step = work->call.step;
    const int64_t width = work->call.model->intermediate;
    float *gate = (float *)(void *)work->own, *up = gate + block_bytes(step) / sizeof(float);
    char *rest = work->own + 2 * block_bytes(step);
    for (int64_t block; (block = ml_take_near(work->team, p->matrix[0]->blocks)) >= 0;) {
        output_block(work, p, 0, (int32_t)block, x, gate, rest, codes_of(p->matrix[1], block));
        output_block(work, p, 1, (int32_t)block, x, up, rest, codes_of(p->matrix[0], block + 1));
        for (int64_t row = 0; row < step->tokens; row++)
            silu_mul(gate + row * ML_BLOCK, up + row * ML_BLOCK, outputs_of(p->matrix[0], block),
                     work->call.h + row * width + block * ML_BLOCK);
    }
    ml_barrier(work->team);
}

static void embed_phase(ml_work *work) {
    const ml_call *call = &work->call;
    const float *const *given = call->step->given;
    for (int64_t row; (row = ml_take(work->team)) < call->step->tokens;) {
        float *x = call->x + row * call->model->hidden;
        if (given && given[row]) memcpy(x, given[row], (size_t)call->model->hidden * sizeof(float));
        else embedding_row(call->model->embedding, call->step->ids[row], x);
    }
    ml_barrier(work->team);
}

static void attn_in_phases(ml_work *work) {
    ml_projection p = project(work, ML_Q, 3);
    norm_phase(work, &p, work->call.model->layer[work->call.layer].attn_norm);
    shrink_phase(work, &p, work->normed);
    output_phase(work, &p, work->normed, work->call.qkv, qkv_width(work->call.model), 0);
}

static void attend_phases(ml_work *work) {
    const ml_call *call = &work->call;
    const int64_t width = qkv_width(call->model), rows = call->step->tokens;
    // A prompt's tokens in runs: neighbours write to the same lines of the cache.
    int64_t run = rows / (4 * work->team.members);
    run = run < 1 ? 1 : run > ML_ROWS_A_RUN ? ML_ROWS_A_RUN : run;
    for (int64_t first; (first = ml_take(work->team) * run) < rows;)
        for (int64_t row = first; row < rows && row < first + run; row++)
            rope_row(call->model, call->layer, call->kv, call->step, (int32_t)row, call->qkv + row * width);
    attention_ask(call, &work->deal, work->deal.pieces * work->team.member / work->team.members);
    ml_barrier(work->team);
    attention_phases(work->team, call, &work->deal, work->own, work->parts);
}

static void attn_out_phases(ml_work *work) {
    ml_projection p = project(work, ML_O, 1);
    quantize_phase(work, &p, work->call.o);
    shrink_phase(work, &p, work->call.o);
    output_phase(work, &p, work->call.o, work->call.x, work->call.model->hidden, 1);
}

static void mlp_in_phases(ml_work *work) {
    ml_projection p = project(work, ML_GATE, 2);
    norm_phase(work, &p, work->call.model->layer[work->call.layer].mlp_norm);
    shrink_phase(work, &p, work->normed);
    gate_phase(work, &p, work->normed);
}

static void mlp_out_phases(ml_work *work) {
    ml_projection p = project(work, ML_DOWN, 1);
    quantize_phase(work, &p, work->call.h);
    shrink_phase(work, &p, work->call.h);
    output_phase(work, &p, work->call.h, work->call.x, work->call.model->hidden, 1);
}

static void forward_phases(ml_work *work) {
    embed_phase(work);
    for (work->call.layer = 0; work->call.layer < work->call.model->layers; work->call.layer++) {
        attn_in_phases(work);
        attend_phases(work);
        attn_out_phases(work);
        mlp_in_phases(work);
        mlp_out_phases(work);
    }
}
