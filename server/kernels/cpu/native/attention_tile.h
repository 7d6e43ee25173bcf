// One tile of keys of paged attention: scored, and added to the sums of the rows that see it.
#pragma once
#include "abi.h"
#include "attention_read.h"
#include "norm.h"
#include "tile.h"

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

// Tiles of nearly the same height: 7 rows are 4 and 3, not 6 and 1.
ML_INLINE int32_t tiles_of_rows(int32_t rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }

// Add one tile of keys, from position `first` on, to the rows' sums of the segment, and ask for the tile `after` it.
static void add_tile(const attention_cache *cache, const attention_task *task, int32_t first, const key_tile *after,
                     attention_space *space) {
    key_range seen = seen_by(task, 0, task->queries, first);
    const int32_t head_dim = cache->half.head_dim;
    key_places places, next;
    places_of(cache, task, first, seen, &places);
    if (cache->half.groups) read_keys_int8(cache, task, first, seen, space->keys);
    else read_keys_bf16(cache, &places, seen, space->keys);
    int finite = read_values(cache, &places, seen, space->values);
    places_of_tile(cache, after, &next);
    row_queue keys = queue_of(cache, cache->keys, &next), values = queue_of(cache, cache->values, &next);
    key_range wide = widen(seen);
    for (int32_t t = 0, tiles = tiles_of_rows(task->rows); t < tiles; t++) {
        int32_t r = task->rows * t / tiles, rows = task->rows * (t + 1) / tiles - r;
        product_block(rows, wide.high - wide.low, head_dim, space->q + r * head_dim, head_dim,
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
