// Keys in bf16 turned on their side: rows, as many as a vector has lanes, become vectors of one element each.
#pragma once
#include "simd.h"

// As many 32-bit words as a vector has floats. turn_words: word j of x[i] becomes word i of x[j].
#if defined(__AVX512F__)
typedef __m512i vwords;
ML_INLINE vwords load_words(const uint8_t *p) { return _mm512_loadu_si512(p); }
ML_INLINE vwords load_part(const uint8_t *p, int32_t bytes) {
    return _mm512_maskz_loadu_epi8(((__mmask64)1 << bytes) - 1, p);
}
ML_INLINE void turn_words(vwords x[VW]) {
    __m512i y[16];
    for (int i = 0; i < 8; i++) {
        y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    // x[4g + c] now has, in its 128-bit lane l, word 4l + c of rows 4g .. 4g + 3.
    for (int c = 0; c < 4; c++) {
        __m512i low = _mm512_shuffle_i32x4(x[c], x[4 + c], 0x88), high = _mm512_shuffle_i32x4(x[c], x[4 + c], 0xdd);
        __m512i low2 = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0x88);
        __m512i high2 = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0xdd);
        y[c] = _mm512_shuffle_i32x4(low, low2, 0x88);
        y[8 + c] = _mm512_shuffle_i32x4(low, low2, 0xdd);
        y[4 + c] = _mm512_shuffle_i32x4(high, high2, 0x88);
        y[12 + c] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
    for (int i = 0; i < 16; i++) x[i] = y[i];
}
ML_INLINE vf low_half(vwords x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
ML_INLINE vf high_half(vwords x) {
    return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000)));
}
#else
#if defined(__AVX2__)
typedef __m256i vwords;
ML_INLINE vwords load_words(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)(const void *)p); }
ML_INLINE void turn_words(vwords x[VW]) {
    __m256i y[8];
    for (int i = 0; i < 4; i++) {
        y[2 * i] = _mm256_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm256_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        x[i] = _mm256_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm256_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm256_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm256_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    // x[4g + c] now has, in its 128-bit lane l, word 4l + c of rows 4g .. 4g + 3.
    for (int c = 0; c < 4; c++) {
        y[c] = _mm256_permute2x128_si256(x[c], x[4 + c], 0x20);
        y[4 + c] = _mm256_permute2x128_si256(x[c], x[4 + c], 0x31);
    }
    for (int i = 0; i < 8; i++) x[i] = y[i];
}
ML_INLINE vf low_half(vwords x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
ML_INLINE vf high_half(vwords x) {
    return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32((int)0xffff0000)));
}
#else
typedef int32x4_t vwords;
ML_INLINE vwords load_words(const uint8_t *p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
ML_INLINE void turn_words(vwords x[VW]) {
    int32x4x2_t a = vtrnq_s32(x[0], x[1]), b = vtrnq_s32(x[2], x[3]);
    for (int i = 0; i < 2; i++) {
        x[i] = vcombine_s32(vget_low_s32(a.val[i]), vget_low_s32(b.val[i]));
        x[2 + i] = vcombine_s32(vget_high_s32(a.val[i]), vget_high_s32(b.val[i]));
    }
}
ML_INLINE vf low_half(vwords x) { return vreinterpretq_f32_s32(vshlq_n_s32(x, 16)); }
ML_INLINE vf high_half(vwords x) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_s32(x), vdupq_n_u32(0xffff0000)));
}
#endif
// `bytes` of a vector's, and zeros.
ML_INLINE vwords load_part(const uint8_t *p, int32_t bytes) {
    alignas(64) uint8_t whole[4 * VW] = {0};
    memcpy(whole, p, (size_t)bytes);
    return load_words(whole);
}
#endif

// out[d][0 .. VW) is element d of VW rows of bf16, for `count` elements, 2 VW at most.
static void turn_bf16(const uint8_t *const *row, int32_t count, float *out, int32_t stride) {
    vwords x[VW];
    if (count >= 2 * VW)
        for (int i = 0; i < VW; i++) x[i] = load_words(row[i]);
    else
        for (int i = 0; i < VW; i++) x[i] = load_part(row[i], 2 * count);
    turn_words(x);
    for (int p = 0; p < VW && 2 * p < count; p++) {
        vstore(out + 2 * p * stride, low_half(x[p]));
        if (2 * p + 1 < count) vstore(out + (2 * p + 1) * stride, high_half(x[p]));
    }
}
