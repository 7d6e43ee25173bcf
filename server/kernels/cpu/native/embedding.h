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

ML_INLINE float float_of_f16(uint16_t bits) {
    const uint16_t lanes[VW] = {bits};
    float found[VW];
    vstore(found, vf16(lanes));
    return found[0];
}

// Inputs first .. last - 1 of a lane of a block, which share a scale.
ML_INLINE void group_of_row(const ml_matrix *m, const ml_part *p, const float *values, int32_t lane, int32_t first,
                            int32_t last, float *x) {
    const int32_t at = first / m->group * 32 + lane, half = lane / 16 * 4;
    const float scale = float_of_f16(p->scales[at]) * m->gain;
    const int32_t zero = p->zeros ? p->zeros[at] : 0;
    for (int32_t i = first; i < last; i++) {
        const int64_t word = i / 4;
        const int32_t byte = lane % 16 * 4 + i % 4;
        float value;
        if (m->kind == ML_TABLE4) value = values[p->codes[word * 64 + byte] >> half & 15];
        else if (m->kind == ML_SPLIT8) value = split_value(p, word * 64 + byte, half, i);
        else value = ((const int8_t *)p->codes)[word * 128 + lane / 16 * 64 + byte];
        x[m->order ? m->order[i] : i] = scale * (value - (float)zero);
    }
}

// x[i] = weight [output, i], dequantised: a row of an embedding.
static void embedding_row(const ml_matrix *m, int32_t output, float *x) {
    const int32_t block = output / 32, lane = output % 32;
    float bias[32], values[16];
    const ml_part p = part_of(m, block, bias);
    if (m->kind == ML_BF16) {
        const uint16_t *dense = (const uint16_t *)(const void *)p.codes;
        for (int32_t i = 0; i < m->in; i++) x[i] = bf16_to_float(dense[(int64_t)(i / 2) * 64 + lane * 2 + i % 2]);
        return;
    }
    for (int code = 0; code < 16 && m->kind == ML_TABLE4; code++) values[code] = value_of(m, code);
    for (int32_t first = 0; first < m->in; first += m->group)
        group_of_row(m, &p, values, lane, first, first + m->group < m->in ? first + m->group : m->in, x);
}

// x [count, in] = rows first .. first + count - 1 of the matrix, dequantised, by whoever calls: not by the pool, which may
// be at a step.
static void matrix_rows(ml_pool *, const ml_matrix *matrix, int64_t first, int64_t count, float *x) {
    for (int64_t row = 0; row < count; row++) embedding_row(matrix, (int32_t)(first + row), x + row * matrix->in);
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

#define ML_EMBEDDING_EXPORTS ML_EXPORT(embedding), ML_EXPORT(matrix_rows),
