// LoRA by token: y[t] += Σ over its jobs of (weight · x[t] Aᵀ) B, over the job's own rank rows and no other's.
//
// A token's sums don't depend on who shares its job: each product x · A[row] is one chain over the inputs and one vsum,
// each output one chain over rank rows, then jobs, whatever the tile. Rows that aren't a job's are never read.
#pragma once
#include "ask.h"
#include "norm.h"

#define SHRINK_ROWS 16   // rank rows of a piece
#define SHRINK_FEW 4     // of one with so few tokens that reading A is all its work
#define SHRINK_TOKENS 36 // tokens of a piece
#if defined(__AVX2__) && !defined(__AVX512F__)
#define SHRINK_TILE 2 // tokens that are multiplied with 4 rank rows at a time: 8 sums of the 16 registers
#else
#define SHRINK_TILE 6
#endif

// Modules that share x and a phase: q, k and v, or gate and up, or one.
typedef struct {
    int32_t count;
    ml_pair pair[3];
    const ml_jobs *jobs[3];
    float *shrunk[3]; // f32 [jobs->width] of each
} lora_group;

// Where a member is in a group's pieces. Most come in rising order, so that finding them all is one walk.
typedef struct {
    const lora_group *group;
    int32_t module, job;
    int64_t first; // piece that the job begins with
} lora_walk;

ML_INLINE int32_t shrink_rows_of(const ml_job *job) { return job->count <= SHRINK_TOKENS ? SHRINK_FEW : SHRINK_ROWS; }

// Rank rows that hold factors.
ML_INLINE int32_t factors_of(const ml_job *job) { return job->rank - job->others; }

ML_INLINE int64_t shrink_pieces_of(const ml_job *job) {
    int64_t rows = (factors_of(job) + shrink_rows_of(job) - 1) / shrink_rows_of(job);
    return rows * ((job->count + SHRINK_TOKENS - 1) / SHRINK_TOKENS);
}

static int64_t lora_shrink_pieces(const lora_group *group) {
    int64_t pieces = 0;
    for (int32_t m = 0; m < group->count; m++)
        for (int32_t j = 0; j < group->jobs[m]->count; j++) pieces += shrink_pieces_of(&group->jobs[m]->job[j]);
    return pieces;
}

ML_INLINE lora_walk lora_begin(const lora_group *group) {
    lora_walk walk = {group, 0, 0, 0};
    return walk;
}

// x · A[row] for `tokens` × `rows`, both constants where this is called. `soon` are rows that are read after these.
ML_INLINE void shrink_tile(int tokens, int rows, const float *const *x, const uint16_t *a, const uint16_t *soon,
                           int32_t in, float *const *out, const float *weight) {
    vf sum[SHRINK_TILE][4];
#pragma GCC unroll 6
    for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) sum[t][r] = vzero();
    int32_t i = 0;
    for (; i + VW <= in; i += VW) {
        vf part[4];
        if (soon && i % 32 == 0)
            for (int r = 0; r < rows; r++) __builtin_prefetch(soon + (int64_t)r * in + i, 0, ML_FAR);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) part[r] = vbf16(a + (int64_t)r * in + i);
#pragma GCC unroll 6
        for (int t = 0; t < tokens; t++) {
            vf value = vload(x[t] + i);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) sum[t][r] = vfma(value, part[r], sum[t][r]);
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) {
            float total = vsum(sum[t][r]);
            for (int32_t rest = i; rest < in; rest++)
                total = fmaf(x[t][rest], bf16_to_float(a[(int64_t)r * in + rest]), total);
            out[t][r] = weight[t] * total;
        }
}

ML_INLINE void shrink_rows(int tokens, int rows, const float *const *x, const uint16_t *a, const uint16_t *soon,
                           int32_t in, float *const *out, const float *weight) {
    if (rows == 4) {
        shrink_tile(tokens, 4, x, a, soon, in, out, weight);
        return;
    }
    for (int r = 0; r < rows; r++) {
        float *own[SHRINK_TILE];
        for (int t = 0; t < tokens; t++) own[t] = out[t] + r;
        shrink_tile(tokens, 1, x, a + (int64_t)r * in, soon ? soon + (int64_t)r * in : nullptr, in, own, weight);
    }
}

// For up to SHRINK_TILE tokens and up to 4 rows.
static void shrink_some(int tokens, int rows, const float *const *x, const uint16_t *a, const uint16_t *soon,
                        int32_t in, float *const *out, const float *weight) {
#define SHRINK_CASE(tokens)                                                                                            \
    case tokens: shrink_rows(tokens, rows, x, a, soon, in, out, weight); break;
    switch (tokens) {
        SHRINK_CASE(1)
        SHRINK_CASE(2)
#if SHRINK_TILE > 2
        SHRINK_CASE(3)
        SHRINK_CASE(4)
        SHRINK_CASE(5)
        SHRINK_CASE(6)
#endif
    }
}

