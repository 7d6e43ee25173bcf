// One token for each row of logits: greedy, or by temperature, top-k, top-p and min-p, without sorting the vocabulary.
//
// What is kept, how ties go and which token a uniform number draws is what server/engine/sampler.py says; rows are
// independent, and a row's token is a function of its logits, its parameters and its numbers alone. Blocks of 128 entries
// are summed as float32, and over blocks as double.
#pragma once
#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "norm.h"
#include "team.h"
#include "uniform.h"

#define SAMPLE_BLOCK 128
#define FEW 64

enum { SAMPLE_NOT_FINITE = -1 };

typedef struct {
    float value;
    int32_t id;
} candidate;

typedef struct {
    float *probs;    // [vocab]
    float *maxima;   // [blocks]
    double *running; // [blocks]: sums of blocks, added up
    candidate *best; // [vocab]
    double *weights; // [vocab]
    float *allowed;  // [vocab]
} sample_space;

ML_INLINE int32_t blocks_of(int32_t vocab) { return (vocab + SAMPLE_BLOCK - 1) / SAMPLE_BLOCK; }

ML_INLINE int32_t block_end(int32_t block, int32_t vocab) {
    int32_t end = (block + 1) * SAMPLE_BLOCK;
    return end < vocab ? end : vocab;
}

static size_t sample_scratch(int32_t vocab) {
    size_t blocks = blocks_of(vocab);
    return (size_t)vocab * (2 * sizeof(float) + sizeof(candidate) + sizeof(double)) +
           blocks * (sizeof(float) + sizeof(double)) + 6 * 64;
}

static sample_space space_of(int32_t vocab, char *base) {
    size_t size[] = {vocab * sizeof(float), blocks_of(vocab) * sizeof(float), blocks_of(vocab) * sizeof(double),
                     vocab * sizeof(candidate), vocab * sizeof(double)};
    char *part[6] = {base};
    for (int i = 0; i < 5; i++) part[i + 1] = part[i] + (size[i] + 63) / 64 * 64;
    sample_space space = {(float *)(void *)part[0],     (float *)(void *)part[1],  (double *)(void *)part[2],
                          (candidate *)(void *)part[3], (double *)(void *)part[4], (float *)(void *)part[5]};
    return space;
}

// The largest of each block and of all; NaN if one is.
static float find_maxima(const float *x, int32_t vocab, float *maxima) {
    vf check = vzero();
    float most = -INFINITY, rest = 0.0f;
    for (int32_t block = 0; block < blocks_of(vocab); block++) {
        int32_t i = block * SAMPLE_BLOCK, end = block_end(block, vocab);
        vf top = vset(-INFINITY);
        for (; i + VW <= end; i += VW) {
            vf part = vload(x + i);
            top = vmax(top, part);
            // 0 · x of what is no NaN: x86's max and min return the second operand's NaN.
            check = vfma(vmin(vset(FLT_MAX), vmax(vset(-FLT_MAX), part)), vzero(), check);
        }
        float found = vtop(top);
        for (; i < end; i++) {
            if (x[i] != x[i]) rest = NAN;
            if (x[i] > found) found = x[i];
        }
        maxima[block] = found;
        if (found > most) most = found;
    }
    return vsum(check) + rest == 0.0f ? most : NAN;
}

// The lowest id of the largest value.
static int32_t first_of(const float *x, int32_t vocab, const float *maxima, float most) {
    int32_t block = 0;
    while (maxima[block] != most) block++;
    int32_t id = block * SAMPLE_BLOCK;
    while (id < vocab && x[id] != most) id++;
    return id;
}

// Draw an index of non-negative weights whose running sums these are; `rest` becomes what is left of u inside it. -1 if
// the total is no positive number.
static int32_t invert(const double *running, int32_t count, double u, double *rest) {
    double total = running[count - 1];
    if (!(total > 0.0)) return -1;
    double target = fmin(u * total, nextafter(total, 0.0));
    int32_t low = 0, high = count - 1; // the first whose running sum exceeds the target
    while (low < high) {
        int32_t middle = (low + high) / 2;
        if (running[middle] <= target) low = middle + 1;
        else high = middle;
    }
    double before = low ? running[low - 1] : 0.0;
    *rest = fmin(fmax((target - before) / (running[low] - before), 0.0), 1.0);
    return low;
}

static int better(const void *a, const void *b) {
    const candidate *x = (const candidate *)a, *y = (const candidate *)b;
    if (x->value != y->value) return x->value > y->value ? -1 : 1;
    return (x->id > y->id) - (x->id < y->id);
}

