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

// x [count] = inputs first .. first + count - 1 of a lane of a block, which share a scale, in the packed matrix's order.
ML_INLINE void group_of_row(const ml_matrix *m, const ml_part *p, const float *values, int32_t lane, int32_t first,
                            int32_t count, float *x) {
    const int32_t at = first / m->group * 32 + lane, half = lane / 16 * 4, byte = lane % 16 * 4;
    const float scale = float_of_f16(p->scales[at]) * m->gain, zero = p->zeros ? (float)p->zeros[at] : 0.0f;
    if (m->kind == ML_TABLE4) {
        float of_code[16];
        for (int code = 0; code < 16; code++) of_code[code] = scale * (values[code] - zero);
        const uint8_t *codes = p->codes + (int64_t)(first / 4) * 64 + byte;
        int32_t i = 0;
        for (; i + 4 <= count; i += 4, codes += 64)
            for (int k = 0; k < 4; k++) x[i + k] = of_code[codes[k] >> half & 15];
        for (int k = 0; i + k < count; k++) x[i + k] = of_code[codes[k] >> half & 15];
    } else if (m->kind == ML_INT8) {
        const int8_t *bytes = (const int8_t *)p->codes + (int64_t)(first / 4) * 128 + lane / 16 * 64 + byte;
        int32_t i = 0;
        for (; i + 4 <= count; i += 4, bytes += 128)
            for (int k = 0; k < 4; k++) x[i + k] = scale * ((float)bytes[k] - zero);
        for (int k = 0; i + k < count; k++) x[i + k] = scale * ((float)bytes[k] - zero);
    } else {
        for (int32_t i = 0; i < count; i++)
            x[i] = scale * (split_value(p, (int64_t)((first + i) / 4) * 64 + byte + i % 4, half, first + i) - zero);
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
    float group[64];
    for (int32_t first = 0; first < m->in; first += m->group) {
        const int32_t count = first + m->group < m->in ? m->group : m->in - first;
        group_of_row(m, &p, values, lane, first, count, m->order ? group : x + first);
        for (int32_t i = 0; m->order && i < count; i++) x[m->order[first + i]] = group[i];
    }
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
