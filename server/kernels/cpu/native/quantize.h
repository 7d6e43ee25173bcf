// Rows of activations as a matrix of 4 or 8 bits wants them: unsigned bytes with a scale and a zero point per group.
//
// low = min(x, 0), high = max(x, 0), scale = (high - low) / 255, zero = round(-low / scale),
// u = clamp(round(x / scale) + zero, 0, 255). Padding is u = zero. A group that holds a NaN or an infinity, or
// whose range is one, gets the scale NaN, and with it every output of its row. A scale below float32's normal range is 0,
// and so is its group.
//
// A matrix whose activations are bfloat16 gets those instead, rounded to nearest, in the order in which pairs.h takes
// the inputs of a word; padding is 0.
#pragma once
#include <float.h>
#include <math.h>
#include <stddef.h>

#include "abi.h"
#include "dot.h"
#include "pairs.h"

typedef struct {
    uint8_t *u;     // [rows][stride]: xor ML_FLIP
    float *scale;   // [rows][groups]
    int32_t *fold;  // [rows][groups]: the zero point and the sum of u, as start() takes them
    int32_t stride; // padded inputs of a row
    int32_t groups, group;
    ml_activation *wide; // [rows][stride]: instead of u, where activations are bfloat16,
    float *sum;          // [rows][groups]: and what those of a group add up to
} ml_quantized;

static inline size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Bytes that place_quantized() takes for `rows` rows as `m` wants them.
static inline size_t quantized_bytes(const ml_matrix *m, int64_t rows) {
    size_t inputs = (size_t)rows * m->padded_in;
    if (m->kind == ML_BF16) return 0; // takes float32 as it is
    if (m->activations == ML_ACTIVATIONS_BF16)
        return whole_lines(inputs * sizeof(ml_activation)) + whole_lines(inputs / m->group * sizeof(float));
    return whole_lines(inputs) + 2 * whole_lines(inputs / m->group * sizeof(float));
}

// Lay `rows` rows out in `memory`, which is 64-byte aligned.
static inline void place_quantized(ml_quantized *q, const ml_matrix *m, int64_t rows, void *memory) {
    memset(q, 0, sizeof *q);
    q->stride = m->padded_in;
    if (m->kind == ML_BF16) return;
    q->group = m->group;
    q->groups = m->padded_in / m->group;
    if (m->activations == ML_ACTIVATIONS_BF16) {
        q->wide = (ml_activation *)memory;
        q->sum = (float *)(void *)((char *)memory + whole_lines((size_t)rows * q->stride * sizeof(ml_activation)));
        return;
    }
    q->u = (uint8_t *)memory;
    q->scale = (float *)(void *)(q->u + whole_lines((size_t)rows * q->stride));
    q->fold = (int32_t *)(void *)((char *)q->scale + whole_lines((size_t)rows * q->groups * sizeof(float)));
}

// Whether rows quantised for one of two matrices serve the other too.
static inline int same_input(const ml_matrix *a, const ml_matrix *b) {
    int kinds = (a->kind == ML_BF16) == (b->kind == ML_BF16) && a->activations == b->activations;
    return kinds && a->in == b->in && a->padded_in == b->padded_in && a->group == b->group && a->order == b->order;
}

ML_INLINE void quantize_group(const float *x, int32_t group, uint8_t *u, float *scale, int32_t *fold) {
    vf low = vzero(), high = vzero(), strange = vzero();
    for (int i = 0; i < group; i += VW) {
        vf v = vload(x + i);
        low = vmin(v, low);
        high = vmax(v, high);
        strange = vadd(strange, vsub(v, v)); // 0, or NaN
    }
    float least = vleast(low), most = vtop(high), nothing = vsum(strange);
    float step = (most - least) / 255.0f;
    int finite = nothing == 0 && step <= FLT_MAX; // NaN is no more than anything
    if (!finite || step < FLT_MIN) {
        *scale = finite ? 0.0f : NAN;
        *fold = fold_row(0, 0, group);
        memset(u, ML_FLIP, (size_t)group);
        return;
    }
    vf divisor = vset(step), zero = vround(vdiv(vset(-least), divisor)), sum = vzero();
    for (int i = 0; i < group; i += VW) {
        vf whole = vadd(vround(vdiv(vload(x + i), divisor)), zero);
        whole = vmin(vmax(whole, vzero()), vset(255.0f));
        sum = vadd(sum, whole);
        store_u8(u + i, whole);
    }
    if (ML_FLIP)
        for (int i = 0; i < group; i++) u[i] ^= ML_FLIP;
    *scale = step;
    *fold = fold_row((int32_t)vtop(zero), (int32_t)vsum(sum), group); // sums of whole numbers are exact
}

// A group as bfloat16, and its sum, in four chains.
ML_INLINE void widen_group(const float *x, int32_t group, ml_activation *wide, float *sum) {
    float chain[4] = {0, 0, 0, 0};
    for (int32_t i = 0; i < group; i += 4)
        for (int k = 0; k < 4; k++) {
            uint16_t bits = float_to_bf16(x[i + ml_pair_order[k]]);
            wide[i + k] = activation_of(bits);
            chain[k] += bf16_to_float(bits);
        }
    *sum = (chain[0] + chain[1]) + (chain[2] + chain[3]);
}

// Make row `row` of `q` of x [in].
static void quantize_row(const float *x, const ml_matrix *m, ml_quantized *q, int64_t row) {
    if (m->kind == ML_BF16) return;
    for (int32_t g = 0; g < q->groups; g++) {
        int32_t first = g * q->group;
        float gathered[64];
        const float *from = x + first;
        if (m->order || first + q->group > m->in) {
            for (int32_t i = 0; i < q->group; i++) {
                int32_t input = m->order ? m->order[first + i] : first + i;
                gathered[i] = input >= 0 && input < m->in ? x[input] : 0.0f;
            }
            from = gathered;
        }
        int64_t input = row * q->stride + first, group = row * q->groups + g;
        if (q->wide) widen_group(from, q->group, q->wide + input, q->sum + group);
        else quantize_group(from, q->group, q->u + input, q->scale + group, q->fold + group);
    }
}
