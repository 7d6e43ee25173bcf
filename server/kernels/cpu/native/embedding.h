// Rows of matrices, as they are multiplied: what an embedding gives.
#pragma once
#include "linear.h"

// What a code of TABLE4 stands for.
ML_INLINE float value_of(const ml_matrix *m, int code) {
    return m->activations == ML_ACTIVATIONS_BF16 ? bf16_to_float(m->values[code]) : m->table[code];
}

// SPLIT8: the value of input i, at byte `at` of the block's halves, in the byte's bits from `half` on.
ML_INLINE float split_value(const ml_part *p, int64_t at, int half, int32_t i) {
    return (int8_t)((p->codes[at] >> half & 15) << 4 | (p->low[at] >> half & 15)) - ml_dither(i);
}

// x[i] = weight [output, i], dequantised: a row of an embedding.
static void embedding_row(const ml_matrix *m, int32_t output, float *x) {
    int32_t block = output / 32, lane = output % 32;
    float bias[32];
    ml_part p = part_of(m, block, bias);
    const uint16_t *dense = (const uint16_t *)(const void *)p.codes;
    for (int32_t i = 0; i < m->in; i++) {
        if (m->kind == ML_BF16) {
            x[i] = bf16_to_float(dense[(int64_t)(i / 2) * 64 + lane * 2 + i % 2]);
            continue;
        }
        int64_t word = i / 4;
        int32_t byte = lane % 16 * 4 + i % 4, at = i / m->group * 32 + lane;
        float value;
        const int half = lane / 16 * 4;
        if (m->kind == ML_TABLE4) value = value_of(m, p.codes[word * 64 + byte] >> half & 15);
        else if (m->kind == ML_SPLIT8) value = split_value(&p, word * 64 + byte, half, i);
        else value = ((const int8_t *)p.codes)[word * 128 + lane / 16 * 64 + byte];
        if (p.zeros) value -= p.zeros[at];
        float scales[VW];
        uint16_t bits[VW] = {p.scales[at]};
        vstore(scales, vf16(bits));
        x[m->order ? m->order[i] : i] = scales[0] * m->gain * value;
    }
}

typedef struct {
    const ml_matrix *matrix;
    const int32_t *ids;
    float *x;
    int64_t rows;
} ml_lookup;

static void lookup_program(ml_team team, void *argument) {
    ml_lookup *a = (ml_lookup *)argument;
    for (int64_t row; (row = ml_take(team)) < a->rows;)
        embedding_row(a->matrix, a->ids[row], a->x + row * a->matrix->in);
}

// x [rows, in] = rows ids[...] of the matrix, dequantised.
static void embedding(ml_pool *pool, const ml_matrix *matrix, const int32_t *ids, int64_t rows, float *x) {
    ml_lookup a = {matrix, ids, x, rows};
    ml_run(pool, lookup_program, &a);
}

#define ML_EMBEDDING_EXPORTS ML_EXPORT(embedding),
