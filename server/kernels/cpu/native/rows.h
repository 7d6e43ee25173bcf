// Rows of bf16 as they lie in a file, multiplied without being packed: the heads that adapters bring.
#pragma once
#include "simd.h"
#include "team.h"

#define ML_ROWS_DEALT 32 // rows of a piece
#define ML_ROWS_TOKENS 4 // tokens that a row is read for at once

typedef struct {
    const uint16_t *rows; // bf16 [count, in]
    const float *x;       // [tokens, in]
    float *y;             // [tokens, count]
    int64_t count, in, tokens;
} ml_rows;

// y[t * count] = x[t] · row for T tokens: each token's sum in one order, whoever else is there.
template <int T> static void dot_row(const ml_rows *a, const uint16_t *row, const float *x, float *y) {
    vf sum[T];
    for (int t = 0; t < T; t++) sum[t] = vzero();
    int64_t i = 0;
    for (; i + VW <= a->in; i += VW) {
        const vf w = vbf16(row + i);
        for (int t = 0; t < T; t++) sum[t] = vfma(w, vload(x + t * a->in + i), sum[t]);
    }
    for (int t = 0; t < T; t++) {
        float rest = vsum(sum[t]);
        for (int64_t k = i; k < a->in; k++) rest += bf16_to_float(row[k]) * x[t * a->in + k];
        y[t * a->count] = rest;
    }
}

static void rows_program(ml_team team, void *argument) {
    const ml_rows *a = (const ml_rows *)argument;
    const int64_t pieces = (a->count + ML_ROWS_DEALT - 1) / ML_ROWS_DEALT;
    for (int64_t piece; (piece = ml_take_near(team, pieces)) >= 0;) {
        const int64_t first = piece * ML_ROWS_DEALT;
        const int64_t last = first + ML_ROWS_DEALT < a->count ? first + ML_ROWS_DEALT : a->count;
        for (int64_t j = first; j < last; j++) {
            const uint16_t *row = a->rows + j * a->in;
            int64_t t = 0;
            for (; t + ML_ROWS_TOKENS <= a->tokens; t += ML_ROWS_TOKENS)
                dot_row<ML_ROWS_TOKENS>(a, row, a->x + t * a->in, a->y + t * a->count + j);
            for (; t < a->tokens; t++) dot_row<1>(a, row, a->x + t * a->in, a->y + t * a->count + j);
        }
    }
}

// y [tokens, count] = x [tokens, in] times rows [count, in], transposed.
static void multiply_rows(ml_pool *pool, const uint16_t *rows, int64_t count, int64_t in, const float *x,
                          int64_t tokens, float *y) {
    ml_rows a = {rows, x, y, count, in, tokens};
    ml_run(pool, rows_program, &a);
}

#define ML_ROWS_EXPORTS ML_EXPORT(multiply_rows),
