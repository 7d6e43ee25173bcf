// A small product of floats whose sums are one chain each, and keys turned on their side for it.
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
    const uint16_t *base;
    const int64_t *place; // [count]: where rows begin; -1: there is none
    int32_t count, size;  // size: elements of a row
} row_queue;

ML_INLINE void ask_for(const row_queue *queue, int32_t number) {
    if (queue->place[number] < 0) return;
    for (int32_t i = 0; i < queue->size; i += 32) __builtin_prefetch(queue->base + queue->place[number] + i, 0, 2);
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

// Turn VW rows of bf16 on their side: out[d][0 .. VW) is element d of each row as f32, for `count` ≤ 2 VW elements.
#if defined(__AVX512F__)
static void turn(const uint16_t *const *row, int32_t count, float *out, int32_t stride) {
    __m512i x[16], y[16];
    __mmask32 kept = count >= 32 ? 0xffffffffu : (1u << count) - 1;
    for (int i = 0; i < 16; i++) x[i] = _mm512_maskz_loadu_epi16(kept, row[i]);
    for (int i = 0; i < 8; i++) {
        y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    // x[4g + c] now has, in its 128-bit lane l, pair 4l + c of rows 4g .. 4g + 3.
    for (int c = 0; c < 4; c++) {
        __m512i low = _mm512_shuffle_i32x4(x[c], x[4 + c], 0x88), high = _mm512_shuffle_i32x4(x[c], x[4 + c], 0xdd);
        __m512i low2 = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0x88);
        __m512i high2 = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0xdd);
        y[c] = _mm512_shuffle_i32x4(low, low2, 0x88);
        y[8 + c] = _mm512_shuffle_i32x4(low, low2, 0xdd);
        y[4 + c] = _mm512_shuffle_i32x4(high, high2, 0x88);
        y[12 + c] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
    for (int p = 0; p < 16 && 2 * p < count; p++) {
        _mm512_storeu_si512(out + 2 * p * stride, _mm512_slli_epi32(y[p], 16));
        if (2 * p + 1 < count)
            _mm512_storeu_si512(out + (2 * p + 1) * stride, _mm512_and_si512(y[p], _mm512_set1_epi32((int)0xffff0000)));
    }
}
#else
static void turn(const uint16_t *const *row, int32_t count, float *out, int32_t stride) {
    for (int32_t d = 0; d < count; d++)
        for (int i = 0; i < VW; i++) out[d * stride + i] = bf16_to_float(row[i][d]);
}
#endif
