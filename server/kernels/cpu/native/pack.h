// Loading: matrices of checkpoints brought into the layout of ml_matrix, a block of 32 outputs at a time.
//
// A block is first spread out as bytes, [32][padded_in] in the order of its inputs, then stored in words. Scales are
// divided by the matrix's gain, a power of two, and rounded to f16: what is below f16's least then becomes 0.
#pragma once
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "abi.h"
#include "linear.h"
#include "team.h"

// Raised whenever matrices are laid out otherwise than before: what was kept of them in files isn't read then.
#define ML_LAYOUT 2

static int32_t layout(ml_pool *) { return ML_LAYOUT; }

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

// A lane's codes lie `pitch` bytes behind those of the lane before: off a power of two, so that they share the cache.
ML_INLINE int64_t pitch_of(const ml_matrix *m) { return m->padded_in + 64; }

// [out][in] codes, two to a byte, the first in the high half.
static void read_nf4(const ml_source *s, int32_t output, uint8_t *__restrict codes) {
    int64_t first = (int64_t)output * s->in;
    const uint8_t *pairs = (const uint8_t *)s->codes + first / 2;
    int32_t odd = (int32_t)(first % 2), whole = (s->in - odd) / 2;
    if (odd) *codes++ = *pairs++ & 15;
    for (int32_t i = 0; i < whole; i++) {
        codes[2 * i] = pairs[i] >> 4;
        codes[2 * i + 1] = pairs[i] & 15;
    }
    if ((s->in - odd) % 2) codes[2 * whole] = pairs[whole] >> 4;
}

// Eight codes of four bits, the lowest first, as bytes.
ML_INLINE uint64_t spread(uint32_t word) {
    uint64_t wide = word;
    wide = (wide | wide << 16) & 0x0000ffff0000ffff;
    wide = (wide | wide << 8) & 0x00ff00ff00ff00ff;
    return (wide | wide << 4) & 0x0f0f0f0f0f0f0f0f;
}

// int32 [in * bits / 32][out]: codes packed along in, lowest bits first. Those of 8 bits are stored less 128.
static void read_gptq(const ml_source *s, int32_t output, int32_t lanes, int64_t pitch, uint8_t *codes) {
    int32_t each = 32 / s->bits;
    for (int32_t i = 0; i < s->in; i += each) {
        const uint32_t *words = (const uint32_t *)s->codes + (int64_t)(i / each) * s->out + output;
        for (int32_t lane = 0; lane < lanes; lane++) {
            uint64_t bytes = s->bits == 4 ? spread(words[lane]) : words[lane] ^ 0x80808080;
            memcpy(codes + lane * pitch + i, &bytes, (size_t)each);
        }
    }
}

