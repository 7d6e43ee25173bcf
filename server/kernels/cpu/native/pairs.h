// Weights and activations as pairs of bfloat16, and their products: what --activations bfloat16 multiplies.
//
// A word of four inputs is the pairs (0, 2) and (1, 3): so its bytes come apart without crossing a lane. A vr holds one
// such pair of each of VW outputs as it is unpacked and stored, the first input in the low half; a vp the same, ready
// to be multiplied.
#pragma once
#include "simd.h"

static const int ml_pair_order[4] = {0, 2, 1, 3}; // which input of a word stands where among the activations

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define ML_WIDE_ROWS 4
typedef __m512i vr;
typedef __m512i vvalues;
ML_INLINE vr load_raw(const void *p) { return _mm512_loadu_si512(p); }
ML_INLINE void store_raw(void *p, vr x) { _mm512_storeu_si512(p, x); }
// Twice the sixteen values: of five bits that an index has the highest is another code's.
ML_INLINE vvalues load_values(const uint16_t *values) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)values));
}
ML_INLINE void unpack_codes(const uint8_t *codes, vvalues values, vr *low, vr *high) {
    __m512i both = _mm512_loadu_si512(codes);
    low[0] = _mm512_permutexvar_epi16(both, values);
    low[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(both, 8), values);
    high[0] = _mm512_permutexvar_epi16(_mm512_srli_epi16(both, 4), values);
    high[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(both, 12), values);
}
// A byte has no more digits than bfloat16: its float's lower half is 0.
ML_INLINE void unpack_bytes(const int8_t *bytes, vr *pair) {
    __m512i word = _mm512_loadu_si512(bytes);
    __m512i a = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(word, 24), 24)));
    __m512i b = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(word, 16), 24)));
    __m512i c = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(word, 8), 24)));
    __m512i d = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(word, 24)));
    pair[0] = _mm512_or_si512(_mm512_srli_epi32(a, 16), c);
    pair[1] = _mm512_or_si512(_mm512_srli_epi32(b, 16), d);
}
ML_INLINE vf load_whole(const int16_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)p)));
}
#if !defined(__AVX512BF16__)
ML_INLINE vf raw_first(vr x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
ML_INLINE vf raw_second(vr x) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000))); }
#endif

#elif defined(__AVX2__)
#define ML_WIDE_ROWS 2
typedef __m256i vr;
typedef struct { __m256i low, high; } vvalues; // bytes of the sixteen values
ML_INLINE vr load_raw(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
ML_INLINE void store_raw(void *p, vr x) { _mm256_storeu_si256((__m256i *)p, x); }
ML_INLINE vvalues load_values(const uint16_t *values) {
    uint8_t low[16], high[16];
    for (int i = 0; i < 16; i++) low[i] = (uint8_t)values[i], high[i] = (uint8_t)(values[i] >> 8);
    vvalues both = {_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)low)),
                    _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)high))};
    return both;
}
ML_INLINE void unpack_half(__m256i code, vvalues values, vr *pair) {
    __m256i even = _mm256_set1_epi16(255);
    __m256i low = _mm256_shuffle_epi8(values.low, code), high = _mm256_shuffle_epi8(values.high, code);
    pair[0] = _mm256_or_si256(_mm256_and_si256(low, even), _mm256_slli_epi16(high, 8));
    pair[1] = _mm256_or_si256(_mm256_srli_epi16(low, 8), _mm256_andnot_si256(even, high));
}
ML_INLINE void unpack_codes(const uint8_t *codes, vvalues values, vr *low, vr *high) {
    __m256i half = _mm256_set1_epi8(15), both = _mm256_loadu_si256((const __m256i *)codes);
    unpack_half(_mm256_and_si256(both, half), values, low);
    unpack_half(_mm256_and_si256(_mm256_srli_epi16(both, 4), half), values, high);
}
ML_INLINE void unpack_bytes(const int8_t *bytes, vr *pair) {
    __m256i word = _mm256_loadu_si256((const __m256i *)bytes);
    __m256i a = _mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(word, 24), 24)));
    __m256i b = _mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(word, 16), 24)));
    __m256i c = _mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(word, 8), 24)));
    __m256i d = _mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_srai_epi32(word, 24)));
    pair[0] = _mm256_or_si256(_mm256_srli_epi32(a, 16), c);
    pair[1] = _mm256_or_si256(_mm256_srli_epi32(b, 16), d);
}
ML_INLINE vf load_whole(const int16_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)p)));
}
ML_INLINE vf raw_first(vr x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
ML_INLINE vf raw_second(vr x) { return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32((int)0xffff0000))); }

