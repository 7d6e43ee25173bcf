// One tile of keys of paged attention: read from the cache, scored, and added to the sums of the rows that see it.
#pragma once
#include "abi.h"
#include "norm.h"
#include "tile.h"

#define KEY_TILE 64
#define MOST_DIM 256

// Rows of one piece: r = query · group + head of the group.
typedef struct {
    const int32_t *table; // the sequence's: how it finds its slots in the cache
    int32_t sequence, kv_head, token, position, queries, group, rows, window;
} attention_task;

// Sums of a row over some keys: most is the largest score, sum is Σ e^(score − most) lane by lane, out is that of values.
typedef struct {
    float *out;  // [rows][dim]
    float *sum;  // [rows][VW]
    float *most; // [rows]
} attention_sums;

// Working memory of a member. dim is head_dim in whole vectors.
typedef struct {
    float *q;      // [rows][head_dim], scaled
    float *scores; // [rows][KEY_TILE]
    float *keys;   // [head_dim][KEY_TILE]
    float *values; // [KEY_TILE][dim]
    float *factor; // [rows, in whole vectors]: what sums so far are scaled by
    attention_sums segment, before;
} attention_space;

// The layer's cache.
typedef struct {
    const uint16_t *keys, *values; // [slots][kv_heads][head_dim]
    int32_t block_size, head_dim, dim, kv_heads;
} attention_cache;

// A tile of keys of a task, from position `first` on.
typedef struct {
    attention_task task;
    int32_t first; // negative: there is no such tile
} key_tile;

// Keys of a tile [first, first + KEY_TILE) that a row sees, as places in the tile; empty where low >= high.
typedef struct {
    int32_t low, high;
} key_range;

ML_INLINE int32_t padded(int32_t count, int32_t to) { return (count + to - 1) / to * to; }

// The range in whole vectors.
ML_INLINE key_range widen(key_range range) {
    key_range wide = {range.low / VW * VW, padded(range.high, VW)};
    return wide;
}

ML_INLINE key_range clip_range(int32_t low, int32_t high, int32_t first) {
    key_range range = {low - first < 0 ? 0 : low - first, high - first > KEY_TILE ? KEY_TILE : high - first};
    return range;
}

// Keys from .. to that any query from `query` on, `count` of them, sees.
ML_INLINE key_range seen_by(const attention_task *task, int32_t query, int32_t count, int32_t first) {
    int32_t low = task->window ? task->position + query - task->window + 1 : 0;
    return clip_range(low, task->position + query + count, first);
}

ML_INLINE key_range seen_by_row(const attention_task *task, int32_t row, int32_t first) {
    return seen_by(task, row / task->group, 1, first);
}

static const uint16_t NO_KEY[MOST_DIM + 32] = {0};

// Where the tile's keys lie, in elements of the cache; -1 for those that the piece doesn't see: they are not read.
static void places_of(const attention_cache *cache, const attention_task *task, int32_t first, key_range seen,
                      int64_t *place) {
    for (int32_t j = 0; j < KEY_TILE; j++) place[j] = -1;
    if (seen.low >= seen.high) return;
    const int32_t *block = task->table + (first + seen.low) / cache->block_size;
    int32_t inside = (first + seen.low) % cache->block_size;
    int64_t stride = (int64_t)cache->kv_heads * cache->head_dim, own = (int64_t)task->kv_head * cache->head_dim;
    for (int32_t j = seen.low; j < seen.high; block++, inside = 0) {
        int64_t start = (int64_t)*block * cache->block_size * stride + own;
        for (; inside < cache->block_size && j < seen.high; j++, inside++) place[j] = start + inside * stride;
    }
}

static void read_keys(const attention_cache *cache, const int64_t *place, key_range seen, float *out) {
    for (int32_t j = widen(seen).low; j < seen.high; j += VW)
        for (int32_t d = 0; d < cache->head_dim; d += 2 * VW) {
            const uint16_t *row[VW];
            for (int32_t i = 0; i < VW; i++) row[i] = (place[j + i] < 0 ? NO_KEY : cache->keys + place[j + i]) + d;
            int32_t count = cache->head_dim - d < 2 * VW ? cache->head_dim - d : 2 * VW;
            turn(row, count, out + d * KEY_TILE + j, KEY_TILE);
        }
}

// Read the values that are seen; whether they are all finite.
static int read_values(const attention_cache *cache, const int64_t *place, key_range seen, float *out) {
    vf check[4] = {vzero(), vzero(), vzero(), vzero()}; // 0 · x, added up, is NaN where an x isn't finite
    for (int32_t j = seen.low; j < seen.high; j++) {
        const uint16_t *value = cache->values + place[j];
        int32_t d = 0;
        for (; d + VW <= cache->head_dim; d += VW) {
            vf part = vbf16(value + d);
            check[d / VW % 4] = vfma(part, vzero(), check[d / VW % 4]);
            vstore(out + j * cache->dim + d, part);
        }
        if (d < cache->head_dim) {
            float lane[VW] = {0};
            for (int32_t i = d; i < cache->head_dim; i++) lane[i - d] = bf16_to_float(value[i]);
            check[0] = vfma(vload(lane), vzero(), check[0]);
            vstore(out + j * cache->dim + d, vload(lane));
        }
    }
    return vsum(vadd(vadd(check[0], check[1]), vadd(check[2], check[3]))) == 0.0f;
}