// int32 [in][out / 8]: eight outputs a word, in the order 0 2 4 6 1 3 5 7 from the lowest bits. Four inputs at a time.
static void read_awq(const ml_source *s, int32_t output, int32_t lanes, int64_t pitch, uint8_t *codes) {
    static const int8_t place[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    for (int32_t i = 0; i < s->in; i += 4)
        for (int32_t lane = 0; lane < lanes; lane += 8) {
            uint8_t four[4][8];
            for (int k = 0; k < 4; k++) {
                uint64_t bytes = spread(((const uint32_t *)s->codes)[(int64_t)(i + k) * (s->out / 8) + (output + lane) / 8]);
                memcpy(four[k], &bytes, 8);
            }
            for (int o = 0; o < 8; o++)
                for (int k = 0; k < 4; k++) codes[(lane + o) * pitch + i + k] = four[k][place[o]];
        }
}

// Spread a block out, its inputs in the packed order; `row` [in] is memory for those of one output in the source's.
static void read_block(const ml_source *s, const ml_matrix *m, int32_t block, uint8_t *row, uint8_t *codes) {
    int64_t pitch = pitch_of(m);
    int32_t first = block * 32, lanes = m->out - first < 32 ? m->out - first : 32;
    uint8_t nothing = nothing_of(s, m);
    if (s->form == ML_FROM_GPTQ) read_gptq(s, first, lanes, pitch, codes);
    if (s->form == ML_FROM_AWQ) read_awq(s, first, lanes, pitch, codes);
    for (int32_t lane = 0; lane < 32; lane++, codes += pitch) {
        if (lane < lanes && s->form == ML_FROM_NF4) read_nf4(s, first + lane, codes);
        if (lane < lanes && s->form == ML_FROM_INT8)
            memcpy(codes, (const uint8_t *)s->codes + (int64_t)(first + lane) * s->in, (size_t)s->in);
        int32_t filled = lane < lanes ? m->in : 0;
        memset(codes + filled, nothing, (size_t)(m->padded_in - filled));
        if (!m->order || !filled) continue;
        memcpy(row, codes, (size_t)m->in);
        for (int32_t i = 0; i < m->padded_in; i++) codes[i] = m->order[i] < 0 ? nothing : row[m->order[i]];
    }
}

// Words of a block: word w of lane l goes to byte 4l of 64, both halves of a byte or of 128 bytes being filled. By 64
// inputs, which are written whole while they are near.
static void store_codes(const ml_matrix *m, const uint8_t *codes, uint8_t *block) {
    int64_t pitch = pitch_of(m);
    for (int32_t first = 0; first < m->padded_in; first += 64)
        for (int32_t lane = 0; lane < (m->kind == ML_TABLE4 ? 16 : 32); lane++)
            for (int32_t i = first; i < first + 64; i += 4) {
                uint32_t low, high;
                memcpy(&low, codes + lane * pitch + i, 4);
                if (m->kind == ML_TABLE4) {
                    memcpy(&high, codes + (lane + 16) * pitch + i, 4);
                    low |= high << 4;
                }
                memcpy(block + (int64_t)i * (m->kind == ML_TABLE4 ? 16 : 32) + lane * 4, &low, 4);
            }
}

// The same of bytes in halves: word w of lane l goes to byte 4l of 64 of both planes, lane 16 + l beside it.
static void store_halves(const ml_matrix *m, const uint8_t *codes, int32_t block) {
    const int64_t pitch = pitch_of(m), at = (int64_t)block * m->padded_in * 16;
    uint8_t *high = (uint8_t *)m->codes + at, *low = high + (int64_t)m->blocks * m->padded_in * 16;
    for (int32_t first = 0; first < m->padded_in; first += 64)
        for (int32_t lane = 0; lane < 16; lane++)
            for (int32_t i = first; i < first + 64; i++) {
                const uint8_t one = (uint8_t)(codes[lane * pitch + i] + ml_dither(i));
                const uint8_t other = (uint8_t)(codes[(lane + 16) * pitch + i] + ml_dither(i));
                const int64_t byte = (int64_t)(i / 4) * 64 + lane * 4 + i % 4;
                high[byte] = (uint8_t)(one >> 4 | (other & 0xf0));
                low[byte] = (uint8_t)((one & 15) | other << 4);
            }
}

// The sums of a block's groups: its products with ones.
static void store_sums(const ml_matrix *m, int32_t block) {
    static const uint8_t ones[4] = {1, 1, 1, 1};
    float bias[32];
    ml_part p = part_of(m, block, bias);
    for (int32_t g = 0; g < p.groups; g++)
        for (int column = 0; column < 16; column += VW) {
            vi sums[2] = {vi_zero(), vi_zero()};
            for (int32_t word = g * p.words; word < (g + 1) * p.words; word++) {
                vw low, high;
                if (m->kind == ML_TABLE4) load_weights<NIBBLES>(&p, word, column, &low, &high);
                else if (m->kind == ML_SPLIT8) load_weights<HALVES>(&p, word, column, &low, &high);
                else load_weights<BYTES>(&p, word, column, &low, &high);
                sums[0] = dot(sums[0], load_word(ones), low);
                sums[1] = dot(sums[1], load_word(ones), high);
            }
            for (int half = 0; half < 2; half++) {
                int32_t wide[VW];
                memcpy(wide, &sums[half], sizeof wide);
                for (int i = 0; i < VW; i++) ((int16_t *)p.sums)[g * 32 + half * 16 + column + i] = (int16_t)wide[i];
            }
        }
}

// Scales and zero points of a block; those of outputs and inputs that aren't there are 0.
static void store_scales(const ml_source *s, const ml_matrix *m, int32_t block) {
    int32_t groups = m->padded_in / m->group;
    for (int32_t g = 0; g < groups; g++)
        for (int32_t lane = 0; lane < 32; lane++) {
            int64_t at = ((int64_t)block * groups + g) * 32 + lane;
            int32_t output = block * 32 + lane, from = output < m->out ? s->groups[g] : -1;
            int64_t found = (int64_t)output * s->of_output + (int64_t)from * s->of_group;
            float scale = from < 0 ? 0.0f : s->scales[found] * s->scaled / m->gain;
            ((uint16_t *)m->scales)[at] = float_to_f16(scale);
            if (m->zeros) ((int16_t *)m->zeros)[at] = from < 0 ? 0 : s->zeros[found];
        }
}

static void pack_codes(const ml_source *s, const ml_matrix *m, int32_t block, uint8_t *memory) {
    int64_t bytes = (int64_t)m->padded_in * (m->kind == ML_TABLE4 ? 16 : 32);
    read_block(s, m, block, memory + 32 * pitch_of(m), memory);
    if (m->kind == ML_SPLIT8) store_halves(m, memory, block);
    else store_codes(m, memory, (uint8_t *)m->codes + block * bytes);
    store_sums(m, block);
    store_scales(s, m, block);
}

// bf16 [out][in] to pairs of inputs, by 64 inputs.
static void pack_dense(const ml_source *s, const ml_matrix *m, int32_t block) {
    uint16_t *to = (uint16_t *)m->codes + (int64_t)block * m->padded_in * 32;
    int32_t first = block * 32, lanes = m->out - first < 32 ? m->out - first : 32;
    for (int32_t tile = 0; tile < m->padded_in; tile += 64) {
        int32_t end = tile + 64 < m->in ? tile + 64 : m->in;
        if (lanes < 32 || end < tile + 64) memset(to + (int64_t)tile * 32, 0, 64 * 64);
        for (int32_t lane = 0; lane < lanes; lane++) {
            const uint16_t *from = (const uint16_t *)s->codes + (int64_t)(first + lane) * m->in;
            int32_t i = tile;
            for (; i + 1 < end; i += 2) memcpy(to + (int64_t)i * 32 + lane * 2, from + i, 4);
            if (i < end) to[(int64_t)i * 32 + lane * 2] = from[i];
        }
    }
}

typedef struct {
    const ml_source *source;
    const ml_matrix *matrix;
    int32_t failed;
} ml_packing;

static void pack_program(ml_team team, void *argument) {
    ml_packing *a = (ml_packing *)argument;
    size_t bytes = (size_t)pitch_of(a->matrix) * 33;
    uint8_t *memory = (uint8_t *)ml_own_scratch(team, bytes);
    if (!memory) __atomic_store_n(&a->failed, 1, __ATOMIC_RELAXED);
    for (int64_t block; memory && (block = ml_take(team)) < a->matrix->blocks;) {
        if (a->matrix->kind == ML_BF16) pack_dense(a->source, a->matrix, (int32_t)block);
        else pack_codes(a->source, a->matrix, (int32_t)block, memory);
    }
}

// Ask for huge pages where whole ones lie within the codes: fewer faults now, and fewer addresses to look up later.
static void use_huge_pages(const ml_matrix *m) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = (uintptr_t)2 << 20;
    uintptr_t first = ((uintptr_t)m->codes + page - 1) / page * page;
    // Both planes of SPLIT8 are as many bytes as INT8's.
    const uintptr_t bytes = 16u << (m->kind == ML_SPLIT8 ? ML_INT8 : m->kind);
    uintptr_t end = ((uintptr_t)m->codes + (uintptr_t)m->blocks * m->padded_in * bytes) / page * page;
    if (first < end) madvise((void *)first, end - first, MADV_HUGEPAGE);
#else
    (void)m;
#endif
}

// Fill codes, scales, sums and zeros of `matrix`, all else of which is set. Returns 0, or 1 if there was no memory.
static int32_t pack(ml_pool *pool, const ml_source *source, const ml_matrix *matrix) {
    ml_packing a = {source, matrix, 0};
    use_huge_pages(matrix);
    ml_run(pool, pack_program, &a);
    return a.failed;
}

#define ML_PACK_EXPORTS ML_EXPORT(layout), ML_EXPORT(pack),
