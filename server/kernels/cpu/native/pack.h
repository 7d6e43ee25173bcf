// Loading: matrices of checkpoints brought into the layout of ml_matrix, a block of 32 outputs at a time.
//
// A block is first spread out as bytes, [32][padded_in] in the order of its inputs, then stored in words. Scales are
// divided by the matrix's gain, a power of two, and rounded to f16: what is below f16's least then becomes 0.
#pragma once
#include <float.h>
#include <math.h>

#include "abi.h"
#include "quantize.h"
#include "team.h"

// Values that add nothing, per source: what padding is filled with.
ML_INLINE uint8_t nothing_of(const ml_source *s, const ml_matrix *m) {
    if (s->form == ML_FROM_NF4) return 7;
    return m->kind == ML_TABLE4 ? 8 : 0;
}

ML_INLINE uint16_t float_to_f16(float x) {
#if defined(__F16C__)
    return (uint16_t)_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    __fp16 half = (__fp16)x;
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
#endif
}

ML_INLINE float f16_to_float(uint16_t bits) {
    uint16_t some[VW] = {bits};
    float wide[VW];
    vstore(wide, vf16(some));
    return wide[0];
}

// [out][in] codes, two to a byte, the first in the high half.
static void read_nf4(const ml_source *s, int32_t output, uint8_t *codes) {
    int64_t first = (int64_t)output * s->in;
    const uint8_t *pairs = (const uint8_t *)s->codes + first / 2;
    int32_t i = 0;
    if (first % 2) codes[i++] = *pairs++ & 15;
    for (; i + 1 < s->in; i += 2, pairs++) {
        codes[i] = *pairs >> 4;
        codes[i + 1] = *pairs & 15;
    }
    if (i < s->in) codes[i] = *pairs >> 4;
}

// int32 [in * bits / 32][out]: codes packed along in, lowest bits first. Those of 8 bits are stored less 128.
static void read_gptq(const ml_source *s, int32_t output, uint8_t *codes) {
    const uint32_t *words = (const uint32_t *)s->codes + output;
    int32_t each = 32 / s->bits;
    for (int32_t i = 0; i < s->in; i += each) {
        uint32_t word = words[(int64_t)(i / each) * s->out];
        if (s->bits == 4) {
            for (int32_t k = 0; k < 8; k++) codes[i + k] = word >> (4 * k) & 15;
        } else {
            word ^= 0x80808080;
            memcpy(codes + i, &word, 4);
        }
    }
}

