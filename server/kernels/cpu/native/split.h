// Bytes whose halves lie apart, so that a matrix can be read by its high halves alone: what is added to each before it is
// split.
//
// A value v of input i is kept as v + ml_dither(i), a number from -8 to 7 that depends on nothing but i. The low half of
// that, a number from 0 to 15, is then as likely each of them, whatever v is, and independent of the other inputs': what
// is left out when the high halves alone are multiplied is noise about which search.h knows all.
#pragma once
#include <string.h>

#include "simd.h"

#define ML_DITHERED 8192 // inputs after which the numbers come again

// Values are at most 119 in magnitude (pack.py's SPLIT_MOST), so that no sum leaves a signed byte.

struct ml_dithers {
    int8_t of_input[ML_DITHERED];
    constexpr ml_dithers() : of_input() {
        for (uint32_t i = 0; i < ML_DITHERED; i++) {
            // Two rounds of multiplying and shifting stir all of i's bits into the four that are taken.
            uint32_t x = (i + 1) * 0x9e3779b9u;
            x = (x ^ x >> 16) * 0x7feb352du;
            x = (x ^ x >> 15) * 0x846ca68bu;
            of_input[i] = (int8_t)((int32_t)(x >> 28) - 8);
        }
    }
};
alignas(64) static constexpr ml_dithers ml_dither_table;

ML_INLINE int32_t ml_dither(int32_t input) { return ml_dither_table.of_input[input % ML_DITHERED]; }

// Those of a word's four inputs, as they lie in memory.
ML_INLINE int32_t ml_dither_word(int32_t word) {
    int32_t four;
    memcpy(&four, ml_dither_table.of_input + word * 4 % ML_DITHERED, 4);
    return four;
}
