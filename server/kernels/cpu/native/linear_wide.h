// Matrices of 4 and 8 bits times activations of bfloat16: what linear_block() does where a matrix asks for them.
//
// Codes become pairs of bfloat16 in registers; with many rows a block's once, in memory. A row's sum has one order,
// whatever the tile: within a group two chains of pairs, one for each pair of a word, which are added up; groups from
// first to last by fma. A zero point takes its share of the group's activations away from that.
#pragma once
#include "linear.h"

// Rows from which on a block is unpacked once. Where registers are wide and many, 4 bits are unpacked as fast as pairs of four
// times their size are read.
#define ML_WIDE_UNPACK_BYTES 12
#define ML_WIDE_UNPACK_CODES (ML_WIDE_ROWS < 4 ? 8 : INT32_MAX)
#define ML_WIDE_AHEAD 4096     // bytes of 4-bit codes that are asked for before they are wanted
#define ML_WIDE_WORD (32 * 8)  // bytes of an unpacked word

enum { WIDE_CODES, WIDE_BYTES, WIDE_PAIRS };

template <int FORM>
ML_INLINE void load_pairs_of(const ml_part *p, vvalues values, int32_t word, int column, vr pair[2][2]) {
    if (FORM == WIDE_CODES) {
        unpack_codes(p->codes + (int64_t)word * 64 + column * 4, values, pair[0], pair[1]);
    } else if (FORM == WIDE_BYTES) {
        const int8_t *bytes = (const int8_t *)p->codes + (int64_t)word * 128 + column * 4;
        unpack_bytes(bytes, pair[0]);
        unpack_bytes(bytes + 64, pair[1]);
    } else {
        const uint8_t *from = p->codes + (int64_t)word * ML_WIDE_WORD + column * 4;
        for (int half = 0; half < 2; half++)
            for (int i = 0; i < 2; i++) pair[half][i] = load_raw(from + half * 128 + i * 64);
    }
}

ML_INLINE void ask_for_codes(const ml_part *p, int32_t word) {
    const int32_t words = p->groups * p->words, later = word + ML_WIDE_AHEAD / 64;
    __builtin_prefetch(later < words ? p->codes + (int64_t)later * 64 : p->next + (int64_t)(later - words) * 64);
}

// The dots of group g: R rows of two vectors of outputs.
template <int R, int FORM>
ML_INLINE void wide_group(const ml_part *p, vvalues values, const ml_activation *x, int64_t stride, int32_t g, int column,
                          vf dots[R][2]) {
    vf chain[R][2][2];
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) chain[r][half][0] = chain[r][half][1] = vzero();
    for (int32_t word = g * p->words; word < (g + 1) * p->words; word++) {
        vr pair[2][2];
        if (FORM == WIDE_CODES) ask_for_codes(p, word);
        load_pairs_of<FORM>(p, values, word, column, pair);
        for (int i = 0; i < 2; i++)
            for (int half = 0; half < 2; half++) {
                vp w = ready(pair[half][i]);
                for (int r = 0; r < R; r++)
                    chain[r][half][i] = dot_pair(chain[r][half][i], load_pair(x + r * stride + word * 4 + i * 2), w);
            }
    }
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) dots[r][half] = vadd(chain[r][half][0], chain[r][half][1]);
}

