// Vectors of floats of the instruction set that a translation unit is compiled for. Everything is static: nothing of one
// instruction set can be linked into another. No contraction happens behind our back (-ffp-contract=off): where a sum is
// to be fused it says fma, so that a row's bits are the same in every tile.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
// GCC takes its own intrinsics' "undefined" registers for faults (its bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define ML_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define VW 16
typedef __m512 vf;
ML_INLINE vf vzero() { return _mm512_setzero_ps(); }
ML_INLINE vf vset(float x) { return _mm512_set1_ps(x); }
ML_INLINE vf vload(const float *p) { return _mm512_loadu_ps(p); }
ML_INLINE void vstore(float *p, vf x) { _mm512_storeu_ps(p, x); }
ML_INLINE vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
ML_INLINE vf vsub(vf a, vf b) { return _mm512_sub_ps(a, b); }
ML_INLINE vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
ML_INLINE vf vdiv(vf a, vf b) { return _mm512_div_ps(a, b); }
ML_INLINE vf vsqrt(vf x) { return _mm512_sqrt_ps(x); }
ML_INLINE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
ML_INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
ML_INLINE vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
ML_INLINE vf vround(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
ML_INLINE vf vbf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
ML_INLINE vf vf16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
ML_INLINE vf vint8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)));
}
ML_INLINE __m512i vint(vf x) { return _mm512_cvtps_epi32(x); }
// 2^n of a whole n within -126 .. 127.
ML_INLINE vf vpow2(vf n) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(vint(n), _mm512_set1_epi32(127)), 23)); }
// Where a mask holds `yes`, else `no`: nothing of the other reaches the result.
typedef __mmask16 vm;
ML_INLINE vm vless(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
ML_INLINE vm vboth(vm a, vm b) { return a & b; }
ML_INLINE vf vpick(vm mask, vf yes, vf no) { return _mm512_mask_blend_ps(mask, no, yes); }
// Lanes whose bits are set, the first lane's being the lowest.
ML_INLINE vm vbits(uint32_t bits) { return (vm)bits; }
// The largest lane. Where one is NaN: any lane, or NaN.
ML_INLINE float vtop(vf x) { return _mm512_reduce_max_ps(x); }
#elif defined(__AVX2__)
#define VW 8
typedef __m256 vf;
ML_INLINE vf vzero() { return _mm256_setzero_ps(); }
ML_INLINE vf vset(float x) { return _mm256_set1_ps(x); }
ML_INLINE vf vload(const float *p) { return _mm256_loadu_ps(p); }
ML_INLINE void vstore(float *p, vf x) { _mm256_storeu_ps(p, x); }
ML_INLINE vf vadd(vf a, vf b) { return _mm256_add_ps(a, b); }
ML_INLINE vf vsub(vf a, vf b) { return _mm256_sub_ps(a, b); }
ML_INLINE vf vmul(vf a, vf b) { return _mm256_mul_ps(a, b); }
ML_INLINE vf vdiv(vf a, vf b) { return _mm256_div_ps(a, b); }
ML_INLINE vf vsqrt(vf x) { return _mm256_sqrt_ps(x); }
ML_INLINE vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
ML_INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
ML_INLINE vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
ML_INLINE vf vround(vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
ML_INLINE vf vbf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
ML_INLINE vf vf16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
ML_INLINE vf vint8(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p)));
}
ML_INLINE __m256i vint(vf x) { return _mm256_cvtps_epi32(x); }
ML_INLINE vf vpow2(vf n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(vint(n), _mm256_set1_epi32(127)), 23)); }
typedef __m256 vm;
ML_INLINE vm vless(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
ML_INLINE vm vboth(vm a, vm b) { return _mm256_and_ps(a, b); }
ML_INLINE vf vpick(vm mask, vf yes, vf no) { return _mm256_blendv_ps(no, yes, mask); }
ML_INLINE vm vbits(uint32_t bits) {
    const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), lanes), lanes));
}
ML_INLINE float vtop(vf x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#define VW 4
typedef float32x4_t vf;
ML_INLINE vf vzero() { return vdupq_n_f32(0); }
ML_INLINE vf vset(float x) { return vdupq_n_f32(x); }
ML_INLINE vf vload(const float *p) { return vld1q_f32(p); }
ML_INLINE void vstore(float *p, vf x) { vst1q_f32(p, x); }
ML_INLINE vf vadd(vf a, vf b) { return vaddq_f32(a, b); }
ML_INLINE vf vsub(vf a, vf b) { return vsubq_f32(a, b); }
ML_INLINE vf vmul(vf a, vf b) { return vmulq_f32(a, b); }
ML_INLINE vf vdiv(vf a, vf b) { return vdivq_f32(a, b); }
ML_INLINE vf vsqrt(vf x) { return vsqrtq_f32(x); }
ML_INLINE vf vmin(vf a, vf b) { return vminq_f32(a, b); }
ML_INLINE vf vmax(vf a, vf b) { return vmaxq_f32(a, b); }
ML_INLINE vf vfma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
ML_INLINE vf vround(vf x) { return vrndnq_f32(x); }
ML_INLINE vf vbf16(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
ML_INLINE vf vf16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
ML_INLINE vf vint8(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, sizeof four);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
}
ML_INLINE int32x4_t vint(vf x) { return vcvtnq_s32_f32(x); }
ML_INLINE vf vpow2(vf n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vint(n), vdupq_n_s32(127)), 23)); }
typedef uint32x4_t vm;
ML_INLINE vm vless(vf a, vf b) { return vcltq_f32(a, b); }
ML_INLINE vm vboth(vm a, vm b) { return vandq_u32(a, b); }
ML_INLINE vf vpick(vm mask, vf yes, vf no) { return vbslq_f32(mask, yes, no); }
ML_INLINE vm vbits(uint32_t bits) {
    const uint32_t lanes[4] = {1, 2, 4, 8};
    return vtstq_u32(vdupq_n_u32(bits), vld1q_u32(lanes));
}
ML_INLINE float vtop(vf x) { return vmaxvq_f32(x); }
#else
#error "no vectors for this instruction set"
#endif

ML_INLINE float bf16_to_float(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}

// To nearest, ties to even, as torch rounds. NaN stays NaN.
ML_INLINE uint16_t float_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The lanes added up, always in the same order: halves, then their halves.
ML_INLINE float vsum(vf x) {
    float lane[VW];
    vstore(lane, x);
    for (int n = VW / 2; n; n /= 2)
        for (int i = 0; i < n; i++) lane[i] += lane[i + n];
    return lane[0];
}

// e^x for x <= 88, 0 below -87.3, NaN for NaN: Cephes' polynomial of degree 5 after range reduction, error under 2 ulp.
ML_INLINE vf vexp(vf x) {
    vf low = vset(-87.3f);
    vf safe = vmax(low, x); // x's NaN is the second operand, which x86's max returns
    vf n = vround(vmul(safe, vset(1.44269504f)));
    vf r = vfma(n, vset(-0.693359375f), safe);
    r = vfma(n, vset(2.12194440e-4f), r);
    vf p = vset(1.9875691500e-4f);
    p = vfma(p, r, vset(1.3981999507e-3f));
    p = vfma(p, r, vset(8.3334519073e-3f));
    p = vfma(p, r, vset(4.1665795894e-2f));
    p = vfma(p, r, vset(1.6666665459e-1f));
    p = vfma(p, r, vset(5.0000001201e-1f));
    p = vfma(p, vmul(r, r), vadd(r, vset(1.0f)));
    return vmul(p, vpow2(n));
}
