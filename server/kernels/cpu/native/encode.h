// Loading: 16- and 32-bit weights brought to NF4 and to int8, bit for bit as quant/nf4.py and quant/int8.py do.
#pragma once
#include <float.h>
#include <math.h>

#include "abi.h"
#include "quantize.h"
#include "team.h"

#define ML_ENCODE_PIECE 65536 // weights of a piece, a multiple of any block
#define ML_ENCODE_BLOCK 4096  // the largest block
#define ML_ENCODE_SPAN 64     // memory for a block is a multiple of it
#define ML_ABREAST 4          // vectors that are counted beside each other: one alone waits for its own sums

typedef struct {
    const ml_encoding *encoding;
    int32_t strange; // whether a weight is not finite
} ml_encode_run;

// `count` and one more in each lane in which x lies above `edge`.
ML_INLINE vf vcount(vf count, vf x, vf edge) {
#if defined(__AVX512F__)
    return _mm512_mask_add_ps(count, _mm512_cmp_ps_mask(x, edge, _CMP_GT_OQ), count, vset(1.0f));
#else
    return vadd(count, vabove(x, edge));
#endif
}

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

// The bits of magnitudes are ordered as the magnitudes are, infinity and then NaN last.
#if defined(__AVX512F__)
typedef __m512i ml_bits;
ML_INLINE ml_bits no_bits() { return _mm512_setzero_si512(); }
ML_INLINE ml_bits larger_bits(ml_bits most, vf x) {
    return _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
}
ML_INLINE uint32_t top_bits(ml_bits most) { return _mm512_reduce_max_epu32(most); }
#elif defined(__AVX2__)
typedef __m256i ml_bits;
ML_INLINE ml_bits no_bits() { return _mm256_setzero_si256(); }
ML_INLINE ml_bits larger_bits(ml_bits most, vf x) {
    return _mm256_max_epu32(most, _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff)));
}
ML_INLINE uint32_t top_bits(ml_bits most) {
    __m128i top = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    top = _mm_max_epu32(top, _mm_shuffle_epi32(top, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(top, _mm_shuffle_epi32(top, 0xb1)));
}
#else
typedef uint32x4_t ml_bits;
ML_INLINE ml_bits no_bits() { return vdupq_n_u32(0); }
ML_INLINE ml_bits larger_bits(ml_bits most, vf x) {
    return vmaxq_u32(most, vandq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0x7fffffff)));
}
ML_INLINE uint32_t top_bits(ml_bits most) { return vmaxvq_u32(most); }
#endif

// The largest magnitude of x [count], NaN if there is one that is not finite. x is filled with zeros to whole spans.
ML_INLINE float largest_of(float *x, int32_t count) {
    ml_bits most = no_bits();
    for (int32_t i = count; i % ML_ENCODE_SPAN; i++) x[i] = 0.0f;
    for (int32_t i = 0; i < count; i += VW) most = larger_bits(most, vload(x + i));
    uint32_t bits = top_bits(most);
    float largest;
    memcpy(&largest, &bits, sizeof largest);
    return bits < 0x7f800000 ? largest : NAN;
}