// The k-th largest of the blocks' maxima, of which there are more: a few by insertion, many by sorting.
static float kth_largest(const sample_space *space, int32_t blocks, int32_t k) {
    float most[FEW];
    if (k > FEW) {
        for (int32_t block = 0; block < blocks; block++) space->best[block] = candidate{space->maxima[block], block};
        qsort(space->best, (size_t)blocks, sizeof(candidate), better);
        return space->best[k - 1].value;
    }
    for (int32_t block = 0, count = 0; block < blocks; block++) {
        const float value = space->maxima[block];
        if (count == k && value <= most[k - 1]) continue;
        int32_t place = count < k ? count++ : k - 1;
        for (; place > 0 && most[place - 1] < value; place--) most[place] = most[place - 1];
        most[place] = value;
    }
    return most[k - 1];
}

// The k best from `least` on in order, equal values by lowest id; how many there are. What is below the k-th largest of
// the blocks' maxima is none of them.
static int32_t find_best(const float *x, int32_t vocab, int32_t k, float least, const sample_space *space) {
    int32_t blocks = blocks_of(vocab), count = 0;
    if (k < blocks) least = fmaxf(least, kth_largest(space, blocks, k));
    for (int32_t block = 0; block < blocks; block++) {
        if (space->maxima[block] < least) continue;
        for (int32_t i = block * SAMPLE_BLOCK; i < block_end(block, vocab); i++)
            if (x[i] >= least) space->best[count++] = candidate{x[i], i};
    }
    qsort(space->best, (size_t)count, sizeof(candidate), better);
    return count < k ? count : k;
}

// Temperature, then top_p over the renormalised k, then min_p.
static int32_t draw_best(const sample_space *space, int32_t k, double inverse, double top_p, double min_p, double u) {
    const candidate *best = space->best;
    double sum = 0.0, running = 0.0, kept = 0.0, above = 0.0, rest, *weights = space->weights;
    for (int32_t i = 0; i < k; i++)
        sum += weights[i] = exp(((double)best[i].value - (double)best[0].value) * inverse);
    double first = weights[0] / sum;
    for (int32_t i = 0; i < k; i++) {
        double weight = weights[i] / sum;
        running += weight;
        if (!i || best[i].value != best[i - 1].value) above = running - weight; // equal values stay or go together
        if (above < top_p && weight >= min_p * first) kept += weight;
        weights[i] = kept;
    }
    int32_t rank = invert(weights, k, u, &rest);
    return rank < 0 ? SAMPLE_NOT_FINITE : best[rank].id;
}

// probs = softmax(x · scale).
static void soften_row(const float *x, int32_t vocab, float scale, float most, float *probs) {
    vf top = vset(most * scale), sum = vzero();
    float rest = 0.0f;
    int32_t i = 0;
    for (; i + VW <= vocab; i += VW) {
        vf low = vsub(vmul(vload(x + i), vset(scale)), top);
        vf part = vpick(vless(low, vset(-87.3f)), vzero(), vexp(low));
        vstore(probs + i, part);
        sum = vadd(sum, part);
    }
    for (; i < vocab; i++) rest += probs[i] = expf(x[i] * scale - most * scale);
    vf total = vset(vsum(sum) + rest);
    for (i = 0; i + VW <= vocab; i += VW) vstore(probs + i, vdiv(vload(probs + i), total));
    for (; i < vocab; i++) probs[i] /= vsum(sum) + rest;
}

// Sums of the blocks' entries above the pivot, added up.
static void add_above(const float *probs, int32_t vocab, float pivot, double *running) {
    double total = 0.0;
    for (int32_t block = 0; block < blocks_of(vocab); block++) {
        int32_t i = block * SAMPLE_BLOCK, end = block_end(block, vocab);
        vf sum = vzero();
        for (; i + VW <= end; i += VW) {
            vf part = vload(probs + i);
            sum = vadd(sum, vpick(vless(vset(pivot), part), part, vzero()));
        }
        float rest = 0.0f;
        for (; i < end; i++) rest += probs[i] > pivot ? probs[i] : 0.0f;
        running[block] = total += (double)(vsum(sum) + rest);
    }
}

// Draw an entry above the pivot: the block first, then the place inside it.
static int32_t draw_above(const float *probs, int32_t vocab, float pivot, const double *running, double u) {
    double inside[SAMPLE_BLOCK], total = 0.0, rest;
    int32_t block = invert(running, blocks_of(vocab), u, &rest);
    if (block < 0) return SAMPLE_NOT_FINITE;
    int32_t first = block * SAMPLE_BLOCK, count = block_end(block, vocab) - first;
    for (int32_t i = 0; i < count; i++) inside[i] = total += probs[first + i] > pivot ? (double)probs[first + i] : 0.0;
    int32_t place = invert(inside, count, rest, &rest);
    return place < 0 ? SAMPLE_NOT_FINITE : first + place;
}

