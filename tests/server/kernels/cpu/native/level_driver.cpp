// Multiplies noise by a packed matrix of each kind at each level that this processor has, and prints a line for each:
// the kind, how far the products are off double's, and a digest of their bits.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dispatch.h"
#include "team.h"

#define IN 192
#define OUT 96
#define GROUP 64
#define ROWS 37
#define GROUPS (IN / GROUP)
#define BLOCKS (OUT / ML_BLOCK)

typedef int32_t (*Linear)(ml_pool *, const ml_matrix *, const float *, int64_t, float *);

static const int8_t table[16] = {-123, -86, -65, -49, -35, -23, -11, 0, 10, 20, 30, 42, 54, 69, 89, 123};
static double weight[OUT][IN];
static float x[ROWS * IN], y[ROWS * OUT];
alignas(64) static uint8_t codes[BLOCKS * IN / 4 * 128];
alignas(64) static uint16_t scales[BLOCKS * GROUPS * ML_BLOCK];
alignas(64) static int16_t sums[BLOCKS * GROUPS * ML_BLOCK];

static uint32_t noise(uint32_t below) {
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return (state >> 8) % below;
}

static ml_matrix make_matrix(int32_t kind) {
    memset(codes, 0, sizeof codes);
    memset(sums, 0, sizeof sums);
    for (uint16_t &scale : scales) scale = (uint16_t)((13 + noise(3)) << 10 | noise(1024)); // f16 of 1/4 .. 2
    for (int o = 0; o < OUT; o++)
        for (int i = 0; i < IN; i++) {
            int block = o / ML_BLOCK, lane = o % ML_BLOCK, word = block * IN / 4 + i / 4;
            int code = (int)noise(16), value = kind == ML_TABLE4 ? table[code] : (int)noise(255) - 127;
            int group = (block * GROUPS + i / GROUP) * ML_BLOCK + lane;
            if (kind == ML_TABLE4)
                codes[word * 64 + lane % 16 * 4 + i % 4] |= (uint8_t)(lane < 16 ? code : code << 4);
            else
                codes[word * 128 + lane * 4 + i % 4] = (uint8_t)value;
            sums[group] = (int16_t)(sums[group] + value);
            weight[o][i] = 0.25 * value * ldexp(1 + (scales[group] & 1023) / 1024.0, (scales[group] >> 10) - 15);
        }
    ml_matrix matrix = {};
    matrix.kind = kind;
    matrix.out = OUT;
    matrix.in = matrix.padded_in = IN;
    matrix.blocks = BLOCKS;
    matrix.group = GROUP;
    matrix.gain = 0.25f;
    matrix.table = table;
    matrix.codes = codes;
    matrix.scales = scales;
    matrix.sums = sums;
    return matrix;
}

static void multiply(ml_pool *pool, const ml_matrix *matrix, Linear linear) {
    double off = 0, all = 0;
    uint32_t digest = 0;
    if (linear(pool, matrix, x, ROWS, y)) exit(1);
    for (int t = 0; t < ROWS; t++)
        for (int o = 0; o < OUT; o++) {
            double right = 0;
            for (int i = 0; i < IN; i++) right += weight[o][i] * x[t * IN + i];
            off += (y[t * OUT + o] - right) * (y[t * OUT + o] - right);
            all += right * right;
            uint32_t bits;
            memcpy(&bits, &y[t * OUT + o], sizeof bits);
            digest = digest * 31 + bits;
        }
    printf("%d %.4f %08x\n", matrix->kind, sqrt(off / all), digest);
}

int main() {
    ml_pool *pool = ml_pool_create(2, nullptr);
    for (float &each : x) each = (float)noise(1 << 16) / 32768 - 1;
    const int32_t kinds[] = {ML_TABLE4, ML_INT8};
    for (int32_t kind : kinds) {
        ml_matrix matrix = make_matrix(kind);
        for (int32_t number = 0; ml_level_at(number); number++)
            for (const ml_export *each = ml_level_at(number)->exports; each->name; each++)
                if (!ml_level_lacks(number) && !strcmp(each->name, "linear")) multiply(pool, &matrix, (Linear)each->call);
    }
    ml_pool_destroy(pool);
}
