// The best token of a few rows without all of their logits: a head in halves (SPLIT8) is read by its high halves, and
// what may be the largest is computed as linear() would, from both.
//
// With the high halves alone a logit lacks Σ scale · x[i] · e[i] over its inputs. e[i] is 7.5 less a low half: sixteen
// numbers that are as likely each and independent from input to input, thanks to what is added before a byte is split
// (split.h). Such a number is a sum of four coin tosses of 0.5, 1, 2 and 4, so Hoeffding's bound holds with the variance
// itself, 21.25: Σ is more than ML_SURE standard deviations off with a probability under 2 exp(-ML_SURE² / 2). Of 150,000
// logits that is one in 10¹² tokens. All else is exact: the token is the lowest id of the largest logit, those that are
// compared have linear()'s bits, and a logit that is NaN or infinite is found, as it is so without its low halves too.
#pragma once
#include "linear.h"
#include "sample.h"

#define ML_SURE 9.01f         // a hundredth for what floats round
#define ML_NOISE 21.25f       // the variance of e[i]
#define ML_SEARCH_ROWS ML_TILE

typedef struct {
    const ml_matrix *matrix;
    const float *x;
    int64_t rows;
    ml_quantized q;
    float *offset; // [rows][groups]: what a group's high halves lack of the mean: Σ (7.5 - dither) · whole inputs
    float *power;  // [rows][groups]: Σ x²
    uint32_t *best_seen;   // [rows]: the largest logit that any member has found, as bits
    candidate *best;       // [members][rows]
    int32_t *strange;      // [rows]: whether a logit is not finite
    const int32_t *places; // [rows]: whose token each of ids is to be
    int32_t *ids;          // [rows]
    int32_t failed;
} ml_search;

static size_t search_bytes(const ml_matrix *m, int64_t rows, int members) {
    const size_t groups = (size_t)rows * (m->padded_in / m->group) * sizeof(float);
    return quantized_bytes(m, rows) + 2 * whole_lines(groups) + 2 * whole_lines(rows * sizeof(int32_t)) +
           whole_lines((size_t)members * rows * sizeof(candidate));
}

static void place_search(ml_search *s, int members, char *memory) {
    const size_t groups = whole_lines((size_t)s->rows * (s->matrix->padded_in / s->matrix->group) * sizeof(float));
    place_quantized(&s->q, s->matrix, s->rows, memory);
    memory += quantized_bytes(s->matrix, s->rows);
    s->offset = (float *)(void *)memory;
    s->power = (float *)(void *)(memory += groups);
    s->best_seen = (uint32_t *)(void *)(memory += groups);
    s->strange = (int32_t *)(void *)(memory += whole_lines(s->rows * sizeof(int32_t)));
    s->best = (candidate *)(void *)(memory + whole_lines(s->rows * sizeof(int32_t)));
    const float least = -INFINITY;
    for (int64_t row = 0; row < s->rows; row++) {
        memcpy(s->best_seen + row, &least, sizeof least);
        s->strange[row] = 0;
        for (int member = 0; member < members; member++) s->best[member * s->rows + row] = candidate{least, -1};
    }
}

// What is known of a row's groups before the matrix is read.
static void weigh_row(ml_search *s, int64_t row) {
    const ml_quantized *q = &s->q;
    for (int32_t g = 0; g < q->groups; g++) {
        const int64_t at = row * q->groups + g;
        const int32_t zero = ML_OFFSET - (int16_t)(q->fold[at] & 0xffff), first = g * q->group;
        const uint8_t *u = q->u + row * q->stride + first;
        int32_t twice = 0, squares = 0;
        for (int32_t i = 0; i < q->group; i++) {
            const int32_t whole = (u[i] ^ ML_FLIP) - zero;
            twice += whole * (15 - 2 * ml_dither(first + i));
            squares += whole * whole;
        }
        s->offset[at] = 0.5f * (float)twice;
        s->power[at] = q->scale[at] * q->scale[at] * (float)squares;
    }
}

