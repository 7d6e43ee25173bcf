// Paged attention over a mixed step: decodes and prompt chunks, grouped heads, sliding windows.
//
// A query's bits depend on its own position and window alone: keys come in tiles of 64 that begin at fixed positions,
// tiles in segments of 1,024 that do too, each sum is one chain over them, and a segment is merged into those before by
// the same operation wherever it was computed. A piece is a tile of queries of one sequence and KV head; a tile of keys
// is converted once for all its rows (queries × heads of the group). Scratch is bounded whatever the context.
//
// Keys that a query doesn't see are picked out, never multiplied by 0: those of other sequences are not even read, and
// its own later ones, or those before its window, may be NaN.
#pragma once
#include "attention_tile.h"
#include "rope.h"

#define SEGMENT 1024
#define MOST_ROWS 96 // of a piece, unless the heads of one group are more
#define MOST_QUERIES 64

// How a step is dealt out. Made once a step.
typedef struct {
    int32_t decodes;      // sequences with one query that come first
    int32_t queries;      // of a piece
    int64_t chunk_pieces; // they come first, those of the last queries before others: the longest ones
    int64_t pieces;
} attention_deal;

static int32_t queries_of_piece(const ml_model *model) {
    int32_t queries = MOST_ROWS / (model->heads / model->kv_heads);
    return queries < 1 ? 1 : queries > MOST_QUERIES ? MOST_QUERIES : queries;
}

ML_INLINE float *lay(float *base, size_t floats, size_t *used) {
    float *here = base ? base + *used : base;
    *used += (floats + 15) / 16 * 16;
    return here;
}

// Lay out a member's memory from `base`, which may be null; returns the floats it takes.
static size_t lay_out(const ml_model *model, float *base, attention_space *space) {
    size_t dim = padded(model->head_dim, VW), used = 0;
    size_t rows = padded(queries_of_piece(model) * (model->heads / model->kv_heads), VW);
    space->q = lay(base, rows * model->head_dim, &used);
    space->scores = lay(base, rows * KEY_TILE, &used);
    space->keys = lay(base, (size_t)model->head_dim * KEY_TILE, &used);
    space->values = lay(base, KEY_TILE * dim, &used);
    space->factor = lay(base, rows, &used);
    attention_sums *const sums[] = {&space->segment, &space->before};
    for (int i = 0; i < 2; i++) {
        sums[i]->out = lay(base, rows * dim, &used);
        sums[i]->sum = lay(base, rows * VW, &used);
        sums[i]->most = lay(base, rows, &used);
    }
    return used;
}

// Bytes of a member's own scratch.
static size_t attention_scratch(const ml_model *model) {
    attention_space space;
    return lay_out(model, 0, &space) * sizeof(float);
}

ML_INLINE int64_t tiles_of(const ml_step *step, int32_t sequence, int32_t queries) {
    return (step->query_start[sequence + 1] - step->query_start[sequence] + queries - 1) / queries;
}

static attention_deal attention_begin(const ml_model *model, const ml_step *step) {
    attention_deal deal = {0, queries_of_piece(model), 0, 0};
    while (deal.decodes < step->sequences && step->query_start[deal.decodes + 1] == deal.decodes + 1) deal.decodes++;
    for (int32_t s = deal.decodes; s < step->sequences; s++)
        deal.chunk_pieces += tiles_of(step, s, deal.queries) * model->kv_heads;
    deal.pieces = deal.chunk_pieces + (int64_t)deal.decodes * model->kv_heads;
    return deal;
}

static attention_task task_of(const ml_model *model, int32_t layer, const ml_step *step, const attention_deal *deal,
                              int64_t piece) {
    attention_task task = {};
    int64_t tile = 0;
    if (piece >= deal->chunk_pieces) {
        piece -= deal->chunk_pieces;
        task.sequence = (int32_t)(piece / model->kv_heads);
    } else {
        int64_t own = 0;
        for (task.sequence = deal->decodes;; task.sequence++, piece -= own) {
            own = tiles_of(step, task.sequence, deal->queries) * model->kv_heads;
            if (piece < own) break;
        }
        tile = own / model->kv_heads - 1 - piece / model->kv_heads;
    }
    int32_t start = step->query_start[task.sequence], stop = step->query_start[task.sequence + 1];
    task.kv_head = (int32_t)(piece % model->kv_heads);
    task.token = start + (int32_t)tile * deal->queries;
    task.position = step->context_lens[task.sequence] - (stop - task.token);
    task.queries = stop - task.token < deal->queries ? stop - task.token : deal->queries;
    task.group = model->heads / model->kv_heads;
    task.rows = task.queries * task.group;
    task.window = model->layer[layer].window;
    return task;
}

static void clear_sums(attention_sums *sums, int32_t rows, int32_t dim) {
    memset(sums->out, 0, (size_t)rows * dim * sizeof(float));
    memset(sums->sum, 0, (size_t)rows * VW * sizeof(float));
    for (int32_t r = 0; r < rows; r++) sums->most[r] = -INFINITY;
}