// shrunk[place + r] = weight · x · A[start + r] for some of a job's tokens and rank rows. `after` are the rows of A that
// are read then, or null.
static void shrink_part(const ml_pair *pair, const ml_job *job, const float *x, int32_t in, float *shrunk,
                        int32_t token, int32_t tokens, int32_t row, int32_t rows, const uint16_t *after) {
    const int32_t first = token;
    for (int32_t end = token + tokens; token < end;) {
        int32_t group = end - token < SHRINK_TILE ? end - token : SHRINK_TILE;
        const float *source[SHRINK_TILE];
        float *place[SHRINK_TILE];
        for (int32_t t = 0; t < group; t++) source[t] = x + (int64_t)job->tokens[token + t] * in;
        for (int32_t r = 0; r < rows; r += 4) {
            const uint16_t *a = pair->a + (first_row(pair, job) + row + r) * in;
            for (int32_t t = 0; t < group; t++) place[t] = shrunk + job->places[token + t] + row + r;
            int32_t count = rows - r < 4 ? rows - r : 4;
            const uint16_t *soon = token > first ? nullptr : r + 4 < rows ? a + 4 * (int64_t)in : after;
            shrink_some(group, count, source, a, soon, in, place, job->weights + token);
        }
        token += group;
    }
}

// The first rows of A of the job after the walk's, if there is one.
static const uint16_t *next_rows(const lora_walk *walk, int32_t in) {
    const lora_group *group = walk->group;
    int32_t module = walk->module, job = walk->job + 1;
    while (module < group->count && job >= group->jobs[module]->count) {
        module++;
        job = 0;
    }
    if (module == group->count) return nullptr;
    const ml_pair *pair = &group->pair[module];
    return pair->a + first_row(pair, &group->jobs[module]->job[job]) * in;
}

// Do piece number `piece` of the group for x [T, in].
static void lora_shrink_piece(lora_walk *walk, int64_t piece, const float *x, int32_t in) {
    const lora_group *group = walk->group;
    if (piece < walk->first) *walk = lora_begin(group);
    for (;;) {
        const ml_jobs *jobs = group->jobs[walk->module];
        if (walk->job == jobs->count) {
            walk->module++;
            walk->job = 0;
            continue;
        }
        int64_t own = shrink_pieces_of(&jobs->job[walk->job]);
        if (piece < walk->first + own) break;
        walk->first += own;
        walk->job++;
    }
    const ml_job *job = &group->jobs[walk->module]->job[walk->job];
    int32_t most = shrink_rows_of(job), across = (factors_of(job) + most - 1) / most, nth = (int32_t)(piece - walk->first);
    int32_t row = nth % across * most, token = nth / across * SHRINK_TOKENS;
    int32_t rows = factors_of(job) - row < most ? factors_of(job) - row : most;
    int32_t tokens = job->count - token < SHRINK_TOKENS ? job->count - token : SHRINK_TOKENS;
    const ml_pair *pair = &group->pair[walk->module];
    const uint16_t *after =
        row + rows < factors_of(job) ? pair->a + (first_row(pair, job) + row + rows) * in : next_rows(walk, in);
    shrink_part(pair, job, x, in, group->shrunk[walk->module], token, tokens, row, rows, after);
}

#define BLOCK_VECTORS (ML_BLOCK / VW)
#if VW == 16
#define EXPAND_TOKENS 8
#else
#define EXPAND_TOKENS 2
#endif

