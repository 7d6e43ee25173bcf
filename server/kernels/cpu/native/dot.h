// The integer dot products of an instruction set: words of four unsigned activations times four signed weights, summed
// in 32 bits. No step saturates, so every instruction set gets the same integers.
//
// A tile keeps two vectors of VW outputs a row: outputs j * VW.. and 16 + j * VW.. of a block, j in 0 .. 16 / VW - 1.
#pragma once
#include "simd.h"

// vi: VW sums. vw: the four weights of each of VW outputs. vx: a word of activations, ready to be multiplied.
// ML_TILE: rows of a tile, ML_SUMS_ARE_CHEAP: whether adding weights up costs less than reading their sums, ML_FLIP: what bytes of activations are stored xor-ed with, ML_OFFSET: what that takes away.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define ML_TILE 6
#define ML_SUMS_ARE_CHEAP 1
#define ML_FLIP 0
#define ML_OFFSET 0
typedef __m512i vi;
typedef __m512i vw;
typedef __m512i vx;
typedef __m512i vtable;
ML_INLINE vtable load_table(const int8_t *table) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
}
ML_INLINE void load_table4(const uint8_t *codes, vtable table, vw *low, vw *high) {
    __m512i half = _mm512_set1_epi8(15);
    __m512i both = _mm512_loadu_si512(codes);
    *low = _mm512_shuffle_epi8(table, _mm512_and_si512(both, half));
    *high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(both, 4), half));
}
ML_INLINE vw load_bytes(const int8_t *codes) { return _mm512_loadu_si512(codes); }
ML_INLINE void load_split(const uint8_t *high_halves, const uint8_t *low_halves, int32_t dither, vw *low, vw *high) {
    const __m512i half = _mm512_set1_epi8(15), less = _mm512_set1_epi32(dither);
    const __m512i top = _mm512_loadu_si512(high_halves), rest = _mm512_loadu_si512(low_halves);
    // 0xca: bit by bit, the second where the first is set, else the third.
    *low = _mm512_sub_epi8(_mm512_ternarylogic_epi32(half, rest, _mm512_slli_epi16(top, 4), 0xca), less);
    *high = _mm512_sub_epi8(_mm512_ternarylogic_epi32(half, _mm512_srli_epi16(rest, 4), top, 0xca), less);
}
ML_INLINE void store_bytes(int8_t *p, vw w) { _mm512_storeu_si512(p, w); }
ML_INLINE vx load_word(const uint8_t *u) {
    int32_t word;
    memcpy(&word, u, 4);
    return _mm512_set1_epi32(word);
}
ML_INLINE vi dot(vi sum, vx x, vw w) { return _mm512_dpbusd_epi32(sum, x, w); }
ML_INLINE vi vi_zero() { return _mm512_setzero_si512(); }
ML_INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
ML_INLINE vf vi_float(vi x) { return _mm512_cvtepi32_ps(x); }
// In the low half of each lane, as with_zeros() takes them.
ML_INLINE vi load_sums(const int16_t *sums) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)sums));
}
ML_INLINE vi vi_low(vi sums) { return _mm512_and_si512(sums, _mm512_set1_epi32(0xffff)); }
ML_INLINE vi with_zeros(vi sums, const int16_t *zeros) {
    return _mm512_or_si512(vi_low(sums), _mm512_slli_epi32(load_sums(zeros), 16));
}
ML_INLINE vi start(vi pairs, int32_t fold) { return _mm512_madd_epi16(pairs, _mm512_set1_epi32(fold)); }
ML_INLINE void load_bf16(const uint16_t *p, vf *even, vf *odd) {
    __m512i both = _mm512_loadu_si512(p);
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
}
// 1 where x is above the edge, else 0.
ML_INLINE vf vabove(vf x, vf edge) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, edge, _CMP_GT_OQ), _mm512_set1_ps(1.0f));
}
ML_INLINE float vleast(vf x) { return _mm512_reduce_min_ps(x); }
ML_INLINE float vmost(vf x) { return _mm512_reduce_max_ps(x); }
// Whole numbers of 0 .. 255 as bytes.
ML_INLINE void store_u8(uint8_t *p, vf x) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(vint(x))); }