// Whether a row has seen no key. (Scores of -inf alone make its sum NaN.)
ML_INLINE int saw_nothing(const attention_sums *sums, int32_t row) {
    return sums->most[row] == -INFINITY && sums->sum[row * VW] == 0.0f;
}

static void merge_row(const attention_sums *more, attention_sums *sums, int32_t row, int32_t dim) {
    float *out = sums->out + row * dim, *sum = sums->sum + row * VW;
    const float *more_out = more->out + row * dim, *more_sum = more->sum + row * VW;
    if (saw_nothing(more, row)) return;
    float most = sums->most[row] < more->most[row] ? more->most[row] : sums->most[row];
    vf own = vzero(), other = vset(1.0f);
    if (!saw_nothing(sums, row)) {
        own = vexp(vset(sums->most[row] - most));
        other = vexp(vset(more->most[row] - most));
    }
    for (int32_t d = 0; d < dim; d += VW)
        vstore(out + d, vfma(vload(more_out + d), other, vmul(vload(out + d), own)));
    vstore(sum, vfma(vload(more_sum), other, vmul(vload(sum), own)));
    sums->most[row] = most;
}

// Add the keys from `first` to before `last`, within one segment, and merge them into what was seen before.
static void add_segment(const attention_cache *cache, const attention_task *task, int32_t first, int32_t last,
                        attention_space *space) {
    clear_sums(&space->segment, task->rows, cache->dim);
    for (int32_t tile = first / KEY_TILE * KEY_TILE; tile < last; tile += KEY_TILE)
        add_tile(cache, task, tile, space);
    for (int32_t r = 0; r < task->rows; r++) merge_row(&space->segment, &space->before, r, cache->dim);
}

static void read_queries(const ml_model *model, const attention_task *task, const float *qkv, float *out) {
    int32_t dim = model->head_dim, width = (model->heads + 2 * model->kv_heads) * dim;
    float scale = 1.0f / sqrtf((float)dim);
    for (int32_t r = 0; r < task->rows; r++) {
        const float *q = qkv + (int64_t)(task->token + r / task->group) * width +
                         (task->kv_head * task->group + r % task->group) * dim;
        for (int32_t d = 0; d < dim; d++) out[r * dim + d] = q[d] * scale;
    }
}

static void write_out(const ml_model *model, const attention_task *task, const attention_sums *sums, float *o) {
    int32_t dim = model->head_dim, stride = padded(dim, VW);
    for (int32_t r = 0; r < task->rows; r++) {
        float *row = o + ((int64_t)(task->token + r / task->group) * model->heads + task->kv_head * task->group +
                          r % task->group) * dim;
        float sum = vsum(vload(sums->sum + r * VW));
        for (int32_t d = 0; d < dim; d++) row[d] = sums->out[r * stride + d] / sum;
    }
}

// o [T, heads · head_dim] at the queries of piece number `piece`; qkv [T, q + k + v] with q rotated, and k and v already
// in the cache. `scratch` is the member's own: attention_scratch bytes, 64-byte aligned.
static void attention_piece(const ml_model *model, int32_t layer, const ml_kv *kv, const ml_step *step,
                            const attention_deal *deal, int64_t piece, const float *qkv, float *o, void *scratch) {
    attention_task task = task_of(model, layer, step, deal, piece);
    attention_space space;
    lay_out(model, (float *)scratch, &space);
    attention_cache cache = {layer_keys(model, kv, layer), layer_values(model, kv, layer),
                             step->block_tables + (int64_t)task.sequence * step->table_width, kv->block_size,
                             model->head_dim, padded(model->head_dim, VW), model->kv_heads};
    int32_t end = task.position + task.queries, first = 0;
    if (task.window && task.position - task.window + 1 > 0) first = task.position - task.window + 1;
    read_queries(model, &task, qkv, space.q);
    clear_sums(&space.before, task.rows, cache.dim);
    while (first < end) {
        int32_t border = (first / SEGMENT + 1) * SEGMENT, last = border < end ? border : end;
        add_segment(&cache, &task, first, last, &space);
        first = last;
    }
    write_out(model, &task, &space.before, o);
}

static void attention_program(ml_team team, void *argument) {
    const ml_call *call = (const ml_call *)argument;
    void *scratch = ml_own_scratch(team, attention_scratch(call->model));
    attention_deal deal = attention_begin(call->model, call->step);
    for (int64_t piece; (piece = ml_take(team)) < deal.pieces;)
        attention_piece(call->model, call->layer, call->kv, call->step, &deal, piece, call->qkv, call->o, scratch);
}

// Attention of a whole step after rope_rows: call->qkv to call->o.
static void attention_rows(ml_pool *pool, ml_call *call) { ml_run(pool, attention_program, call); }

#define ML_ATTENTION_EXPORTS ML_EXPORT(attention_rows),