template <int R, int FORM, int ZEROS>
ML_INLINE void wide_columns(const ml_part *p, vvalues values, const ml_quantized *q, int64_t row, int column, float *y,
                            int64_t stride) {
    const ml_activation *x = q->wide + row * q->stride;
    const float *sum = q->sum + row * q->groups;
    vf total[R][2];
    for (int r = 0; r < R; r++) total[r][0] = total[r][1] = vzero();
    for (int32_t g = 0; g < p->groups; g++) {
        vf dots[R][2];
        if (p->more) ask_for_more(p->more);
        wide_group<R, FORM>(p, values, x, q->stride, g, column, dots);
        for (int half = 0; half < 2; half++) {
            const int64_t at = g * 32 + half * 16 + column;
            vf weight = vf16(p->scales + at), zero = ZEROS ? vsub(vzero(), load_whole(p->zeros + at)) : vzero();
            for (int r = 0; r < R; r++) {
                if (ZEROS) dots[r][half] = vfma(zero, vset(sum[r * q->groups + g]), dots[r][half]);
                total[r][half] = vfma(dots[r][half], weight, total[r][half]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) {
            int at = half * 16 + column;
            vstore(y + r * stride + at, vfma(total[r][half], vset(p->gain), vload(p->bias + at)));
        }
}

template <int R, int FORM, int ZEROS>
static void wide_tile(const ml_part *p, vvalues values, const ml_quantized *q, int64_t row, float *y, int64_t stride) {
    for (int column = 0; column < 16; column += VW)
        wide_columns<R, FORM, ZEROS>(p, values, q, row, column, y, stride);
}

template <int R, int FORM>
ML_INLINE void wide_of(int count, const ml_part *p, vvalues values, const ml_quantized *q, int64_t row, float *y,
                       int64_t stride) {
    if (count == R && p->zeros) wide_tile<R, FORM, 1>(p, values, q, row, y, stride);
    else if (count == R) wide_tile<R, FORM, 0>(p, values, q, row, y, stride);
    else if constexpr (R > 1) wide_of<R - 1, FORM>(count, p, values, q, row, y, stride);
}

template <int FORM> static void unpack_pairs(const ml_part *p, vvalues values, uint8_t *pairs) {
    for (int32_t word = 0; word < p->groups * p->words; word++) {
        if (FORM == WIDE_CODES) ask_for_codes(p, word);
        for (int column = 0; column < 16; column += VW) {
            vr pair[2][2];
            uint8_t *to = pairs + (int64_t)word * ML_WIDE_WORD + column * 4;
            load_pairs_of<FORM>(p, values, word, column, pair);
            for (int half = 0; half < 2; half++)
                for (int i = 0; i < 2; i++) store_raw(to + half * 128 + i * 64, pair[half][i]);
        }
    }
}

// See linear_block(), for a matrix whose activations are bfloat16 and whose part `p` is.
static void wide_block(const ml_matrix *m, ml_part *p, const ml_quantized *q, int64_t rows, int32_t left, float *y,
                       int64_t stride, void *own) {
    static const uint16_t none[16] = {0};
    vvalues values = load_values(m->kind == ML_TABLE4 ? m->values : none);
    int form = m->kind == ML_TABLE4 ? WIDE_CODES : WIDE_BYTES;
    if (rows > (form == WIDE_CODES ? ML_WIDE_UNPACK_CODES : ML_WIDE_UNPACK_BYTES)) {
        if (form == WIDE_CODES) unpack_pairs<WIDE_CODES>(p, values, (uint8_t *)own);
        else unpack_pairs<WIDE_BYTES>(p, values, (uint8_t *)own);
        p->codes = (const uint8_t *)own;
        form = WIDE_PAIRS;
    }
    int64_t tiles = (rows + ML_WIDE_ROWS - 1) / ML_WIDE_ROWS;
    for (int64_t t = 0; t < tiles; t++) {
        int64_t row = rows * t / tiles;
        int count = (int)(rows * (t + 1) / tiles - row);
        float edge[ML_WIDE_ROWS * 32];
        float *to = left < 32 ? edge : y + row * stride;
        int64_t apart = left < 32 ? 32 : stride;
        if (form == WIDE_CODES) wide_of<ML_WIDE_ROWS, WIDE_CODES>(count, p, values, q, row, to, apart);
        else if (form == WIDE_BYTES) wide_of<ML_WIDE_ROWS, WIDE_BYTES>(count, p, values, q, row, to, apart);
        else wide_of<ML_WIDE_ROWS, WIDE_PAIRS>(count, p, values, q, row, to, apart);
        if (left < 32)
            for (int r = 0; r < count; r++) memcpy(y + (row + r) * stride, edge + r * 32, (size_t)left * sizeof(float));
    }
}
