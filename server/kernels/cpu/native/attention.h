// Paged attention over a mixed step: decodes and prompt chunks, grouped heads, sliding windows.
//
// A query's bits depend on its own position and window alone: keys come in tiles of 64 that begin at fixed positions,
// tiles in segments of 1,024 that do too, each sum is one chain over them, and a segment is merged into those before by
// the same operation wherever it was computed. A piece is a tile of queries of one sequence and KV head; a tile of keys
// is converted once for all its rows (queries × heads of the group). Where that makes too few pieces for the team, each
// segment of a decode is one, and a phase of its own merges them. Scratch is bounded whatever the context.
//
// Keys that a query doesn't see are picked out, never multiplied by 0: those of other sequences are not even read, and
// its own later ones, or those before its window, may be NaN.
#pragma once
#include "attention_tile.h"
#include "rope.h"

#define SEGMENT 1024
#define MOST_ROWS 96 // of a piece, unless the heads of one group are more
#define MOST_QUERIES 64
#define MOST_PARTS 4096 // segments of decodes that are pieces of their own

// How a step is dealt out. Made once a step, the same by all members.
typedef struct {
    int32_t decodes;      // sequences with one query that come first
    int32_t queries;      // of a piece
    int64_t chunk_pieces; // they come first, those of the last queries before others: the longest ones
    int64_t parts;        // segments of decodes, if they are pieces; else 0
    int64_t pieces;
    int64_t merges; // pieces of the second phase, which merges the parts; 0: there is none
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

ML_INLINE int64_t segments_of(const ml_step *step, int32_t sequence) {
    return (step->context_lens[sequence] + SEGMENT - 1) / SEGMENT;
}

static attention_deal attention_begin(const ml_model *model, const ml_step *step, int members) {
    attention_deal deal = {0, queries_of_piece(model), 0, 0, 0, 0};
    while (deal.decodes < step->sequences && step->query_start[deal.decodes + 1] == deal.decodes + 1) deal.decodes++;
    for (int32_t s = deal.decodes; s < step->sequences; s++)
        deal.chunk_pieces += tiles_of(step, s, deal.queries) * model->kv_heads;
    int64_t whole = (int64_t)deal.decodes * model->kv_heads, parts = 0;
    deal.pieces = deal.chunk_pieces + whole;
    if (members < 2 || deal.pieces >= 2 * members) return deal;
    for (int32_t s = 0; s < deal.decodes; s++) parts += segments_of(step, s) * model->kv_heads;
    if (parts == whole || parts > MOST_PARTS) return deal;
    deal.parts = parts;
    deal.pieces = deal.chunk_pieces + parts;
    deal.merges = whole;
    return deal;
}

// Floats of a part's sums.
ML_INLINE size_t part_floats(const ml_model *model) {
    return (size_t)padded(model->heads / model->kv_heads * (padded(model->head_dim, VW) + VW + 1), 16);
}

// Bytes of the team's memory for the parts, 64-byte aligned.
ML_INLINE size_t attention_part_bytes(const ml_model *model, const attention_deal *deal) {
    return (size_t)deal->parts * part_floats(model) * sizeof(float);
}

ML_INLINE attention_sums part_sums(const ml_model *model, int64_t part, float *parts) {
    size_t rows = model->heads / model->kv_heads, dim = padded(model->head_dim, VW);
    float *base = parts + part * part_floats(model);
    attention_sums sums = {base, base + rows * dim, base + rows * (dim + VW)};
    return sums;
}

static attention_task task_of(const ml_model *model, int32_t layer, const ml_step *step, int32_t sequence,
                              int32_t kv_head, int32_t first, int32_t queries) {
    attention_task task = {};
    int32_t start = step->query_start[sequence], stop = step->query_start[sequence + 1];
    task.table = step->block_tables + (int64_t)sequence * step->table_width;
    task.sequence = sequence;
    task.kv_head = kv_head;
    task.token = start + first;
    task.position = step->context_lens[sequence] - (stop - task.token);
    task.queries = stop - task.token < queries ? stop - task.token : queries;
    task.group = model->heads / model->kv_heads;
    task.rows = task.queries * task.group;
    task.window = model->layer[layer].window;
    return task;
}

// The piece of a chunk: the last queries of a sequence come first.
static attention_task chunk_task(const ml_model *model, int32_t layer, const ml_step *step, const attention_deal *deal,
                                 int64_t piece) {
    int32_t sequence = deal->decodes;
    int64_t own;
    for (;; sequence++, piece -= own) {
        own = tiles_of(step, sequence, deal->queries) * model->kv_heads;
        if (piece < own) break;
    }
    int64_t tile = own / model->kv_heads - 1 - piece / model->kv_heads;
    return task_of(model, layer, step, sequence, (int32_t)(piece % model->kv_heads), (int32_t)tile * deal->queries,
                   deal->queries);
}

ML_INLINE attention_task decode_task(const ml_model *model, int32_t layer, const ml_step *step, int64_t piece) {
    int32_t sequence = (int32_t)(piece / model->kv_heads), kv_head = (int32_t)(piece % model->kv_heads);
    return task_of(model, layer, step, sequence, kv_head, 0, 1);
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

// Sum up the keys from `first` to before `last`, within one segment. `after` is what is read then.
static void sum_segment(const attention_cache *cache, const attention_task *task, int32_t first, int32_t last,
                        const key_tile *after, attention_space *space) {
    clear_sums(&space->segment, task->rows, cache->dim);
    for (int32_t tile = first / KEY_TILE * KEY_TILE; tile < last; tile += KEY_TILE) {
        key_tile more = {*task, tile + KEY_TILE};
        add_tile(cache, task, tile, tile + KEY_TILE < last ? &more : after, space);
    }
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

// The first key that a task sees.
ML_INLINE int32_t first_key(const attention_task *task) {
    int32_t first = task->window ? task->position - task->window + 1 : 0;
    return first < 0 ? 0 : first;
}

// All segments of a task, one after the other.
static void whole_task(const attention_cache *cache, const attention_task *task, const key_tile *after,
                       attention_space *space) {
    clear_sums(&space->before, task->rows, cache->dim);
    int32_t end = task->position + task->queries;
    for (int32_t first = first_key(task); first < end;) {
        int32_t border = (first / SEGMENT + 1) * SEGMENT, last = border < end ? border : end;
        key_tile more = {*task, last};
        sum_segment(cache, task, first, last, last < end ? &more : after, space);
        for (int32_t r = 0; r < task->rows; r++) merge_row(&space->segment, &space->before, r, cache->dim);
        first = last;
    }
}

// One segment of a decode into its part.
static void part_task(const attention_cache *cache, const attention_task *task, int64_t segment,
                      const key_tile *after, attention_space *space, attention_sums part) {
    int32_t first = (int32_t)segment * SEGMENT, last = first + SEGMENT, end = task->position + task->queries;
    if (first < first_key(task)) first = first_key(task);
    space->segment = part;
    sum_segment(cache, task, first, last < end ? last : end, after, space);
}

static attention_cache cache_of(const ml_call *call) {
    attention_cache cache = {};
    cache.half = half_of(call->model, call->kv);
    cache.keys = layer_keys(&cache.half, call->kv, call->layer);
    cache.values = layer_values(&cache.half, call->kv, call->layer);
    cache.dim = padded(call->model->head_dim, VW);
    return cache;
}

// Find a part's decode, as a piece of such, and segment.
static int64_t decode_of_part(const ml_model *model, const ml_step *step, int64_t part, int64_t *segment) {
    int32_t sequence = 0;
    for (int64_t own; part >= (own = segments_of(step, sequence) * model->kv_heads); sequence++) part -= own;
    *segment = part % segments_of(step, sequence);
    return sequence * (int64_t)model->kv_heads + part / segments_of(step, sequence);
}

// A piece's task, and for a part its segment.
static attention_task task_of_piece(const ml_model *model, int32_t layer, const ml_step *step,
                                    const attention_deal *deal, int64_t piece, int64_t *segment) {
    const int64_t part = piece - deal->chunk_pieces;
    if (part < 0) return chunk_task(model, layer, step, deal, piece);
    return decode_task(model, layer, step, deal->parts ? decode_of_part(model, step, part, segment) : part);
}

// The first tile that a piece reads, if there is such a piece.
static key_tile first_tile(const ml_model *model, int32_t layer, const ml_step *step, const attention_deal *deal,
                           int64_t piece) {
    key_tile tile = {};
    tile.first = -1;
    if (piece >= deal->pieces) return tile;
    int64_t segment = 0;
    tile.task = task_of_piece(model, layer, step, deal, piece, &segment);
    const int32_t first = first_key(&tile.task), begins = (int32_t)segment * SEGMENT;
    tile.first = (first < begins ? begins : first) / KEY_TILE * KEY_TILE;
    return tile;
}

// Ask for what a member reads first, should it get piece number `piece`.
static void attention_ask(const ml_call *call, const attention_deal *deal, int64_t piece) {
    const key_tile tile = first_tile(call->model, call->layer, call->step, deal, piece);
    if (tile.first < 0) return;
    const attention_cache cache = cache_of(call);
    ask_for_tile(&cache, &tile);
}

// o [T, heads · head_dim] at the queries of piece number `piece`, or a part; qkv [T, q + k + v] with q rotated, and k and
// v already in the cache. `scratch` is the member's own, attention_scratch bytes; `parts` the team's,
// attention_part_bytes.
static void attention_piece(const ml_call *call, const attention_deal *deal, int64_t piece, void *scratch,
                            float *parts) {
    const ml_model *model = call->model;
    int64_t segment = 0;
    const attention_task task = task_of_piece(model, call->layer, call->step, deal, piece, &segment);
    const attention_cache cache = cache_of(call);
    const key_tile after = first_tile(model, call->layer, call->step, deal, piece + 1);
    attention_space space;
    lay_out(model, (float *)scratch, &space);
    read_queries(model, &task, call->qkv, space.q);
    if (deal->parts && piece >= deal->chunk_pieces) {
        part_task(&cache, &task, segment, &after, &space, part_sums(model, piece - deal->chunk_pieces, parts));
        return;
    }
    whole_task(&cache, &task, &after, &space);
    write_out(model, &task, &space.before, call->o);
}

// Piece `piece` of the second phase: o of a decode from its parts, merged in the order of whole_task.
static void attention_merge(const ml_model *model, int32_t layer, const ml_step *step, int64_t piece, float *parts,
                            float *o, void *scratch) {
    attention_task task = decode_task(model, layer, step, piece);
    int32_t dim = padded(model->head_dim, VW);
    attention_space space;
    lay_out(model, (float *)scratch, &space);
    clear_sums(&space.before, task.rows, dim);
    int64_t part = 0, segments = segments_of(step, task.sequence);
    for (int32_t s = 0; s < task.sequence; s++) part += segments_of(step, s) * model->kv_heads;
    part += task.kv_head * segments;
    for (int64_t segment = 0; segment < segments; segment++, part++) {
        attention_sums sums = part_sums(model, part, parts);
        for (int32_t r = 0; r < task.rows; r++) merge_row(&sums, &space.before, r, dim);
    }
    write_out(model, &task, &space.before, o);
}

// Both phases, for one member of a team. While it reads a piece's last keys it asks for the next piece's first ones.
static void attention_phases(ml_team team, const ml_call *call, const attention_deal *deal, void *scratch,
                             float *parts) {
    for (int64_t piece; (piece = ml_take_near(team, deal->pieces)) >= 0;)
        attention_piece(call, deal, piece, scratch, parts);
    ml_barrier(team);
    if (!deal->merges) return;
    for (int64_t piece; (piece = ml_take(team)) < deal->merges;)
        attention_merge(call->model, call->layer, call->step, piece, parts, call->o, scratch);
    ml_barrier(team);
}

typedef struct {
    const ml_call *call;
    float *parts;
} attention_call;

static void attention_program(ml_team team, void *argument) {
    attention_call *own = (attention_call *)argument;
    const ml_call *call = own->call;
    attention_deal deal = attention_begin(call->model, call->step, team.members);
    void *scratch = ml_own_scratch(team, attention_scratch(call->model));
    if (team.member == 0) own->parts = (float *)ml_scratch(team.pool, attention_part_bytes(call->model, &deal));
    ml_barrier(team);
    attention_phases(team, call, &deal, scratch, own->parts);
}

// Attention of a whole step after rope_rows: call->qkv to call->o.
static void attention_rows(ml_pool *pool, const ml_call *call) {
    attention_call own = {call, 0};
    ml_run(pool, attention_program, &own);
}

#define ML_ATTENTION_EXPORTS ML_EXPORT(attention_rows),