static const float LANE_NUMBER[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

ML_INLINE vm seen_lanes(key_range seen, int32_t j) {
    vf number = vadd(vload(LANE_NUMBER), vset((float)j));
    return vboth(vless(vset((float)seen.low - 0.5f), number), vless(number, vset((float)seen.high)));
}

// The largest of a row's scores that it sees.
static float most_of(const float *scores, key_range seen) {
    key_range wide = widen(seen);
    vf most = vset(-INFINITY);
    for (int32_t j = wide.low; j < wide.high; j += VW) {
        vf part = vload(scores + j);
        if (j < seen.low || j + VW > seen.high) part = vpick(seen_lanes(seen, j), part, vset(-INFINITY));
        most = vmax(most, part);
    }
    return vtop(most);
}

// Turn scores into weights e^(score − most), 0 for those not seen; returns them added up, lane by lane: a vector of zeros
// more or less doesn't show.
static vf weigh(float *scores, key_range seen, float most) {
    key_range wide = widen(seen);
    vf sum = vzero();
    for (int32_t j = wide.low; j < wide.high; j += VW) {
        vf part = vexp(vsub(vload(scores + j), vset(most)));
        if (j < seen.low || j + VW > seen.high) part = vpick(seen_lanes(seen, j), part, vzero());
        vstore(scores + j, part);
        sum = vadd(sum, part);
    }
    return sum;
}

// Scores to weights for all rows, and the factors by which the rows' sums so far shrink.
static void soften(const attention_task *task, int32_t first, key_range all, attention_space *space) {
    attention_sums *sums = &space->segment;
    for (int32_t r = 0; r < task->rows; r++) {
        key_range seen = seen_by_row(task, r, first);
        float most = sums->most[r], found = most;
        if (seen.low < seen.high) found = most_of(space->scores + r * KEY_TILE, seen);
        // A maximum that hasn't grown leaves e^0 = 1, exactly; before the first key there is nothing to scale.
        found = found < most ? most : found;
        space->factor[r] = most == found ? 0.0f : most - found;
        sums->most[r] = found;
    }
    for (int32_t r = 0; r < task->rows; r += VW) vstore(space->factor + r, vexp(vload(space->factor + r)));
    for (int32_t r = 0; r < task->rows; r++) {
        key_range seen = seen_by_row(task, r, first);
        float *scores = space->scores + r * KEY_TILE, *sum = sums->sum + r * VW;
        if (seen.low >= seen.high) seen.low = seen.high = all.high;
        // Rows that are multiplied with it may see more.
        if (seen.low > all.low) memset(scores + all.low, 0, (size_t)(seen.low - all.low) * sizeof(float));
        if (seen.high < all.high) memset(scores + seen.high, 0, (size_t)(all.high - seen.high) * sizeof(float));
        if (seen.low < seen.high)
            vstore(sum, vfma(vload(sum), vset(space->factor[r]), weigh(scores, seen, sums->most[r])));
    }
}

static void places_of_tile(const attention_cache *cache, const key_tile *tile, int64_t *place) {
    const key_range none = {0, 0};
    const attention_task *task = &tile->task;
    const key_range seen = tile->first < 0 ? none : seen_by(task, 0, task->queries, tile->first);
    places_of(cache, task, tile->first, seen, place);
}

// Ask for a whole tile of keys and values at once.
static void ask_for_tile(const attention_cache *cache, const key_tile *tile) {
    int64_t place[KEY_TILE];
    places_of_tile(cache, tile, place);
    row_queue keys = {cache->keys, place, KEY_TILE, cache->head_dim};
    row_queue values = {cache->values, place, KEY_TILE, cache->head_dim};
    for (int32_t j = 0; j < KEY_TILE; j++) {
        ask_for(&keys, j);
        ask_for(&values, j);
    }
}

// Tiles of nearly the same height: 7 rows are 4 and 3, not 6 and 1.
ML_INLINE int32_t tiles_of_rows(int32_t rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }

// Add one tile of keys, from position `first` on, to the rows' sums of the segment, and ask for the tile `after` it.
static void add_tile(const attention_cache *cache, const attention_task *task, int32_t first, const key_tile *after,
                     attention_space *space) {
    key_range seen = seen_by(task, 0, task->queries, first);
    int64_t place[KEY_TILE];
    places_of(cache, task, first, seen, place);
    read_keys(cache, place, seen, space->keys);
    int finite = read_values(cache, place, seen, space->values);
    int64_t next[KEY_TILE];
    places_of_tile(cache, after, next);
    row_queue keys = {cache->keys, next, KEY_TILE, cache->head_dim};
    row_queue values = {cache->values, next, KEY_TILE, cache->head_dim};
    key_range wide = widen(seen);
    for (int32_t t = 0, tiles = tiles_of_rows(task->rows); t < tiles; t++) {
        int32_t r = task->rows * t / tiles, rows = task->rows * (t + 1) / tiles - r;
        product_block(rows, wide.high - wide.low, cache->head_dim, space->q + r * cache->head_dim, cache->head_dim,
                      space->keys + wide.low, KEY_TILE, space->scores + r * KEY_TILE + wide.low, KEY_TILE, 0,
                      r ? 0 : &keys);
    }
    soften(task, first, wide, space);
    // Rows of one tile share the keys that any of them sees: weights of 0 add exact zeros, if the values are finite.
    for (int32_t t = 0, tiles = finite ? tiles_of_rows(task->rows) : task->rows; t < tiles; t++) {
        int32_t r = task->rows * t / tiles, rows = task->rows * (t + 1) / tiles - r, query = r / task->group;
        key_range own = seen_by(task, query, (r + rows - 1) / task->group - query + 1, first);
        if (own.low >= own.high) continue;
        product_block(rows, cache->dim, own.high - own.low, space->scores + r * KEY_TILE + own.low, KEY_TILE,
                      space->values + own.low * cache->dim, cache->dim, space->segment.out + r * cache->dim,
                      cache->dim, space->factor + r, r ? 0 : &values);
    }
}
