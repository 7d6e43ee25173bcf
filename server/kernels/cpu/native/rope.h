// What lies between the q, k, v projection and attention: q/k norm, rotation by position, and the write to the cache.
#pragma once
#include "abi.h"
#include "kv_cache.h"
#include "norm.h"

// Rotate the pairs (i, i + half) of one head in place by the angles of its position (half-split layout).
static void rotate_head(float *head, const float *cos, const float *sin, int32_t half) {
    int32_t i = 0;
    for (; i + VW <= half; i += VW) {
        vf first = vload(head + i), second = vload(head + half + i), c = vload(cos + i), s = vload(sin + i);
        vstore(head + i, vfma(vsub(vzero(), second), s, vmul(first, c)));
        vstore(head + half + i, vfma(first, s, vmul(second, c)));
    }
    for (; i < half; i++) {
        float first = head[i], second = head[half + i];
        head[i] = fmaf(-second, sin[i], first * cos[i]);
        head[half + i] = fmaf(first, sin[i], second * cos[i]);
    }
}

// One token: qkv is its q heads, then k, then v. q and k are normalised if the layer has the weights, and rotated, in
// place; k and v go to the token's slot. finite[token] becomes 0 if one of these is not finite there.
static void rope_row(const ml_model *model, int32_t layer, const ml_kv *kv, const ml_step *step, int32_t token,
                     float *qkv) {
    const ml_layer *own = &model->layer[layer];
    int32_t dim = model->head_dim, heads = model->heads, kv_heads = model->kv_heads;
    const float *cos = model->cos + (int64_t)step->positions[token] * dim;
    const float *sin = model->sin + (int64_t)step->positions[token] * dim;
    for (int32_t h = 0; h < heads + kv_heads; h++) {
        const float *norm = h < heads ? own->q_norm : own->k_norm;
        if (norm) rms_norm_row(qkv + h * dim, norm, model->eps, dim, qkv + h * dim);
        rotate_head(qkv + h * dim, cos, sin, dim / 2);
    }
    const kv_half half = half_of(model, kv);
    int finite = write_heads(&half, qkv + heads * dim, step->slots[token], 1, layer_keys(&half, kv, layer));
    qkv += (heads + kv_heads) * dim;
    finite &= write_heads(&half, qkv, step->slots[token], 0, layer_values(&half, kv, layer));
    if (!finite) step->finite[token] = 0;
}

static void rope_program(ml_team team, void *argument) {
    const ml_call *call = (const ml_call *)argument;
    int64_t width = (call->model->heads + 2 * call->model->kv_heads) * (int64_t)call->model->head_dim;
    for (int64_t token; (token = ml_take(team)) < call->step->tokens;)
        rope_row(call->model, call->layer, call->kv, call->step, (int32_t)token, call->qkv + token * width);
}

// rope_row for all of the step's tokens: call->qkv.
static void rope_rows(ml_pool *pool, ml_call *call) { ml_run(pool, rope_program, call); }

#define ML_ROPE_EXPORTS ML_EXPORT(rope_rows),
