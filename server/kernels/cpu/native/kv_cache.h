// How keys and values lie in the cache, and how a token's are written to it. A layer has its keys, then its values, each in
// blocks. In bf16 a block is [slot][kv_head][head_dim]. In int8 it is codes, then bf16 scales [kv_head][group][slot], up to
// whole lines; codes of values are [kv_head][slot][head_dim], of keys [kv_head][head_dim][slot]: as attention reads them.
// Scales lie in the pages of their block, so that a short context takes no others.
#pragma once
#include <float.h>
#include <math.h>

#include "abi.h"
#include "simd.h"

#define KV_LINE 64

// Sizes of a layer's half of the cache.
typedef struct {
    int64_t block_bytes;
    int64_t stride;      // from a block to the next: all layers' halves
    int64_t scales;      // where a block's scales begin; int8 alone
    int32_t form, block_size, kv_heads, head_dim;
    int32_t row;         // bytes of a head at a slot
    int32_t groups;      // scales of it
} kv_half;

static kv_half half_of(const ml_model *model, const ml_kv *kv) {
    kv_half half = {};
    half.form = kv->form;
    half.block_size = kv->block_size;
    half.kv_heads = model->kv_heads;
    half.head_dim = model->head_dim;
    half.row = model->head_dim * (kv->form == ML_KV_INT8 ? 1 : 2);
    half.groups = kv->form == ML_KV_INT8 ? (model->head_dim + ML_KV_GROUP - 1) / ML_KV_GROUP : 0;
    const int64_t rows = (int64_t)half.block_size * half.kv_heads;
    half.scales = rows * half.row;
    half.block_bytes = half.scales + rows * half.groups * 2;
    if (half.groups) half.block_bytes = (half.block_bytes + KV_LINE - 1) / KV_LINE * KV_LINE;
    half.stride = 2 * model->layers * half.block_bytes;
    return half;
}

ML_INLINE uint8_t *layer_keys(const kv_half *half, const ml_kv *kv, int32_t layer) {
    return (uint8_t *)kv->data + 2 * layer * half->block_bytes;
}

ML_INLINE uint8_t *layer_values(const kv_half *half, const ml_kv *kv, int32_t layer) {
    return layer_keys(half, kv, layer) + half->block_bytes;
}

// Where in a block a head's row at its first slot begins, and with which step those of the next slots follow. (Keys in
// int8 have no rows; there these are pieces of the head's part.)
ML_INLINE int64_t row_step(const kv_half *half) {
    return half->groups ? half->row : (int64_t)half->kv_heads * half->row;
}

ML_INLINE int64_t first_row(const kv_half *half, int32_t kv_head) {
    return (int64_t)kv_head * half->row * (half->groups ? half->block_size : 1);
}

// Where in a block a head's scales begin: group after group, slot after slot.
ML_INLINE int64_t first_scale(const kv_half *half, int32_t kv_head) {
    return half->scales + (int64_t)kv_head * half->groups * half->block_size * 2;
}

// Write n floats as bf16; false if one of them is not finite as such.
static int write_bf16(const float *x, int32_t n, uint16_t *out) {
    int finite = 1;
    for (int32_t i = 0; i < n; i++) {
        out[i] = float_to_bf16(x[i]);
        finite &= (out[i] & 0x7f80) != 0x7f80;
    }
    return finite;
}

// Write up to ML_KV_GROUP floats as codes with one scale, as server/kernels/plain/kv_int8.py says; false if one of them is
// not finite.
static int write_group(const float *x, int32_t n, int8_t *codes, int32_t step_of_codes, uint16_t *scale) {
    float whole[ML_KV_GROUP] = {0};
    memcpy(whole, x, (size_t)n * sizeof(float));
    vf most = vzero(), strange = vzero();
    for (int32_t i = 0; i < ML_KV_GROUP; i += VW) {
        vf v = vload(whole + i);
        most = vmax(most, vmax(v, vsub(vzero(), v)));
        strange = vadd(strange, vsub(v, v)); // 0, or NaN
    }
    *scale = float_to_bf16(vtop(most) / 127.0f);
    const float step = bf16_to_float(*scale);
    const int finite = vsum(strange) == 0.0f;
    if (!finite || step < FLT_MIN) {
        *scale = finite ? 0 : 0x7fc0; // NaN
        for (int32_t i = 0; i < n; i++) codes[i * step_of_codes] = 0;
        return finite;
    }
    for (int32_t i = 0; i < ML_KV_GROUP; i += VW) {
        vf code = vround(vdiv(vload(whole + i), vset(step)));
        vstore(whole + i, vmin(vmax(code, vset(-127.0f)), vset(127.0f)));
    }
    for (int32_t i = 0; i < n; i++) codes[i * step_of_codes] = (int8_t)whole[i];
    return 1;
}

static int write_heads_int8(const kv_half *half, const float *x, int32_t inside, int keys, uint8_t *block) {
    int finite = 1;
    for (int32_t head = 0; head < half->kv_heads; head++, x += half->head_dim) {
        int8_t *codes = (int8_t *)block + first_row(half, head) + (keys ? inside : inside * half->row);
        uint16_t *scales = (uint16_t *)(void *)(block + first_scale(half, head)) + inside;
        for (int32_t d = 0; d < half->head_dim; d += ML_KV_GROUP, scales += half->block_size) {
            const int32_t rest = half->head_dim - d, step = keys ? half->block_size : 1;
            finite &= write_group(x + d, rest < ML_KV_GROUP ? rest : ML_KV_GROUP, codes + d * step, step, scales);
        }
    }
    return finite;
}

// Write the heads of one token [kv_heads][head_dim] to its slot of a layer's keys or values; false if they aren't finite
// there.
static int write_heads(const kv_half *half, const float *x, int32_t slot, int keys, uint8_t *to) {
    const int32_t inside = slot % half->block_size;
    to += slot / half->block_size * half->stride;
    if (half->groups) return write_heads_int8(half, x, inside, keys, to);
    uint16_t *rows = (uint16_t *)(void *)(to + inside * row_step(half));
    return write_bf16(x, half->kv_heads * half->head_dim, rows);
}
