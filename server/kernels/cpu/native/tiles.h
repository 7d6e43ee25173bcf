// The tiles of AMX: eight registers of up to 16 rows of 64 bytes, which a thread gives a shape before it uses them and
// gives back after. A processor without them plays them in the tests, in plain C++ (tiles_emulated.h there).
#pragma once
#include "abi.h"
#include "simd.h"

// What LDTILECFG reads.
typedef struct {
    uint8_t palette, first_row, reserved[14];
    uint16_t bytes[16]; // of a row of each tile
    uint8_t rows[16];
} ml_tile_shapes;

#if defined(ML_EMULATE_TILES)
#include "tiles_emulated.h"
#else
#define tiles_shape(shapes) _tile_loadconfig(shapes)
#define tiles_release() _tile_release()
#define tile_zero(tile) _tile_zero(tile)
#define tile_load(tile, from, stride) _tile_loadd(tile, from, stride)
#define tile_store(tile, to, stride) _tile_stored(tile, to, stride)
// sums[m][n] += Σ_k u[m][k] w[k / 4][4n + k % 4], unsigned by signed bytes.
#define tile_dot(sums, u, w) _tile_dpbusd(sums, u, w)
#endif

// The compilers' forms don't say which memory they read.
#define tiles_see_memory(p) __asm__ volatile("" : : "r"(p) : "memory")