#elif defined(__AVX2__)
// No VNNI: a product of bytes is a product of 16-bit halves, evens and odds apart. (maddubs would saturate.)
#define ML_TILE 3
#define ML_SUMS_ARE_CHEAP 0
#define ML_FLIP 0
#define ML_OFFSET 0
typedef __m256i vi;
typedef struct { __m256i even, odd; } vw;
typedef struct { __m256i even, odd; } vx;
typedef __m256i vtable;
ML_INLINE vtable load_table(const int8_t *table) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
}
ML_INLINE vw widen(__m256i w) {
    vw wide = {_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), _mm256_srai_epi16(w, 8)};
    return wide;
}
ML_INLINE void load_table4(const uint8_t *codes, vtable table, vw *low, vw *high) {
    __m256i half = _mm256_set1_epi8(15);
    __m256i both = _mm256_loadu_si256((const __m256i *)codes);
    *low = widen(_mm256_shuffle_epi8(table, _mm256_and_si256(both, half)));
    *high = widen(_mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(both, 4), half)));
}
ML_INLINE vw load_bytes(const int8_t *codes) { return widen(_mm256_loadu_si256((const __m256i *)codes)); }
ML_INLINE __m256i pick_bits(__m256i where, __m256i set, __m256i clear) {
    return _mm256_or_si256(_mm256_and_si256(where, set), _mm256_andnot_si256(where, clear));
}
ML_INLINE void load_split(const uint8_t *high_halves, const uint8_t *low_halves, int32_t dither, vw *low, vw *high) {
    const __m256i half = _mm256_set1_epi8(15), less = _mm256_set1_epi32(dither);
    const __m256i top = _mm256_loadu_si256((const __m256i *)high_halves);
    const __m256i rest = _mm256_loadu_si256((const __m256i *)low_halves);
    *low = widen(_mm256_sub_epi8(pick_bits(half, rest, _mm256_slli_epi16(top, 4)), less));
    *high = widen(_mm256_sub_epi8(pick_bits(half, _mm256_srli_epi16(rest, 4), top), less));
}
ML_INLINE void store_bytes(int8_t *p, vw w) {
    __m256i even = _mm256_and_si256(w.even, _mm256_set1_epi16(255));
    _mm256_storeu_si256((__m256i *)p, _mm256_or_si256(even, _mm256_slli_epi16(w.odd, 8)));
}
ML_INLINE vx load_word(const uint8_t *u) {
    int32_t word;
    memcpy(&word, u, 4);
    vx x = {_mm256_set1_epi32(word & 0x00ff00ff), _mm256_set1_epi32(word >> 8 & 0x00ff00ff)};
    return x;
}
ML_INLINE vi dot(vi sum, vx x, vw w) {
    return _mm256_add_epi32(_mm256_add_epi32(sum, _mm256_madd_epi16(x.even, w.even)), _mm256_madd_epi16(x.odd, w.odd));
}
ML_INLINE vi vi_zero() { return _mm256_setzero_si256(); }
ML_INLINE vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
ML_INLINE vf vi_float(vi x) { return _mm256_cvtepi32_ps(x); }
ML_INLINE vi load_sums(const int16_t *sums) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)sums)); }
ML_INLINE vi vi_low(vi sums) { return _mm256_and_si256(sums, _mm256_set1_epi32(0xffff)); }
ML_INLINE vi with_zeros(vi sums, const int16_t *zeros) {
    return _mm256_or_si256(vi_low(sums), _mm256_slli_epi32(load_sums(zeros), 16));
}
ML_INLINE vi start(vi pairs, int32_t fold) { return _mm256_madd_epi16(pairs, _mm256_set1_epi32(fold)); }
ML_INLINE void load_bf16(const uint16_t *p, vf *even, vf *odd) {
    __m256i both = _mm256_loadu_si256((const __m256i *)p);
    *even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    *odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32((int)0xffff0000)));
}
ML_INLINE vf vabove(vf x, vf edge) { return _mm256_and_ps(_mm256_cmp_ps(x, edge, _CMP_GT_OQ), _mm256_set1_ps(1.0f)); }
ML_INLINE float vleast(vf x) {
    __m128 half = _mm_min_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_min_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_min_ss(half, _mm_movehdup_ps(half)));
}
ML_INLINE float vmost(vf x) { return -vleast(vsub(vzero(), x)); }
ML_INLINE void store_u8(uint8_t *p, vf x) {
    __m256i whole = vint(x);
    __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64((__m128i *)p, _mm_packus_epi16(halves, halves));
}

