// A small product of floats whose sums are one chain each.
#pragma once
#include "simd.h"

#define TILE_ROWS 6
#if defined(__AVX2__) && !defined(__AVX512F__)
#define TILE_VECTORS 2 // 12 sums of the 16 registers
#else
#define TILE_VECTORS 4
#endif

// Rows of the cache that will be wanted soon: asked for a few at a time, while something else is computed.
typedef struct {
    const uint8_t *base;
    const int64_t *place;  // [count]: where rows begin; -1: there is none
    const int64_t *beside; // [count] or null: where what belongs to a row begins
    int32_t count, size;   // size: bytes of a row
} row_queue;

ML_INLINE void ask_for(const row_queue *queue, int32_t number) {
    if (queue->place[number] < 0) return;
    for (int32_t i = 0; i < queue->size; i += 64) __builtin_prefetch(queue->base + queue->place[number] + i, 0, 2);
    if (queue->beside) __builtin_prefetch(queue->base + queue->beside[number], 0, 2);
}

// c[row] = factor[row] · c[row] + Σ_k a[row][k] b[k], over `vectors` vectors of columns; from 0 where factor is null.
// rows and vectors are constants where this is called.
ML_INLINE void product_tile(int rows, int vectors, int32_t depth, const float *a, int32_t a_stride, const float *b,
                            int32_t b_stride, float *c, int32_t c_stride, const float *factor,
                            const row_queue *queue) {
    vf sum[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sum[r][v] = factor ? vmul(vload(c + r * c_stride + v * VW), vset(factor[r])) : vzero();
    for (int32_t k = 0; k < depth; k++) {
        if (queue)
            for (int32_t number = k; number < queue->count; number += depth) ask_for(queue, number);
        vf part[TILE_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) part[v] = vload(b + (int64_t)k * b_stride + v * VW);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            vf value = vset(a[r * a_stride + k]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[r][v] = vfma(value, part[v], sum[r][v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) vstore(c + r * c_stride + v * VW, sum[r][v]);
}

#define PRODUCT_ROWS(rows, vectors)                                                                                    \
    product_tile(rows, vectors, depth, a, a_stride, b + column, b_stride, c + column, c_stride, factor, \
                 column ? 0 : queue)

ML_INLINE void product_columns(int rows, int32_t columns, int32_t depth, const float *a, int32_t a_stride,
                               const float *b, int32_t b_stride, float *c, int32_t c_stride, const float *factor,
                               const row_queue *queue) {
    int32_t column = 0;
    for (; column + TILE_VECTORS * VW <= columns; column += TILE_VECTORS * VW) PRODUCT_ROWS(rows, TILE_VECTORS);
    for (; column < columns; column += VW) PRODUCT_ROWS(rows, 1);
}

// As product_tile, for up to TILE_ROWS rows and any number of columns, a multiple of VW.
static void product_block(int32_t rows, int32_t columns, int32_t depth, const float *a, int32_t a_stride,
                          const float *b, int32_t b_stride, float *c, int32_t c_stride, const float *factor,
                          const row_queue *queue) {
#define PRODUCT_CASE(rows)                                                                                             \
    case rows: product_columns(rows, columns, depth, a, a_stride, b, b_stride, c, c_stride, factor, queue); break;
    switch (rows) {
        PRODUCT_CASE(1)
        PRODUCT_CASE(2)
        PRODUCT_CASE(3)
        PRODUCT_CASE(4)
        PRODUCT_CASE(5)
        PRODUCT_CASE(6)
    }
}