ML_INLINE const float *row_of(const ml_sampling *call, int32_t row) {
    return call->logits + (int64_t)call->places[row] * call->vocab;
}

static double number_of(const ml_sampling *call, int32_t row, uint64_t draw) {
    return uniform_of(call->seed[row], call->choice[row], call->position[row], draw);
}

// By rejection: what is drawn from above the pivot is kept if the mass above it is less than top_p; else it is the next
// pivot, above which all that may be kept lies.
static int32_t draw_all(const ml_sampling *call, int32_t row, const float *x, const sample_space *space, float most) {
    float scale = (float)call->inverse_temperature[row], pivot = 0.0f;
    soften_row(x, call->vocab, scale, most, space->probs);
    if (call->min_p[row] > 0.0) {
        float best = space->probs[first_of(x, call->vocab, space->maxima, most)];
        pivot = nextafterf(best * (float)fmin(call->min_p[row], 1.0), 0.0f);
    }
    add_above(space->probs, call->vocab, pivot, space->running);
    for (uint64_t draw = 0;; draw++) {
        int32_t id = draw_above(space->probs, call->vocab, pivot, space->running, number_of(call, row, draw));
        if (id < 0 || call->top_p[row] >= 1.0) return id;
        pivot = space->probs[id];
        add_above(space->probs, call->vocab, pivot, space->running);
        if (space->running[blocks_of(call->vocab) - 1] < fmax(call->top_p[row], 1e-300)) return id;
    }
}

// The 32 logits from `first` on, those that the bits hide being no more than any; fewer at the vocabulary's end.
static void hide(const float *x, int32_t vocab, int32_t first, uint32_t bits, float *to) {
    int32_t i = 0, count = vocab - first < 32 ? vocab - first : 32;
    for (; i + VW <= count; i += VW)
        vstore(to + i, vpick(vbits(bits >> i), vload(x + first + i), vset(-INFINITY)));
    for (; i < count; i++) to[i] = bits >> i & 1 ? x[first + i] : -INFINITY;
    for (; i < 32; i++) to[i] = -INFINITY;
}

// The row's logits, without those that its mask hides.
static const float *allowed_of(const ml_sampling *call, int32_t row, const sample_space *space) {
    const float *x = row_of(call, row);
    const uint32_t *mask = call->masks ? call->masks[row] : NULL;
    if (!mask) return x;
    for (int32_t first = 0; first < call->vocab; first += 32) {
        float part[32];
        hide(x, call->vocab, first, mask[first / 32], part);
        memcpy(space->allowed + first, part, (size_t)(call->vocab - first < 32 ? call->vocab - first : 32) * sizeof(float));
    }
    return space->allowed;
}

// The lowest id of the largest logit that the mask lets through. Where it lets nothing through nothing is read.
static int32_t best_allowed(const float *x, int32_t vocab, const uint32_t *mask) {
    float most = -INFINITY;
    int32_t best = SAMPLE_NOT_FINITE;
    vf check = vzero();
    for (int32_t first = 0; first < vocab; first += 32) {
        float part[32];
        vf top = vset(-INFINITY);
        if (!mask[first / 32]) continue;
        hide(x, vocab, first, mask[first / 32], part);
        for (int i = 0; i < 32; i += VW) {
            const vf some = vload(part + i);
            top = vmax(top, some);
            check = vfma(vmin(vset(FLT_MAX), vmax(vset(-FLT_MAX), some)), vzero(), check); // as find_maxima()
        }
        const float found = vtop(top);
        if (!(found > most)) continue;
        most = found;
        for (best = first; part[best - first] != found;) best++;
    }
    return vsum(check) == 0.0f && most <= FLT_MAX ? best : SAMPLE_NOT_FINITE;
}

static int32_t sample_row(const ml_sampling *call, int32_t row, const sample_space *space) {
    const double inverse = call->inverse_temperature[row];
    const uint32_t *mask = call->masks ? call->masks[row] : NULL;
    if (mask && inverse <= 0.0) return best_allowed(row_of(call, row), call->vocab, mask);
    const float *x = allowed_of(call, row, space);
    float most = find_maxima(x, call->vocab, space->maxima);
    if (!isfinite(most)) return SAMPLE_NOT_FINITE;
    if (inverse <= 0.0) return first_of(x, call->vocab, space->maxima, most);
    int32_t k = call->top_k[row];
    if (k <= 0 || k >= call->vocab) return draw_all(call, row, x, space, most);
    k = find_best(x, call->vocab, k, x == space->allowed ? -FLT_MAX : -INFINITY, space);
    double top_p = call->top_p[row] < 1.0 ? fmax(call->top_p[row], 1e-300) : INFINITY;
    return draw_best(space, k, inverse, top_p, call->min_p[row], number_of(call, row, 0));
}