#elif defined(__ARM_FEATURE_DOTPROD)
// Arm multiplies signed by signed: activations are stored less 128.
#define ML_TILE 6
#define ML_SUMS_ARE_CHEAP 0
#define ML_FLIP 128
#define ML_OFFSET 128
typedef int32x4_t vi;
typedef int8x16_t vw;
typedef int8x16_t vx;
typedef int8x16_t vtable;
ML_INLINE vtable load_table(const int8_t *table) { return vld1q_s8(table); }
ML_INLINE void load_table4(const uint8_t *codes, vtable table, vw *low, vw *high) {
    uint8x16_t both = vld1q_u8(codes);
    *low = vqtbl1q_s8(table, vandq_u8(both, vdupq_n_u8(15)));
    *high = vqtbl1q_s8(table, vshrq_n_u8(both, 4));
}
ML_INLINE vw load_bytes(const int8_t *codes) { return vld1q_s8(codes); }
ML_INLINE void load_split(const uint8_t *high_halves, const uint8_t *low_halves, int32_t dither, vw *low, vw *high) {
    const uint8x16_t half = vdupq_n_u8(15), top = vld1q_u8(high_halves), rest = vld1q_u8(low_halves);
    const int8x16_t less = vreinterpretq_s8_s32(vdupq_n_s32(dither));
    *low = vsubq_s8(vreinterpretq_s8_u8(vbslq_u8(half, rest, vshlq_n_u8(top, 4))), less);
    *high = vsubq_s8(vreinterpretq_s8_u8(vbslq_u8(half, vshrq_n_u8(rest, 4), top)), less);
}
ML_INLINE void store_bytes(int8_t *p, vw w) { vst1q_s8(p, w); }
ML_INLINE vx load_word(const uint8_t *u) {
    int32_t word;
    memcpy(&word, u, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(word));
}
ML_INLINE vi dot(vi sum, vx x, vw w) { return vdotq_s32(sum, w, x); }
ML_INLINE vi vi_zero() { return vdupq_n_s32(0); }
ML_INLINE vi vi_add(vi a, vi b) { return vaddq_s32(a, b); }
ML_INLINE vf vi_float(vi x) { return vcvtq_f32_s32(x); }
ML_INLINE vi load_sums(const int16_t *sums) { return vreinterpretq_s32_u32(vmovl_u16(vreinterpret_u16_s16(vld1_s16(sums)))); }
ML_INLINE vi vi_low(vi sums) { return vandq_s32(sums, vdupq_n_s32(0xffff)); }
ML_INLINE vi with_zeros(vi sums, const int16_t *zeros) {
    return vorrq_s32(vi_low(sums), vshlq_n_s32(load_sums(zeros), 16));
}
ML_INLINE vi start(vi pairs, int32_t fold) {
    int32x4_t sums = vshrq_n_s32(vshlq_n_s32(pairs, 16), 16);
    return vmlaq_n_s32(vmulq_n_s32(sums, (int16_t)fold), vshrq_n_s32(pairs, 16), fold >> 16);
}
ML_INLINE void load_bf16(const uint16_t *p, vf *even, vf *odd) {
    uint32x4_t both = vreinterpretq_u32_u16(vld1q_u16(p));
    *even = vreinterpretq_f32_u32(vshlq_n_u32(both, 16));
    *odd = vreinterpretq_f32_u32(vandq_u32(both, vdupq_n_u32(0xffff0000)));
}
ML_INLINE vf vabove(vf x, vf edge) {
    return vreinterpretq_f32_u32(vandq_u32(vcgtq_f32(x, edge), vreinterpretq_u32_f32(vdupq_n_f32(1))));
}
ML_INLINE float vleast(vf x) { return vminvq_f32(x); }
ML_INLINE float vmost(vf x) { return vmaxvq_f32(x); }
ML_INLINE void store_u8(uint8_t *p, vf x) {
    uint16x4_t halves = vmovn_u32(vreinterpretq_u32_s32(vint(x)));
    uint8x8_t bytes = vmovn_u16(vcombine_u16(halves, halves));
    vst1_lane_u32((uint32_t *)(void *)p, vreinterpret_u32_u8(bytes), 0);
}
#else
#error "no integer dot products for this instruction set"
#endif

// Pairs (sum, zero) of 16 bits, which start() multiplies by a row's pair and adds up.
ML_INLINE vi load_pairs(const int16_t *sums, const int16_t *zeros) { return with_zeros(load_sums(sums), zeros); }

// What start() multiplies a group's pairs by: -(zero - ML_OFFSET) for its sum, -(sum of u - n * zero) for its zero.
ML_INLINE int32_t fold_row(int32_t zero, int32_t sum, int32_t group) {
    uint32_t of_sum = (uint32_t)(ML_OFFSET - zero) & 0xffff;
    uint32_t of_zero = (uint32_t)(group * zero - sum) << 16;
    return (int32_t)(of_sum | of_zero);
}
