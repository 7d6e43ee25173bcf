// What attention reads of the cache: which keys of a tile a piece sees, where they lie, and what they are as floats.
#pragma once
#include "abi.h"
#include "kv_cache.h"
#include "tile.h"
#include "turn.h"

#define KEY_TILE 64
#define MOST_DIM 256

// Rows of one piece: r = query · group + head of the group.
typedef struct {
    const int32_t *table; // the sequence's: how it finds its slots in the cache
    int32_t sequence, kv_head, token, position, queries, group, rows, window;
} attention_task;

// The layer's cache. dim is head_dim in whole vectors.
typedef struct {
    kv_half half;
    const uint8_t *keys, *values;
    int32_t dim;
} attention_cache;

// Where the rows of a tile's values begin in their half of the cache, in bytes, and the scales of their first groups; -1 for
// those that the piece doesn't see: they are not read. Keys in bf16 lie alike.
typedef struct {
    int64_t row[KEY_TILE], scales[KEY_TILE];
} key_places;

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

static const float LANE_NUMBER[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

ML_INLINE vm seen_lanes(key_range seen, int32_t j) {
    vf number = vadd(vload(LANE_NUMBER), vset((float)j));
    return vboth(vless(vset((float)seen.low - 0.5f), number), vless(number, vset((float)seen.high)));
}

static const uint8_t NO_KEY[2 * MOST_DIM + 64] = {0};

static void places_of(const attention_cache *cache, const attention_task *task, int32_t first, key_range seen,
                      key_places *places) {
    const kv_half *half = &cache->half;
    for (int32_t j = 0; j < KEY_TILE; j++) places->row[j] = -1;
    if (seen.low >= seen.high) return;
    const int32_t *block = task->table + (first + seen.low) / half->block_size;
    int32_t inside = (first + seen.low) % half->block_size;
    const int64_t step = row_step(half), own = first_row(half, task->kv_head), scales = first_scale(half, task->kv_head);
    for (int32_t j = seen.low; j < seen.high; block++, inside = 0) {
        const int64_t start = *block * half->stride;
        for (; inside < half->block_size && j < seen.high; j++, inside++) {
            places->row[j] = start + own + inside * step;
            places->scales[j] = start + scales + inside * 2;
        }
    }
}

static void places_of_tile(const attention_cache *cache, const key_tile *tile, key_places *places) {
    const key_range none = {0, 0};
    const attention_task *task = &tile->task;
    const key_range seen = tile->first < 0 ? none : seen_by(task, 0, task->queries, tile->first);
    places_of(cache, task, tile->first, seen, places);
}

ML_INLINE row_queue queue_of(const attention_cache *cache, const uint8_t *base, const key_places *places) {
    row_queue queue = {base, places->row, cache->half.groups ? places->scales : 0, KEY_TILE, cache->half.row};
    return queue;
}

// Ask for a whole tile of keys and values at once.
static void ask_for_tile(const attention_cache *cache, const key_tile *tile) {
    key_places places;
    places_of_tile(cache, tile, &places);
    row_queue keys = queue_of(cache, cache->keys, &places), values = queue_of(cache, cache->values, &places);
    for (int32_t j = 0; j < KEY_TILE; j++) {
        ask_for(&keys, j);
        ask_for(&values, j);
    }
}

// Keys are read turned on their side, out [head_dim][KEY_TILE], in whole vectors.
static void read_keys_bf16(const attention_cache *cache, const key_places *places, key_range seen, float *out) {
    for (int32_t j = widen(seen).low; j < seen.high; j += VW)
        for (int32_t d = 0; d < cache->half.head_dim; d += 2 * VW) {
            const uint8_t *row[VW];
            for (int32_t i = 0; i < VW; i++) {
                const int64_t place = places->row[j + i];
                row[i] = (place < 0 ? NO_KEY : cache->keys + place) + 2 * d;
            }
            int32_t count = cache->half.head_dim - d < 2 * VW ? cache->half.head_dim - d : 2 * VW;
            turn_bf16(row, count, out + d * KEY_TILE + j, KEY_TILE);
        }
}

// VW keys of one block; those that aren't seen are 0.
static void read_key_vector(const kv_half *half, const int8_t *codes, const uint16_t *scales, vm seen, float *out) {
    for (int32_t d = 0; d < half->head_dim; scales += half->block_size) {
        const int32_t end = d + ML_KV_GROUP < half->head_dim ? d + ML_KV_GROUP : half->head_dim;
        const vf step = vpick(seen, vbf16(scales), vzero());
#pragma GCC unroll 8
        for (; d < end; d++, codes += half->block_size) vstore(out + d * KEY_TILE, vmul(vint8(codes), step));
    }
}

static void read_keys_int8(const attention_cache *cache, const attention_task *task, int32_t first, key_range seen,
                           float *out) {
    const kv_half *half = &cache->half;
    const int32_t size = half->block_size, in_vectors = size % VW == 0;
    const key_range wide = widen(seen);
    for (int32_t j = wide.low; j < wide.high; j += in_vectors ? VW : 1) {
        const int there = in_vectors || (j >= seen.low && j < seen.high);
        const int32_t inside = (first + j) % size;
        const uint8_t *block = cache->keys + (there ? task->table[(first + j) / size] * half->stride : 0);
        const int8_t *codes = (const int8_t *)block + first_row(half, task->kv_head) + inside;
        const uint16_t *scales = (const uint16_t *)(const void *)(block + first_scale(half, task->kv_head)) + inside;
        if (in_vectors) {
            read_key_vector(half, codes, scales, seen_lanes(seen, j), out + j);
            continue;
        }
        for (int32_t d = 0; d < half->head_dim; d++)
            out[d * KEY_TILE + j] =
                there ? codes[d * size] * bf16_to_float(scales[d / ML_KV_GROUP * size]) : 0.0f;
    }
}

static int read_values_bf16(const attention_cache *cache, const key_places *places, key_range seen, float *out) {
    const int32_t head_dim = cache->half.head_dim;
    vf check[4] = {vzero(), vzero(), vzero(), vzero()}; // 0 · x, added up, is NaN where an x isn't finite
    for (int32_t j = seen.low; j < seen.high; j++) {
        const uint16_t *value = (const uint16_t *)(const void *)(cache->values + places->row[j]);
        int32_t d = 0;
        for (; d + VW <= head_dim; d += VW) {
            vf part = vbf16(value + d);
            check[d / VW % 4] = vfma(part, vzero(), check[d / VW % 4]);
            vstore(out + j * cache->dim + d, part);
        }
        if (d < head_dim) {
            float lane[VW] = {0};
            for (int32_t i = d; i < head_dim; i++) lane[i - d] = bf16_to_float(value[i]);
            check[0] = vfma(vload(lane), vzero(), check[0]);
            vstore(out + j * cache->dim + d, vload(lane));
        }
    }
    return vsum(vadd(vadd(check[0], check[1]), vadd(check[2], check[3]))) == 0.0f;
}

static int read_values_int8(const attention_cache *cache, const key_places *places, key_range seen, float *out) {
    const int32_t head_dim = cache->half.head_dim;
    int strange = 0;
    for (int32_t j = seen.low; j < seen.high; j++) {
        const int8_t *codes = (const int8_t *)(cache->values + places->row[j]);
        const uint16_t *scales = (const uint16_t *)(const void *)(cache->values + places->scales[j]);
        float *to = out + j * cache->dim;
        for (int32_t d = 0; d < head_dim; d += ML_KV_GROUP, scales += cache->half.block_size) {
            const vf step = vset(bf16_to_float(*scales));
            strange |= (*scales & 0x7f80) == 0x7f80;
            if (d + ML_KV_GROUP <= head_dim) {
#pragma GCC unroll 8
                for (int32_t i = 0; i < ML_KV_GROUP; i += VW) vstore(to + d + i, vmul(vint8(codes + d + i), step));
                continue;
            }
            int8_t rest[ML_KV_GROUP] = {0};
            memcpy(rest, codes + d, (size_t)(head_dim - d));
            for (int32_t i = 0; d + i < head_dim; i += VW) vstore(to + d + i, vmul(vint8(rest + i), step));
        }
    }
    return !strange;
}

// Read the values that are seen, out [KEY_TILE][dim]; whether they are all finite.
static int read_values(const attention_cache *cache, const key_places *places, key_range seen, float *out) {
    return cache->half.groups ? read_values_int8(cache, places, seen, out) : read_values_bf16(cache, places, seen, out);
}
