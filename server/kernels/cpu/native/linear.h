// Matrices times rows, a block of 32 outputs at a time: y = sum over groups of scales * integer dot, then * gain + bias.
//
// A row's sum has one order, whatever the tile: integers within a group, groups from first to last by fma. The matrix is
// read once for up to ML_UNPACK rows; above that its block is unpacked once and read from a near cache.
#pragma once
#include "ask.h"
#include "quantize.h"
#include "split.h"
#include "team.h"

#if defined(__AMX_INT8__)
#define ML_BY_TILES 16 // rows from which on, and as many at a time as, products are AMX's
#endif
#define ML_UNPACK 64 // rows from which on a block of TABLE4 is unpacked to bytes
// Bytes that are asked for before they are wanted: the processor's own guesses come too late beside products of a few
// rows.
#define ML_AHEAD_BF16 8192

// A block: its part of each of the matrix's arrays.
typedef struct {
    const uint8_t *codes;
    const uint8_t *low; // SPLIT8: of the low halves
    const uint16_t *scales;
    const int16_t *sums, *zeros;
    const float *bias; // [32]
    vtable table;
    float gain;
    int32_t groups, words; // words of a group
    const uint8_t *next, *next_low; // codes that are read after these
    const uint8_t *ask;    // a tile's share of them, which it asks for,
    int32_t step;          // so many bytes with each word that it multiplies
    lora_asks *more;       // what else it asks for, or null
} ml_part;

enum { NIBBLES, BYTES, HALVES };

template <int FORM> ML_INLINE void load_weights(const ml_part *p, int32_t word, int column, vw *low, vw *high) {
    if (FORM == NIBBLES) {
        load_table4(p->codes + (int64_t)word * 64 + column * 4, p->table, low, high);
    } else if (FORM == HALVES) {
        const int64_t at = (int64_t)word * 64 + column * 4;
        load_split(p->codes + at, p->low + at, ml_dither_word(word), low, high);
    } else {
        const int8_t *bytes = (const int8_t *)p->codes + (int64_t)word * 128 + column * 4;
        *low = load_bytes(bytes);
        *high = load_bytes(bytes + 64);
    }
}