// Four-bit codes of x [count], a number from -1 to 1 times `largest`: how many of the values between codes lie below.
static void encode_nf4_block(const ml_encoding *e, float *x, int32_t count, float *scale, uint8_t *codes) {
    const float least = 1e-38f;
    float largest = largest_of(x, count);
    int whole = count == e->block; // as bitsandbytes: one that isn't is divided, and has no scale of 0
    if (!whole && largest < least) largest = least;
    vf inverse = vset(1.0f / (largest < least ? least : largest));
    uint8_t code[ML_ENCODE_BLOCK];
    for (int32_t i = 0; i < count; i += ML_ABREAST * VW) { // counts of several vectors go on beside each other
        vf v[ML_ABREAST], below[ML_ABREAST];
        for (int j = 0; j < ML_ABREAST; j++) {
            vf of_block = vload(x + i + j * VW);
            v[j] = whole ? vmul(of_block, inverse) : vdiv(of_block, vset(largest));
            v[j] = vmin(vmax(v[j], vset(-1.0f)), vset(1.0f));
            below[j] = vzero();
        }
        for (int k = 0; k < 15; k++)
            for (int j = 0; j < ML_ABREAST; j++) below[j] = vcount(below[j], v[j], vset(e->between[k]));
        for (int j = 0; j < ML_ABREAST; j++) store_u8(code + i + j * VW, below[j]);
    }
    for (int32_t i = 0; i < count; i += 2) { // of 0 behind the last
        uint16_t two;
        memcpy(&two, code + i, 2);
        codes[i / 2] = (uint8_t)(two << 4 | two >> 8);
    }
    *scale = largest;
}

static void encode_int8_block(float *x, int32_t count, float most, float *scale, uint8_t *codes) {
    float largest = largest_of(x, count);
    float inverse = largest > 1e-36f ? 1.0f / largest * most : 0.0f; // as torch divides a number by a tensor
    int32_t whole[ML_ENCODE_SPAN];
    for (int32_t i = 0; i < count; i += VW) {
        vf v = vround(vmul(vload(x + i), vset(inverse)));
        vi of_all = vint(vmin(vmax(v, vset(-most)), vset(most)));
        memcpy(whole + i, &of_all, sizeof of_all);
    }
    for (int32_t i = 0; i < count; i++) codes[i] = (uint8_t)whole[i];
    *scale = largest / most;
}

static void mark(ml_encode_run *run, float scale) {
    if (!(scale <= FLT_MAX)) __atomic_store_n(&run->strange, 1, __ATOMIC_RELAXED);
}

static void encode_nf4_program(ml_team team, void *argument) {
    ml_encode_run *run = (ml_encode_run *)argument;
    const ml_encoding *e = run->encoding;
    float x[ML_ENCODE_BLOCK];
    for (int64_t first; (first = ml_take(team) * ML_ENCODE_PIECE) < e->in;) {
        int64_t end = first + ML_ENCODE_PIECE < e->in ? first + ML_ENCODE_PIECE : e->in;
        for (int64_t at = first; at < end; at += e->block) {
            int32_t count = (int32_t)(end - at < e->block ? end - at : e->block);
            float *scale = e->scales + at / e->block;
            read_weights(e, at, count, x);
            encode_nf4_block(e, x, count, scale, e->codes + at / 2);
            mark(run, *scale);
        }
    }
}

static void encode_int8_program(ml_team team, void *argument) {
    ml_encode_run *run = (ml_encode_run *)argument;
    const ml_encoding *e = run->encoding;
    int64_t groups = (e->in + e->block - 1) / e->block;
    float x[ML_ENCODE_SPAN]; // the largest group
    for (int64_t row; (row = ml_take(team)) < e->rows;)
        for (int64_t g = 0; g < groups; g++) {
            int64_t at = row * e->in + g * e->block, left = e->in - g * e->block;
            int32_t count = (int32_t)(left < e->block ? left : e->block);
            float *scale = e->scales + row * groups + g;
            read_weights(e, at, count, x);
            encode_int8_block(x, count, (float)e->most, scale, e->codes + at);
            mark(run, *scale);
        }
}

// Both return 0, or 1 if a weight is not finite.
static int32_t encode_nf4(ml_pool *pool, const ml_encoding *encoding) {
    ml_encode_run run = {encoding, 0};
    ml_run(pool, encode_nf4_program, &run);
    return run.strange;
}

static int32_t encode_int8(ml_pool *pool, const ml_encoding *encoding) {
    ml_encode_run run = {encoding, 0};
    ml_run(pool, encode_int8_program, &run);
    return run.strange;
}

#define ML_ENCODE_EXPORTS ML_EXPORT(encode_nf4), ML_EXPORT(encode_int8),