// int32 [in][out / 8]: eight columns a word, in the order 0 2 4 6 1 3 5 7 from the lowest bits.
static void read_awq(const ml_source *s, int32_t output, uint8_t *codes) {
    static const int8_t place[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    const uint32_t *words = (const uint32_t *)s->codes + output / 8;
    int32_t shift = 4 * place[output % 8];
    for (int32_t i = 0; i < s->in; i++) codes[i] = words[(int64_t)i * (s->out / 8)] >> shift & 15;
}

// The codes of an output in the packed order, `row` [in] being memory for them in the source's.
static void read_output(const ml_source *s, const ml_matrix *m, int32_t output, uint8_t *row, uint8_t *codes) {
    uint8_t nothing = nothing_of(s, m);
    uint8_t *to = m->order ? row : codes;
    switch (s->form) {
    case ML_FROM_NF4: read_nf4(s, output, to); break;
    case ML_FROM_GPTQ: read_gptq(s, output, to); break;
    case ML_FROM_AWQ: read_awq(s, output, to); break;
    default: memcpy(to, (const uint8_t *)s->codes + (int64_t)output * s->in, (size_t)s->in); break;
    }
    if (m->order)
        for (int32_t i = 0; i < m->padded_in; i++) codes[i] = m->order[i] < 0 ? nothing : row[m->order[i]];
    else
        memset(codes + m->in, nothing, (size_t)(m->padded_in - m->in));
}

// Words of a block: word w of lane l goes to byte 4l of 64, both halves of a byte or of 128 bytes being filled.
static void store_nibbles(const uint8_t *codes, int32_t inputs, uint8_t *block) {
    for (int32_t lane = 0; lane < 16; lane++) {
        const uint8_t *low = codes + (int64_t)lane * inputs, *high = low + (int64_t)16 * inputs;
        for (int32_t i = 0; i < inputs; i += 4) {
            uint32_t a, b;
            memcpy(&a, low + i, 4);
            memcpy(&b, high + i, 4);
            a |= b << 4;
            memcpy(block + (int64_t)i * 16 + lane * 4, &a, 4);
        }
    }
}

static void store_words(const uint8_t *codes, int32_t inputs, uint8_t *block) {
    for (int32_t lane = 0; lane < 32; lane++)
        for (int32_t i = 0; i < inputs; i += 4)
            memcpy(block + (int64_t)i * 32 + lane * 4, codes + (int64_t)lane * inputs + i, 4);
}

static int16_t sum_values(const ml_matrix *m, const uint8_t *codes) {
    int32_t sum = 0;
    for (int32_t i = 0; i < m->group; i++) sum += m->table ? m->table[codes[i]] : (int8_t)codes[i];
    return (int16_t)sum;
}

// Scales, sums and zero points of one output, whose codes are given; of none (output < 0) all add nothing.
static void store_groups(const ml_source *s, const ml_matrix *m, int32_t block, int32_t lane, const uint8_t *codes) {
    int32_t groups = m->padded_in / m->group, output = block * 32 + lane;
    for (int32_t g = 0; g < groups; g++) {
        int64_t at = ((int64_t)block * groups + g) * 32 + lane;
        int32_t from = output < m->out ? s->groups[g] : -1;
        int64_t found = (int64_t)output * s->of_output + (int64_t)from * s->of_group;
        float scale = from < 0 ? 0.0f : s->scales[found] * s->scaled / m->gain;
        ((uint16_t *)m->scales)[at] = float_to_f16(scale);
        ((int16_t *)m->sums)[at] = sum_values(m, codes + (int64_t)g * m->group);
        if (m->zeros) ((int16_t *)m->zeros)[at] = from < 0 ? 0 : s->zeros[found];
    }
}

static void pack_codes(const ml_source *s, const ml_matrix *m, int32_t block, uint8_t *memory) {
    uint8_t *row = memory + (int64_t)32 * m->padded_in;
    for (int32_t lane = 0; lane < 32; lane++) {
        uint8_t *codes = memory + (int64_t)lane * m->padded_in;
        if (block * 32 + lane < m->out) read_output(s, m, block * 32 + lane, row, codes);
        else memset(codes, nothing_of(s, m), (size_t)m->padded_in);
        store_groups(s, m, block, lane, codes);
    }
    int64_t bytes = (int64_t)m->padded_in * (m->kind == ML_TABLE4 ? 16 : 32);
    uint8_t *to = (uint8_t *)m->codes + block * bytes;
    if (m->kind == ML_TABLE4) store_nibbles(memory, m->padded_in, to);
    else store_words(memory, m->padded_in, to);
}

// bf16 [out][in] to pairs of inputs.
static void pack_dense(const ml_source *s, const ml_matrix *m, int32_t block) {
    uint16_t *to = (uint16_t *)m->codes + (int64_t)block * m->padded_in * 32;
    memset(to, 0, (size_t)m->padded_in * 64);
    for (int32_t lane = 0; lane < 32 && block * 32 + lane < m->out; lane++) {
        const uint16_t *from = (const uint16_t *)s->codes + (int64_t)(block * 32 + lane) * m->in;
        int32_t i = 0;
        for (; i + 1 < m->in; i += 2) memcpy(to + (int64_t)i * 32 + lane * 2, from + i, 4);
        if (i < m->in) to[(int64_t)i * 32 + lane * 2] = from[i];
    }
}

typedef struct {
    const ml_source *source;
    const ml_matrix *matrix;
    int32_t failed;
} ml_packing;

static void pack_program(ml_team team, void *argument) {
    ml_packing *a = (ml_packing *)argument;
    size_t bytes = (size_t)a->matrix->padded_in * 33 + 64;
    uint8_t *memory = (uint8_t *)ml_own_scratch(team, bytes);
    if (!memory) __atomic_store_n(&a->failed, 1, __ATOMIC_RELAXED);
    for (int64_t block; memory && (block = ml_take(team)) < a->matrix->blocks;) {
        if (a->matrix->kind == ML_BF16) pack_dense(a->source, a->matrix, (int32_t)block);
        else pack_codes(a->source, a->matrix, (int32_t)block, memory);
    }
}

// Fill codes, scales, sums and zeros of `matrix`, all else of which is set. Returns 0, or 1 if there was no memory.
static int32_t pack(ml_pool *pool, const ml_source *source, const ml_matrix *matrix) {
    ml_packing a = {source, matrix, 0};
    ml_run(pool, pack_program, &a);
    return a.failed;
}

#define ML_PACK_EXPORTS ML_EXPORT(pack),
