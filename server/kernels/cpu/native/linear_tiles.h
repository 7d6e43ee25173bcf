// Integer products of many rows by AMX's tiles, with the bits that tile_columns() of linear.h has: a group's sum is the
// same whole number whoever adds it up, and the floats over groups follow in the same order.
//
// A word of packed bytes, 4 inputs of 16 outputs, is a row of a tile of weights as TDPBUSD wants it, and a group of 64
// inputs is a whole tile. So a group of 16 rows and 32 outputs is two instructions; what takes the time is what follows
// for each group.
#pragma once
#include "linear.h"
#include "tiles.h"

// The tiles' numbers, literal for the compilers' macros.
#define ML_SUMS_LOW 0
#define ML_SUMS_HIGH 1
#define ML_INPUTS 2
#define ML_WEIGHTS_LOW 3
#define ML_WEIGHTS_HIGH 4

typedef int32_t ml_tile_sums[2][ML_BY_TILES][16]; // of outputs 0 .. 15 and 16 .. 31

// Shape the tiles of this thread for so many rows and groups of so many words.
static void shape_tiles(int rows, int32_t words) {
    alignas(64) ml_tile_shapes shapes;
    memset(&shapes, 0, sizeof shapes);
    shapes.palette = 1;
    for (int tile = ML_SUMS_LOW; tile <= ML_INPUTS; tile++) shapes.rows[tile] = (uint8_t)rows;
    for (int tile = ML_SUMS_LOW; tile <= ML_WEIGHTS_HIGH; tile++) shapes.bytes[tile] = 64;
    shapes.bytes[ML_INPUTS] = (uint16_t)(words * 4);
    shapes.rows[ML_WEIGHTS_LOW] = shapes.rows[ML_WEIGHTS_HIGH] = (uint8_t)words;
    tiles_see_memory(&shapes);
    tiles_shape(&shapes);
}

ML_INLINE void tile_group(const ml_part *p, const ml_quantized *q, int64_t row, int32_t g, ml_tile_sums sums) {
    const uint8_t *u = q->u + row * q->stride + (int64_t)g * p->words * 4;
    const int8_t *codes = (const int8_t *)p->codes + (int64_t)g * p->words * 128;
    tiles_see_memory(u);
    tile_zero(ML_SUMS_LOW);
    tile_zero(ML_SUMS_HIGH);
    tile_load(ML_INPUTS, u, q->stride);
    tile_load(ML_WEIGHTS_LOW, codes, 128);
    tile_load(ML_WEIGHTS_HIGH, codes + 64, 128);
    tile_dot(ML_SUMS_LOW, ML_INPUTS, ML_WEIGHTS_LOW);
    tile_dot(ML_SUMS_HIGH, ML_INPUTS, ML_WEIGHTS_HIGH);
    tile_store(ML_SUMS_LOW, sums[0], 64);
    tile_store(ML_SUMS_HIGH, sums[1], 64);
    tiles_see_memory(sums);
}

// Add group g's sums to the totals of `count` rows.
template <int ZEROS>
ML_INLINE void add_group(const ml_part *p, const ml_quantized *q, int64_t row, int count, int32_t g, const ml_tile_sums sums,
                         float total[][32]) {
    for (int half = 0; half < 2; half++) {
        const int64_t at = g * 32 + half * 16;
        const vi pairs = ZEROS ? load_pairs(p->sums + at, p->zeros + at) : load_sums(p->sums + at);
        const vf weight = vf16(p->scales + at);
        for (int r = 0; r < count; r++) {
            const int64_t group = (row + r) * q->groups + g;
            vi dots;
            memcpy(&dots, sums[half][r], sizeof dots);
            dots = vi_add(start(pairs, q->fold[group]), dots);
            vf before = vload(total[r] + half * 16);
            vstore(total[r] + half * 16, vfma(vi_float(dots), vmul(weight, vset(q->scale[group])), before));
        }
    }
}

template <int ZEROS>
static void tiled_rows(const ml_part *p, const ml_quantized *q, int64_t row, int count, float *y, int64_t stride) {
    alignas(64) ml_tile_sums sums;
    alignas(64) float total[ML_BY_TILES][32];
    memset(total, 0, sizeof total);
    for (int32_t g = 0; g < p->groups; g++) {
        if (p->more) ask_for_more(p->more);
        tile_group(p, q, row, g, sums);
        add_group<ZEROS>(p, q, row, count, g, sums, total);
    }
    for (int r = 0; r < count; r++)
        for (int at = 0; at < 32; at += VW)
            vstore(y + r * stride + at, vfma(vload(total[r] + at), vset(p->gain), vload(p->bias + at)));
}

// See linear_block(), for a part of bytes.
static void tiled_block(const ml_part *p, const ml_quantized *q, int64_t rows, int32_t left, float *y, int64_t stride) {
    int64_t tiles = (rows + ML_BY_TILES - 1) / ML_BY_TILES;
    for (int64_t t = 0, shaped = 0; t < tiles; t++) {
        int64_t row = rows * t / tiles;
        int count = (int)(rows * (t + 1) / tiles - row);
        float edge[ML_BY_TILES * 32], *to = left < 32 ? edge : y + row * stride;
        int64_t apart = left < 32 ? 32 : stride;
        if (shaped != count) shape_tiles(count, p->words);
        shaped = count;
        if (p->zeros) tiled_rows<1>(p, q, row, count, to, apart);
        else tiled_rows<0>(p, q, row, count, to, apart);
        if (left < 32)
            for (int r = 0; r < count; r++) memcpy(y + (row + r) * stride, edge + r * 32, (size_t)left * sizeof(float));
    }
    tiles_release(); // so that the system need not keep them
}