#elif defined(__ARM_NEON)
#define ML_WIDE_ROWS 4
typedef uint32x4_t vr;
typedef struct { uint8x16_t low, high; } vvalues;
ML_INLINE vr load_raw(const void *p) { return vld1q_u32((const uint32_t *)p); }
ML_INLINE void store_raw(void *p, vr x) { vst1q_u32((uint32_t *)p, x); }
ML_INLINE vvalues load_values(const uint16_t *values) {
    uint8_t low[16], high[16];
    for (int i = 0; i < 16; i++) low[i] = (uint8_t)values[i], high[i] = (uint8_t)(values[i] >> 8);
    vvalues both = {vld1q_u8(low), vld1q_u8(high)};
    return both;
}
ML_INLINE void unpack_half(uint8x16_t code, vvalues values, vr *pair) {
    uint16x8_t low = vreinterpretq_u16_u8(vqtbl1q_u8(values.low, code));
    uint16x8_t high = vreinterpretq_u16_u8(vqtbl1q_u8(values.high, code));
    pair[0] = vreinterpretq_u32_u16(vorrq_u16(vandq_u16(low, vdupq_n_u16(255)), vshlq_n_u16(high, 8)));
    pair[1] = vreinterpretq_u32_u16(vorrq_u16(vshrq_n_u16(low, 8), vandq_u16(high, vdupq_n_u16(0xff00))));
}
ML_INLINE void unpack_codes(const uint8_t *codes, vvalues values, vr *low, vr *high) {
    uint8x16_t both = vld1q_u8(codes);
    unpack_half(vandq_u8(both, vdupq_n_u8(15)), values, low);
    unpack_half(vshrq_n_u8(both, 4), values, high);
}
ML_INLINE void unpack_bytes(const int8_t *bytes, vr *pair) {
    int32x4_t word = vreinterpretq_s32_s8(vld1q_s8(bytes));
    uint32x4_t a = vreinterpretq_u32_f32(vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(word, 24), 24)));
    uint32x4_t b = vreinterpretq_u32_f32(vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(word, 16), 24)));
    uint32x4_t c = vreinterpretq_u32_f32(vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(word, 8), 24)));
    uint32x4_t d = vreinterpretq_u32_f32(vcvtq_f32_s32(vshrq_n_s32(word, 24)));
    pair[0] = vorrq_u32(vshrq_n_u32(a, 16), c);
    pair[1] = vorrq_u32(vshrq_n_u32(b, 16), d);
}
ML_INLINE vf load_whole(const int16_t *p) { return vcvtq_f32_s32(vmovl_s16(vld1_s16(p))); }
ML_INLINE vf raw_first(vr x) { return vreinterpretq_f32_u32(vshlq_n_u32(x, 16)); }
ML_INLINE vf raw_second(vr x) { return vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000))); }
#endif

#if defined(__AVX512BF16__)
typedef uint16_t ml_activation; // how one lies in memory
typedef __m512bh vp, vxp;
ML_INLINE vp ready(vr x) { return (__m512bh)x; }
ML_INLINE vxp load_pair(const ml_activation *x) {
    int32_t both;
    memcpy(&both, x, 4);
    return (__m512bh)_mm512_set1_epi32(both);
}
ML_INLINE vf dot_pair(vf sum, vxp x, vp w) { return _mm512_dpbf16_ps(sum, x, w); }
ML_INLINE ml_activation activation_of(uint16_t bits) { return bits; }
#else
typedef float ml_activation;
typedef struct { vf first, second; } vp, vxp;
ML_INLINE vp ready(vr x) {
    vp both = {raw_first(x), raw_second(x)};
    return both;
}
ML_INLINE vxp load_pair(const ml_activation *x) {
    vxp both = {vset(x[0]), vset(x[1])};
    return both;
}
ML_INLINE vf dot_pair(vf sum, vxp x, vp w) { return vfma(x.second, w.second, vfma(x.first, w.first, sum)); }
ML_INLINE ml_activation activation_of(uint16_t bits) { return bf16_to_float(bits); }
#endif
