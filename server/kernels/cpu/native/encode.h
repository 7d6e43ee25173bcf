// Loading: 16- and 32-bit weights brought to NF4 and to int8, bit for bit as quant/nf4.py and quant/int8.py do.
#pragma once
#include <math.h>

#include "abi.h"
#include "quantize.h"
#include "team.h"

#define ML_ENCODE_PIECE 65536 // weights of a piece, a multiple of any block
#define ML_ENCODE_BLOCK 4096  // the largest block

ML_INLINE void read_weights(const ml_encoding *e, int64_t first, int32_t count, float *x) {
    int32_t i = 0;
    if (e->type == ML_WEIGHTS_F32) memcpy(x, (const float *)e->weights + first, (size_t)count * sizeof(float));
    if (e->type == ML_WEIGHTS_F32) return;
    const uint16_t *half = (const uint16_t *)e->weights + first;
    for (; i + VW <= count; i += VW) vstore(x + i, e->type == ML_WEIGHTS_F16 ? vf16(half + i) : vbf16(half + i));
    if (i == count) return;
    uint16_t rest[VW] = {};
    float wide[VW];
    memcpy(rest, half + i, (size_t)(count - i) * sizeof(uint16_t));
    vstore(wide, e->type == ML_WEIGHTS_F16 ? vf16(rest) : vbf16(rest));
    memcpy(x + i, wide, (size_t)(count - i) * sizeof(float));
}

// The largest magnitude of x [count], NaN if there is one that is not finite. x is filled with zeros to whole vectors.
ML_INLINE float largest_of(float *x, int32_t count) {
    vf most = vzero(), strange = vzero();
    for (int32_t i = count; i % VW; i++) x[i] = 0.0f;
    for (int32_t i = 0; i < count; i += VW) {
        vf v = vload(x + i);
        most = vmax(most, vmax(v, vsub(vzero(), v)));
        strange = vadd(strange, vsub(v, v));
    }
    return vsum(strange) == 0 ? vtop(most) : NAN;
}

// Four-bit codes of x [count], a number from -1 to 1 times `largest`: how many of the values between codes lie below.
static void encode_nf4_block(const ml_encoding *e, float *x, int32_t count, float *scale, uint8_t *codes) {
    const float least = 1e-38f;
    float largest = largest_of(x, count);
    int whole = count == e->block; // as bitsandbytes: one that isn't is divided, and has no scale of 0
    if (!whole && largest < least) largest = least;
    vf inverse = vset(1.0f / (largest < least ? least : largest));
    uint8_t code[ML_ENCODE_BLOCK];
    for (int32_t i = 0; i < count; i += VW) {
        vf v = whole ? vmul(vload(x + i), inverse) : vdiv(vload(x + i), vset(largest)), below = vzero();
        v = vmin(vmax(v, vset(-1.0f)), vset(1.0f));
        for (int k = 0; k < 15; k++) below = vadd(below, vabove(v, vset(e->between[k])));
        store_u8(code + i, below);
    }
    for (int32_t i = 0; i < count; i += 2) codes[i / 2] = (uint8_t)(code[i] << 4 | code[i + 1]); // of 0 behind the last
    *scale = largest;
}

static void encode_int8_block(float *x, int32_t count, float *scale, uint8_t *codes) {
    float largest = largest_of(x, count);
    float inverse = largest > 1e-36f ? 1.0f / largest * 127.0f : 0.0f; // as torch divides a number by a tensor
    int32_t whole[64];
    for (int32_t i = 0; i < count; i += VW) {
        vf v = vround(vmul(vload(x + i), vset(inverse)));
        vi of_all = vint(vmin(vmax(v, vset(-127.0f)), vset(127.0f)));
        memcpy(whole + i, &of_all, sizeof of_all);
    }
    for (int32_t i = 0; i < count; i++) codes[i] = (uint8_t)whole[i];
    *scale = largest / 127.0f;
}

static void encode_nf4_program(ml_team team, void *argument) {
    const ml_encoding *e = (const ml_encoding *)argument;
    float x[ML_ENCODE_BLOCK];
    for (int64_t first; (first = ml_take(team) * ML_ENCODE_PIECE) < e->in;) {
        int64_t end = first + ML_ENCODE_PIECE < e->in ? first + ML_ENCODE_PIECE : e->in;
        for (int64_t at = first; at < end; at += e->block) {
            int32_t count = (int32_t)(end - at < e->block ? end - at : e->block);
            read_weights(e, at, count, x);
            encode_nf4_block(e, x, count, e->scales + at / e->block, e->codes + at / 2);
        }
    }
}

static void encode_int8_program(ml_team team, void *argument) {
    const ml_encoding *e = (const ml_encoding *)argument;
    int64_t groups = (e->in + e->block - 1) / e->block;
    float x[64]; // the largest group
    for (int64_t row; (row = ml_take(team)) < e->rows;)
        for (int64_t g = 0; g < groups; g++) {
            int64_t at = row * e->in + g * e->block, left = e->in - g * e->block;
            int32_t count = (int32_t)(left < e->block ? left : e->block);
            read_weights(e, at, count, x);
            encode_int8_block(x, count, e->scales + row * groups + g, e->codes + at);
        }
}

static void encode_nf4(ml_pool *pool, const ml_encoding *encoding) {
    ml_run(pool, encode_nf4_program, (void *)encoding);
}

static void encode_int8(ml_pool *pool, const ml_encoding *encoding) {
    ml_run(pool, encode_int8_program, (void *)encoding);
}

#define ML_ENCODE_EXPORTS ML_EXPORT(encode_nf4), ML_EXPORT(encode_int8),