// Of R rows and two vectors of outputs the logits by high halves, and how much larger they may be.
template <int R>
ML_INLINE void bound_columns(const ml_search *s, const ml_part *p, int column, float bound[R][32]) {
    static const uint8_t ONES[4] = {1, 1, 1, 1};
    const ml_quantized *q = &s->q;
    const vx one = load_word(ONES);
    vf total[R][2], square[R][2];
    for (int r = 0; r < R; r++) total[r][0] = total[r][1] = square[r][0] = square[r][1] = vzero();
    for (int32_t g = 0; g < p->groups; g++) {
        vi dots[R][2], added[2] = {vi_zero(), vi_zero()};
        for (int r = 0; r < R; r++) dots[r][0] = dots[r][1] = vi_zero();
        __builtin_prefetch(p->scales + (p->groups + g) * 32);
        for (int32_t word = g * p->words; word < (g + 1) * p->words; word++) {
            vw low, high;
            __builtin_prefetch(p->next + word * 64, 0, ML_FAR);
            load_weights<NIBBLES>(p, word, column, &low, &high);
            added[0] = dot(added[0], one, low);
            added[1] = dot(added[1], one, high);
            for (int r = 0; r < R; r++) {
                vx x = load_word(q->u + (int64_t)r * q->stride + word * 4);
                dots[r][0] = dot(dots[r][0], x, low);
                dots[r][1] = dot(dots[r][1], x, high);
            }
        }
        for (int half = 0; half < 2; half++) {
            const vf weight = vf16(p->scales + g * 32 + half * 16 + column), weight2 = vmul(weight, weight);
            for (int r = 0; r < R; r++) {
                const int64_t at = r * q->groups + g;
                const vi whole = vi_add(dots[r][half], start(vi_low(added[half]), q->fold[at]));
                const vf scale = vmul(weight, vset(q->scale[at]));
                total[r][half] = vfma(vadd(vi_float(whole), vset(s->offset[at])), scale, total[r][half]);
                square[r][half] = vfma(weight2, vset(s->power[at]), square[r][half]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) {
            const int at = half * 16 + column;
            const vf noise = vmul(vsqrt(square[r][half]), vset(ML_SURE * sqrtf(ML_NOISE)));
            vstore(bound[r] + at, vfma(vadd(total[r][half], noise), vset(p->gain), vload(p->bias + at)));
        }
}

ML_INLINE float seen(const ml_search *s, int64_t row) {
    const uint32_t bits = __atomic_load_n(s->best_seen + row, __ATOMIC_RELAXED);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// Let the others know; one that comes between makes them compute a block too many, no more.
static void tell(ml_search *s, int64_t row, float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value > seen(s, row)) __atomic_store_n(s->best_seen + row, bits, __ATOMIC_RELAXED);
}

// Compute a block's logits of one row, and take the best.
static void take_best(ml_search *s, const ml_part *p, int64_t row, int32_t first, int32_t count, candidate *best) {
    float y[32];
    tile<1, HALVES, 0>(p, &s->q, row, y, 32);
    for (int32_t j = 0; j < count; j++) {
        if (!(y[j] <= FLT_MAX)) __atomic_store_n(s->strange + row, 1, __ATOMIC_RELAXED);
        if (y[j] > best->value || (y[j] == best->value && first + j < best->id)) *best = candidate{y[j], first + j};
    }
    tell(s, row, best->value);
}

template <int R>
static void search_block(ml_search *s, ml_part *p, int32_t block, candidate *best) {
    // A high half h of a byte stands for 16 h; what the low ones are in the mean is in `offset`.
    static const int8_t HIGH[16] = {0, 16, 32, 48, 64, 80, 96, 112, -128, -112, -96, -80, -64, -48, -32, -16};
    const int32_t left = s->matrix->out - block * 32, count = left < 32 ? left : 32;
    float bound[R][32];
    p->table = load_table(HIGH);
    for (int column = 0; column < 16; column += VW) bound_columns<R>(s, p, column, bound);
    for (int r = 0; r < R; r++) {
        if (__atomic_load_n(s->strange + r, __ATOMIC_RELAXED)) continue;
        const float most = seen(s, r);
        int32_t may = 0;
        for (int32_t j = 0; j < count; j++) may |= !(bound[r][j] < most); // NaN may be anything
        if (may) take_best(s, p, r, block * 32, count, best + r);
    }
}

template <int R> static void search_blocks(ml_search *s, ml_team team) {
    if (s->rows != R) {
        if constexpr (R > 1) search_blocks<R - 1>(s, team);
        return;
    }
    for (int64_t block; (block = ml_take_near(team, s->matrix->blocks)) >= 0;) {
        float bias[32];
        ml_part p = part_of(s->matrix, (int32_t)block, bias);
        p.ask = p.codes; // near already: tile() need not ask for anything
        search_block<R>(s, &p, (int32_t)block, s->best + team.member * R);
    }
}

static void search_program(ml_team team, void *argument) {
    ml_search *s = (ml_search *)argument;
    if (team.member == 0) {
        char *memory = (char *)ml_scratch(team.pool, search_bytes(s->matrix, s->rows, team.members));
        s->failed = !memory;
        if (memory) place_search(s, team.members, memory);
    }
    ml_barrier(team);
    if (s->failed) return;
    for (int64_t row; (row = ml_take(team)) < s->rows;) {
        quantize_row(s->x + row * s->matrix->in, s->matrix, &s->q, row);
        weigh_row(s, row);
    }
    ml_barrier(team);
    search_blocks<ML_SEARCH_ROWS>(s, team);
    ml_barrier(team);
    if (team.member) return;
    for (int64_t row = 0; row < s->rows; row++) {
        candidate *best = s->best + row;
        for (int member = 1; member < team.members; member++) {
            const candidate *other = s->best + member * s->rows + row;
            if (better(other, best) < 0 && other->id >= 0) *best = *other;
        }
    }
    for (int64_t i = 0; i < s->rows; i++)
        s->ids[i] = s->strange[s->places[i]] ? SAMPLE_NOT_FINITE : s->best[s->places[i]].id;
}

// Whether search() finds what `rows` rows of logits are wanted for.
static int can_search(const ml_matrix *head, const ml_sampling *sampling, int64_t rows) {
    if (head->kind != ML_SPLIT8 || head->activations != ML_ACTIVATIONS_INT8) return 0;
    if (head->padded_in > ML_DITHERED) return 0; // what is left out would not be independent
    if (!sampling || sampling->rows != rows || rows > ML_SEARCH_ROWS || rows < 1) return 0;
    for (int64_t row = 0; row < rows; row++)
        if (sampling->inverse_temperature[row] > 0.0 || sampling->told[row] >= 0) return 0;
    return !sampling->masks;
}

// ids[i] = the lowest id of the largest of x[places[i]] · headᵀ, x [rows, in], or SAMPLE_NOT_FINITE: what sample() makes of
// linear()'s logits at temperature 0. Returns 0, or 1 if there was no memory, or there are more than ML_SEARCH_ROWS.
static int32_t search(ml_pool *pool, const ml_matrix *head, const float *x, int64_t rows, const int32_t *places,
                      int32_t *ids) {
    if (rows > ML_SEARCH_ROWS) return 1;
    ml_search s;
    memset(&s, 0, sizeof s);
    s.matrix = head;
    s.x = x;
    s.rows = rows;
    s.places = places;
    s.ids = ids;
    ml_run(pool, search_program, &s);
    return s.failed;
}

#define ML_SEARCH_EXPORTS ML_EXPORT(search),