// R rows of two vectors of outputs: column .. and 16 + column ...
template <int R, int FORM, int ZEROS>
ML_INLINE void tile_columns(const ml_part *p, const ml_quantized *q, int64_t row, int column, float *y, int64_t stride) {
    const uint8_t *u = q->u + row * q->stride;
    const float *scale = q->scale + row * q->groups;
    const int32_t *fold = q->fold + row * q->groups;
    // One row waits for memory: weights are added up again rather than their sums read.
    constexpr int summed = R == 1 && ML_SUMS_ARE_CHEAP;
    static const uint8_t ONES[4] = {1, 1, 1, 1};
    const vx one = load_word(ONES);
    vf total[R][2];
    for (int r = 0; r < R; r++) total[r][0] = total[r][1] = vzero();
    for (int32_t g = 0; g < p->groups; g++) {
        const int16_t *sums = p->sums + g * 32 + column, *zeros = ZEROS ? p->zeros + g * 32 + column : nullptr;
        __builtin_prefetch(p->scales + (p->groups + g) * 32);
        if (!summed) __builtin_prefetch(p->sums + (p->groups + g) * 32);
        if (p->more) ask_for_more(p->more);
        vi pairs[2], dots[R][2], second[2] = {vi_zero(), vi_zero()}, added[2] = {vi_zero(), vi_zero()};
        if (summed) {
            dots[0][0] = dots[0][1] = vi_zero();
        } else {
            for (int half = 0; half < 2; half++) {
                pairs[half] = ZEROS ? load_pairs(sums + half * 16, zeros + half * 16) : load_sums(sums + half * 16);
                for (int r = 0; r < R; r++) dots[r][half] = start(pairs[half], fold[r * q->groups + g]);
            }
        }
#pragma GCC unroll 2
        for (int32_t k = 0; k < p->words; k += 2)
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; odd++) {
                int32_t word = g * p->words + k + odd;
                vw low, high;
                __builtin_prefetch(p->ask + word * p->step, 0, ML_FAR);
                load_weights<FORM>(p, word, column, &low, &high);
                if (summed) {
                    added[0] = dot(added[0], one, low);
                    added[1] = dot(added[1], one, high);
                }
                for (int r = 0; r < R; r++) {
                    vx x = load_word(u + (int64_t)r * q->stride + word * 4);
                    vi *sum = R == 1 && odd ? second : dots[r]; // two short chains instead of a long one
                    sum[0] = dot(sum[0], x, low);
                    sum[1] = dot(sum[1], x, high);
                }
            }
        if (R == 1)
            for (int half = 0; half < 2; half++) dots[0][half] = vi_add(dots[0][half], second[half]);
        if (summed)
            for (int half = 0; half < 2; half++) {
                pairs[half] = ZEROS ? with_zeros(added[half], zeros + half * 16) : vi_low(added[half]);
                dots[0][half] = vi_add(dots[0][half], start(pairs[half], fold[g]));
            }
        vf weight[2] = {vf16(p->scales + g * 32 + column), vf16(p->scales + g * 32 + 16 + column)};
        for (int r = 0; r < R; r++) {
            vf of_row = vset(scale[r * q->groups + g]);
            for (int half = 0; half < 2; half++)
                total[r][half] = vfma(vi_float(dots[r][half]), vmul(weight[half], of_row), total[r][half]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) {
            int at = half * 16 + column;
            vstore(y + r * stride + at, vfma(total[r][half], vset(p->gain), vload(p->bias + at)));
        }
}

template <int R, int FORM, int ZEROS>
static void tile(const ml_part *p, const ml_quantized *q, int64_t row, float *y, int64_t stride) {
    for (int column = 0; column < 16; column += VW) tile_columns<R, FORM, ZEROS>(p, q, row, column, y, stride);
}

// R rows times a block of BF16: even and odd inputs in a sum of their own, so that chains are half as long.
template <int R> ML_INLINE void dense_columns(const ml_part *p, const float *x, int32_t in, int column, float *y,
                                              int64_t stride) {
    const uint16_t *weights = (const uint16_t *)(const void *)p->codes + column * 2;
    vf even[R][2], odd[R][2];
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) even[r][half] = odd[r][half] = vzero();
    for (int32_t i = 0; i < in; i += 2) {
        vf of_even[2], of_odd[2];
        __builtin_prefetch(weights + (int64_t)i * 32 + ML_AHEAD_BF16 / 2);
        __builtin_prefetch(weights + (int64_t)i * 32 + ML_AHEAD_BF16 / 2 + 32);
        load_bf16(weights + (int64_t)i * 32, &of_even[0], &of_odd[0]);
        load_bf16(weights + (int64_t)i * 32 + 32, &of_even[1], &of_odd[1]);
        for (int r = 0; r < R; r++) {
            vf first = vset(x[(int64_t)r * in + i]);
            for (int half = 0; half < 2; half++) even[r][half] = vfma(of_even[half], first, even[r][half]);
            if (i + 1 == in) continue; // what lies behind is nobody's
            vf second = vset(x[(int64_t)r * in + i + 1]);
            for (int half = 0; half < 2; half++) odd[r][half] = vfma(of_odd[half], second, odd[r][half]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) {
            int at = half * 16 + column;
            vstore(y + r * stride + at, vadd(vadd(even[r][half], odd[r][half]), vload(p->bias + at)));
        }
}

template <int R>
static void dense_tile(const ml_part *p, const float *x, int32_t in, float *y, int64_t stride) {
    for (int column = 0; column < 16; column += VW) dense_columns<R>(p, x, in, column, y, stride);
}

#define ML_DENSE_TILE (ML_TILE < 6 ? 2 : 6) // sums of a tile must fit the registers

// Rows row .. row + count - 1 in one tile; count is at most ML_TILE, of BF16 ML_DENSE_TILE.
template <int R, int FORM, int ZEROS>
ML_INLINE void tile_of(int count, const ml_part *p, const ml_quantized *q, int64_t row, float *y, int64_t stride) {
    if (count == R) tile<R, FORM, ZEROS>(p, q, row, y, stride);
    else if constexpr (R > 1) tile_of<R - 1, FORM, ZEROS>(count, p, q, row, y, stride);
}

template <int R>
ML_INLINE void dense_of(int count, const ml_part *p, const float *x, int32_t in, float *y, int64_t stride) {
    if (count == R) dense_tile<R>(p, x, in, y, stride);
    else if constexpr (R > 1) dense_of<R - 1>(count, p, x, in, y, stride);
}

ML_INLINE void some_rows(const ml_part *p, int form, const ml_quantized *q, int64_t row, int count, float *y,
                         int64_t stride) {
    if (form == HALVES) tile_of<ML_TILE, HALVES, 0>(count, p, q, row, y, stride);
    else if (form == NIBBLES && p->zeros) tile_of<ML_TILE, NIBBLES, 1>(count, p, q, row, y, stride);
    else if (form == NIBBLES) tile_of<ML_TILE, NIBBLES, 0>(count, p, q, row, y, stride);
    else if (p->zeros) tile_of<ML_TILE, BYTES, 1>(count, p, q, row, y, stride);
    else tile_of<ML_TILE, BYTES, 0>(count, p, q, row, y, stride);
}

template <int FORM> static void unpack_block(const ml_part *p, int8_t *bytes) {
    for (int32_t word = 0; word < p->groups * p->words; word++)
        for (int column = 0; column < 16; column += VW) {
            vw low, high;
            load_weights<FORM>(p, word, column, &low, &high);
            store_bytes(bytes + (int64_t)word * 128 + column * 4, low);
            store_bytes(bytes + (int64_t)word * 128 + 64 + column * 4, high);
        }
}

static const uint8_t *codes_of(const ml_matrix *m, int64_t block) {
    const int64_t half_bytes = m->kind == ML_INT8 ? 2 : m->kind == ML_BF16 ? 4 : 1;
    return (const uint8_t *)m->codes + block * m->padded_in * 16 * half_bytes;
}

// SPLIT8: a block's low halves.
static const uint8_t *low_halves_of(const ml_matrix *m, int64_t block) { return codes_of(m, m->blocks + block); }

ML_INLINE ml_part part_of(const ml_matrix *m, int32_t block, float *bias) {
    ml_part p;
    memset(&p, 0, sizeof p);
    int32_t left = m->out - block * 32;
    for (int i = 0; i < 32; i++) bias[i] = m->bias && i < left ? m->bias[block * 32 + i] : 0.0f;
    p.bias = bias;
    p.gain = m->gain;
    p.codes = codes_of(m, block);
    p.next = codes_of(m, block + 1);
    if (m->kind == ML_SPLIT8) p.low = low_halves_of(m, block), p.next_low = low_halves_of(m, block + 1);
    if (m->kind == ML_BF16) return p;
    p.words = m->group / 4;
    p.groups = m->padded_in / m->group;
    int64_t at = (int64_t)block * p.groups * 32;
    p.scales = m->scales + at;
    p.sums = m->sums + at;
    p.zeros = m->zeros ? m->zeros + at : nullptr;
    if (m->kind == ML_TABLE4) p.table = load_table(m->table);
    return p;
}

// Bytes of memory of its own that a member needs for linear_block().
static inline size_t linear_own_bytes(const ml_matrix *m) {
    if (m->kind == ML_BF16) return 0;
    const size_t bytes = m->kind == ML_INT8 ? 0 : (size_t)m->padded_in * 32; // of a block, unpacked
    if (m->activations == ML_ACTIVATIONS_INT8) return bytes;
    return (size_t)m->padded_in * 32 * sizeof(uint16_t) + (m->kind == ML_SPLIT8 ? bytes : 0);
}

// Whether linear_tiles.h multiplies.
ML_INLINE int by_tiles(int64_t rows) {
#ifdef ML_BY_TILES
    return rows >= ML_BY_TILES;
#else
    (void)rows;
    return 0;
#endif
}

#ifdef ML_BY_TILES
static void tiled_block(const ml_part *p, const ml_quantized *q, int64_t rows, int32_t left, float *y, int64_t stride);
#endif
static void wide_block(const ml_matrix *m, ml_part *p, const ml_quantized *q, int64_t rows, int32_t left, float *y,
                       int64_t stride, void *own);

// Let tile t of so many ask for its share of the codes that come next: memory is never idle while rows are multiplied.
// A single tile of 8 bits reads as fast as memory gives; asking makes it slower.
ML_INLINE void ask_a_share(ml_part *p, const ml_matrix *m, int64_t t, int64_t tiles) {
    const int32_t words = m->padded_in / 4;
    const uint8_t *from = p->next;
    int64_t share = t, of = tiles;
    if (m->kind == ML_SPLIT8 && tiles > 1) { // some ask for the high halves, the others for the low ones
        of = t < tiles / 2 ? tiles / 2 : tiles - tiles / 2;
        if (t >= tiles / 2) {
            from = p->next_low;
            share -= tiles / 2;
        }
    }
    p->step = tiles == 1 && m->kind != ML_TABLE4 ? 0 : (int32_t)((m->kind == ML_INT8 ? 128 : 64) / of);
    p->ask = from + share * p->step * words;
}

// Tiles of nearly the same height: 8 rows are 4 and 4, not 6 and 2.
static int64_t linear_tiles(const ml_matrix *m, int64_t rows) {
    const int most = m->kind == ML_BF16 ? ML_DENSE_TILE : ML_TILE;
    return (rows + most - 1) / most;
}

// y[r][0 .. 31] = outputs 32 * block ... of rows 0 .. rows - 1, which lie in q, for a matrix of BF16 in x [rows, in]. y's
// rows are `stride` floats apart; outputs that the matrix hasn't got are left alone. `own` has linear_own_bytes(),
// 64-byte aligned. `next` are the codes that will be read after this block, if not the next block's, and `more` what else.
static void linear_block(const ml_matrix *m, const ml_quantized *q, const float *x, int64_t rows, int32_t block, float *y,
                         int64_t stride, void *own, const uint8_t *next = nullptr, lora_asks *more = nullptr) {
    float bias[32];
    ml_part p = part_of(m, block, bias);
    if (next) p.next = next;
    p.more = more;
    int32_t left = m->out - block * 32;
    if (q->wide) {
        if (m->kind == ML_SPLIT8) {
            int8_t *bytes = (int8_t *)own + (size_t)m->padded_in * 32 * sizeof(uint16_t);
            unpack_block<HALVES>(&p, bytes);
            p.codes = (const uint8_t *)bytes;
        }
        wide_block(m, &p, q, rows, left, y, stride, own);
        return;
    }
    int form = m->kind == ML_TABLE4 ? NIBBLES : m->kind == ML_SPLIT8 ? HALVES : BYTES;
    if (form != BYTES && (rows > (form == HALVES ? 2 * ML_TILE : ML_UNPACK) || by_tiles(rows))) {
        if (form == HALVES) unpack_block<HALVES>(&p, (int8_t *)own);
        else unpack_block<NIBBLES>(&p, (int8_t *)own);
        p.codes = (const uint8_t *)own;
        form = BYTES;
    }
#ifdef ML_BY_TILES
    if (m->kind != ML_BF16 && by_tiles(rows)) {
        tiled_block(&p, q, rows, left, y, stride);
        return;
    }
#endif
    const int64_t tiles = linear_tiles(m, rows);
    for (int64_t t = 0; t < tiles; t++) {
        int64_t row = rows * t / tiles;
        int count = (int)(rows * (t + 1) / tiles - row);
        ask_a_share(&p, m, t, tiles);
        float edge[ML_TILE * 32];
        float *to = left < 32 ? edge : y + row * stride;
        int64_t apart = left < 32 ? 32 : stride;
        if (m->kind == ML_BF16) dense_of<ML_DENSE_TILE>(count, &p, x + row * m->in, m->in, to, apart);
        else some_rows(&p, form, q, row, count, to, apart);
        if (left < 32)
            for (int r = 0; r < count; r++) memcpy(y + (row + r) * stride, edge + r * 32, (size_t)left * sizeof(float));
    }
}

typedef struct {
    const ml_matrix *matrix;
    const float *x;
    float *y;
    int64_t rows;
    ml_quantized q;
    int32_t failed;
} ml_product;

static void product_program(ml_team team, void *argument) {
    ml_product *a = (ml_product *)argument;
    const ml_matrix *m = a->matrix;
    if (team.member == 0) {
        void *memory = ml_scratch(team.pool, quantized_bytes(m, a->rows));
        a->failed = !memory;
        if (memory) place_quantized(&a->q, m, a->rows, memory);
    }
    void *own = ml_own_scratch(team, linear_own_bytes(m));
    if (!own) __atomic_store_n(&a->failed, 1, __ATOMIC_RELAXED);
    ml_barrier(team);
    if (a->failed) return;
    for (int64_t row; (row = ml_take(team)) < a->rows;) quantize_row(a->x + row * m->in, m, &a->q, row);
    ml_barrier(team);
    for (int64_t block; (block = ml_take_near(team, m->blocks)) >= 0;)
        linear_block(m, &a->q, a->x, a->rows, (int32_t)block, a->y + block * 32, m->out, own);
}

// y [rows, out] = x [rows, in] times the matrix, plus its bias. Returns 0, or 1 if there was no memory.
static int32_t linear(ml_pool *pool, const ml_matrix *matrix, const float *x, int64_t rows, float *y) {
    ml_product a;
    memset(&a, 0, sizeof a);
    a.matrix = matrix;
    a.x = x;
    a.y = y;
    a.rows = rows;
    ml_run(pool, product_program, &a);
    return a.failed;
}

#define ML_LINEAR_EXPORTS ML_EXPORT(linear),

#ifdef ML_BY_TILES
#include "linear_tiles.h"
#endif
#include "linear_wide.h"

// How often linear_block() asks for `more` while it goes through a vector of outputs: with each group of each tile, of
// which there are as many as its way of multiplying makes. BF16 asks for nothing.
static int64_t linear_asks(const ml_matrix *m, const ml_quantized *q, int64_t rows) {
    if (m->kind == ML_BF16) return 0;
    int64_t most = q->wide ? ML_WIDE_ROWS : ML_TILE;
#ifdef ML_BY_TILES
    if (!q->wide && by_tiles(rows)) most = ML_BY_TILES;
#endif
    return (rows + most - 1) / most * q->groups;
}
