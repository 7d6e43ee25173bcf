// RMSNorm and the gated activation, row by row. What is not finite comes out as what is not finite, never as a number
// that passes for an answer.
#pragma once
#include <math.h>

#include "simd.h"
#include "team.h"

// The first `n` < VW floats at p, and zeros.
ML_INLINE vf vload_part(const float *p, int32_t n) {
    float lane[VW] = {0};
    memcpy(lane, p, (size_t)n * sizeof(float));
    return vload(lane);
}

ML_INLINE void vstore_part(float *p, vf x, int32_t n) {
    float lane[VW];
    vstore(lane, x);
    memcpy(p, lane, (size_t)n * sizeof(float));
}

// Σ x²: four running sums that take turns, a fixed function of n alone.
static float sum_of_squares(const float *x, int32_t n) {
    vf sum[4] = {vzero(), vzero(), vzero(), vzero()};
    int32_t i = 0;
    for (; i + 4 * VW <= n; i += 4 * VW)
        for (int turn = 0; turn < 4; turn++) {
            vf part = vload(x + i + turn * VW);
            sum[turn] = vfma(part, part, sum[turn]);
        }
    for (; i + VW <= n; i += VW) {
        vf part = vload(x + i);
        sum[0] = vfma(part, part, sum[0]);
    }
    if (i < n) {
        vf part = vload_part(x + i, n - i);
        sum[1] = vfma(part, part, sum[1]);
    }
    return vsum(vadd(vadd(sum[0], sum[1]), vadd(sum[2], sum[3])));
}

// y = weight · x / √(mean(x²) + eps), all NaN where Σ x² is not finite: a reciprocal of infinity would give zeros. y may
// be x.
static void rms_norm_row(const float *x, const float *weight, float eps, int32_t n, float *y) {
    float sum = sum_of_squares(x, n);
    vf scale = vset(isfinite(sum) ? 1.0f / sqrtf(sum / (float)n + eps) : NAN);
    int32_t i = 0;
    for (; i + VW <= n; i += VW) vstore(y + i, vmul(vmul(vload(x + i), scale), vload(weight + i)));
    if (i < n) {
        vf part = vmul(vmul(vload_part(x + i, n - i), scale), vload_part(weight + i, n - i));
        vstore_part(y + i, part, n - i);
    }
}

// x · sigmoid(x). From e^-|x|, which can't overflow; it is a true 0 where x is infinite, so that -inf gives NaN.
ML_INLINE vf vsilu(vf x) {
    vf low = vsub(vzero(), vmax(x, vsub(vzero(), x)));
    vf power = vpick(vless(low, vset(-87.3f)), vzero(), vexp(low));
    vf above = vpick(vless(x, vzero()), power, vset(1.0f));
    return vmul(x, vdiv(above, vadd(power, vset(1.0f))));
}

// out = silu(gate) · up. out may be either.
static void silu_mul(const float *gate, const float *up, int32_t n, float *out) {
    int32_t i = 0;
    for (; i + VW <= n; i += VW) vstore(out + i, vmul(vsilu(vload(gate + i)), vload(up + i)));
    if (i < n) {
        vf part = vmul(vsilu(vload_part(gate + i, n - i)), vload_part(up + i, n - i));
        vstore_part(out + i, part, n - i);
    }
}

typedef struct {
    const float *x, *other;
    float eps;
    int64_t rows;
    int32_t n;
    float *y;
} rows_call;

static void rms_norm_program(ml_team team, void *argument) {
    const rows_call *call = (const rows_call *)argument;
    for (int64_t row; (row = ml_take(team)) < call->rows;)
        rms_norm_row(call->x + row * call->n, call->other, call->eps, call->n, call->y + row * call->n);
}

static void silu_mul_program(ml_team team, void *argument) {
    const rows_call *call = (const rows_call *)argument;
    for (int64_t row; (row = ml_take(team)) < call->rows;)
        silu_mul(call->x + row * call->n, call->other + row * call->n, call->n, call->y + row * call->n);
}

// y [rows, n] = rms_norm(x [rows, n], weight [n]).
static void rms_norm_rows(ml_pool *pool, const float *x, const float *weight, float eps, int64_t rows, int32_t n,
                          float *y) {
    rows_call call = {x, weight, eps, rows, n, y};
    ml_run(pool, rms_norm_program, &call);
}

// y [rows, n] = silu(gate [rows, n]) · up [rows, n].
static void silu_mul_rows(ml_pool *pool, const float *gate, const float *up, int64_t rows, int32_t n, float *y) {
    rows_call call = {gate, up, 0, rows, n, y};
    ml_run(pool, silu_mul_program, &call);
}

#define ML_NORM_EXPORTS ML_EXPORT(rms_norm_rows), ML_EXPORT(silu_mul_rows),