// y[t][32] += Σ_r shrunk[t][r] · b[r][32] for `tokens` rows, a constant where this is called.
ML_INLINE void expand_tile(int tokens, float *const *y, const float *const *shrunk, const uint16_t *b, int32_t rank) {
    vf sum[EXPAND_TOKENS][BLOCK_VECTORS];
#pragma GCC unroll 8
    for (int t = 0; t < tokens; t++)
#pragma GCC unroll 8
        for (int v = 0; v < BLOCK_VECTORS; v++) sum[t][v] = vload(y[t] + v * VW);
    for (int32_t r = 0; r < rank; r++) {
        vf part[BLOCK_VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < BLOCK_VECTORS; v++) part[v] = vbf16(b + (int64_t)r * ML_BLOCK + v * VW);
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) {
            vf factor = vset(shrunk[t][r]);
#pragma GCC unroll 8
            for (int v = 0; v < BLOCK_VECTORS; v++) sum[t][v] = vfma(factor, part[v], sum[t][v]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < tokens; t++)
#pragma GCC unroll 8
        for (int v = 0; v < BLOCK_VECTORS; v++) vstore(y[t] + v * VW, sum[t][v]);
}

// The same for a last block with less than 32 outputs in y.
static void expand_short(int32_t outputs, float *y, const float *shrunk, const uint16_t *b, int32_t rank) {
    float whole[ML_BLOCK] = {0};
    memcpy(whole, y, (size_t)outputs * sizeof(float));
    float *rows[1] = {whole};
    expand_tile(1, rows, &shrunk, b, rank);
    memcpy(y, whole, (size_t)outputs * sizeof(float));
}

// Scale and shift a block of 32 outputs of the tokens that have terms, before anything is added to them: y [tokens][32] is
// W x + bias, and the bias isn't scaled. What lies behind the outputs that exist is nobody's.
static void lora_term_block(const ml_pair *pair, const ml_jobs *jobs, const float *bias, int32_t blocks, int32_t block,
                            int32_t outputs, float *y) {
    if (!jobs->terms) return;
    float whole[ML_BLOCK] = {0};
    for (int32_t j = 0; bias && j < outputs; j++) whole[j] = bias[block * ML_BLOCK + j];
    for (const ml_term *term = jobs->term, *end = term + jobs->terms; term < end;) {
        const int32_t token = term->token;
        float *own = y + (int64_t)token * ML_BLOCK;
        vf sum[2][BLOCK_VECTORS]; // by kind
        for (int v = 0; v < BLOCK_VECTORS; v++) sum[ML_TERM_GAIN][v] = sum[ML_TERM_OFFSET][v] = vzero();
        for (; term < end && term->token == token; term++) {
            const uint16_t *row = values_of(pair, term, blocks, block);
            vf *of_kind = sum[term->kind];
            for (int v = 0; v < BLOCK_VECTORS; v++)
                of_kind[v] = vfma(vset(term->weight), vbf16(row + v * VW), of_kind[v]);
        }
        for (int v = 0; v < BLOCK_VECTORS; v++) {
            const vf before = vload(own + v * VW), product = vsub(before, vload(whole + v * VW));
            vstore(own + v * VW, vadd(vfma(product, sum[ML_TERM_GAIN][v], before), sum[ML_TERM_OFFSET][v]));
        }
    }
}

// Add a block of 32 outputs (its first `outputs` exist) of all tokens that have jobs. y + token · stride is a token's
// part of the block; the module has `blocks`.
static void lora_expand_block(const ml_pair *pair, const ml_jobs *jobs, const float *shrunk, int32_t blocks,
                              int32_t block, int32_t outputs, float *y, int64_t stride) {
    for (const ml_job *job = jobs->job; job < jobs->job + jobs->count; job++) {
        const uint16_t *own = block_of(pair, job, blocks, block);
        for (int32_t token = 0; token < job->count;) {
            int32_t group = outputs == ML_BLOCK && job->count - token >= EXPAND_TOKENS ? EXPAND_TOKENS : 1;
            float *target[EXPAND_TOKENS];
            const float *source[EXPAND_TOKENS];
            for (int32_t t = 0; t < group; t++) {
                target[t] = y + job->tokens[token + t] * stride;
                source[t] = shrunk + job->places[token + t];
            }
            if (outputs < ML_BLOCK) expand_short(outputs, target[0], source[0], own, factors_of(job));
            else if (group == EXPAND_TOKENS) expand_tile(EXPAND_TOKENS, target, source, own, factors_of(job));
            else expand_tile(1, target, source, own, factors_of(job));
            token += group;
        }
    }
}

typedef struct {
    const lora_group *group;
    const float *x;
    int32_t in;
    const int32_t *outputs;
    float *const *y;
} lora_call;

static void lora_program(ml_team team, void *argument) {
    const lora_call *call = (const lora_call *)argument;
    const lora_group *group = call->group;
    int64_t pieces = lora_shrink_pieces(group), piece;
    lora_walk walk = lora_begin(group);
    while ((piece = ml_take_near(team, pieces)) >= 0) lora_shrink_piece(&walk, piece, call->x, call->in);
    for (int32_t m = 0; m < group->count; m++) {
        ml_barrier(team);
        int32_t outputs = call->outputs[m], blocks = (outputs + ML_BLOCK - 1) / ML_BLOCK;
        while ((piece = ml_take_near(team, blocks)) >= 0) {
            int32_t first = (int32_t)piece * ML_BLOCK, own = outputs - first < ML_BLOCK ? outputs - first : ML_BLOCK;
            lora_expand_block(&group->pair[m], group->jobs[m], group->shrunk[m], blocks, (int32_t)piece, own,
                              call->y[m] + first, outputs);
        }
    }
}

// y[m] [T, outputs[m]] += the adapters' part of each of `modules` ≤ 3 modules that share x [T, in]. shrunk[m] is f32
// [jobs[m].width].
static void lora_rows(ml_pool *pool, int32_t modules, const ml_pair *pair, const ml_jobs *jobs, const float *x,
                      int32_t in, float *const *shrunk, const int32_t *outputs, float *const *y) {
    lora_group group;
    group.count = modules;
    for (int32_t m = 0; m < modules; m++) {
        group.pair[m] = pair[m];
        group.jobs[m] = jobs + m;
        group.shrunk[m] = shrunk[m];
    }
    lora_call call = {&group, x, in, outputs, y};
    ml_run(pool, lora_program, &call);
}

#define ML_LORA_EXPORTS ML_EXPORT(lora_rows),
