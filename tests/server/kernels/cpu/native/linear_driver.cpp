// Packs matrices and multiplies by them as a level does, on memory that ends where it must, so that sanitizers see every
// step past it and other processors' emulators can run it. Reads cases from its first argument, writes products to the
// second; test_linear_driver.py says what a case is.
#include <stdio.h>
#include <stdlib.h>

#include "abi.h"
#include "simd.h"
#include "team.h"
#include "dot.h"
#include "quantize.h"
#include "linear.h"
#include "embedding.h"
#include "pack.h"
#include "search.h"

extern "C" ml_pool *ml_pool_create(int32_t members, const int32_t *cores);
extern "C" void ml_pool_destroy(ml_pool *pool);

typedef struct {
    int32_t form, out, in, bits, kind, padded_in, group, rows;
    float gain, scaled;
    int64_t of_output, of_group;
} Case;

static void *aligned(size_t bytes) {
    void *data = nullptr;
    if (posix_memalign(&data, 64, bytes)) abort();
    return data;
}

static void *blob(FILE *file) {
    int64_t bytes;
    if (fread(&bytes, sizeof bytes, 1, file) != 1) abort();
    if (!bytes) return nullptr;
    void *data = aligned((size_t)bytes);
    if (fread(data, 1, (size_t)bytes, file) != (size_t)bytes) abort();
    return data;
}

// A block asks for what comes next as often as linear_asks() says.
static void check_asks(const ml_matrix *m, const float *x, int64_t rows) {
    void *memory = aligned(quantized_bytes(m, rows) + 64), *own = aligned(linear_own_bytes(m) + 64);
    float *y = (float *)aligned((size_t)rows * 32 * sizeof(float));
    ml_quantized q;
    place_quantized(&q, m, rows, memory);
    for (int64_t row = 0; m->kind != ML_BF16 && row < rows; row++) quantize_row(x, m, &q, row);
    ml_pair pair = {nullptr, (const uint16_t *)(const void *)x, 0, 1};
    ml_job job = {0, 1 << 20, 0, 0, nullptr, nullptr, nullptr};
    lora_asks more = {&pair, &job, &job + 1, 1, 0, nullptr, 0, 1};
    linear_block(m, &q, x, rows, 0, y, 32, own, nullptr, &more);
    int64_t asked = more.job == &job ? 0 : job.rank - more.left;
    if (asked != linear_asks(m, &q, rows) * (16 / VW)) abort();
    free(memory), free(own), free(y);
}

// A search finds what is the largest of the products y.
static void check_search(ml_pool *pool, const ml_matrix *m, const float *x, const float *y) {
    for (int64_t rows = 1; rows <= ML_SEARCH_ROWS; rows++) {
        int32_t places[ML_SEARCH_ROWS], ids[ML_SEARCH_ROWS];
        for (int32_t row = 0; row < rows; row++) places[row] = row;
        if (search(pool, m, x, rows, places, ids)) abort();
        for (int64_t row = 0; row < rows; row++)
            for (int32_t i = 0; i < m->out; i++)
                if (y[row * m->out + i] > y[row * m->out + ids[row]]) abort();
    }
}

static void run(ml_pool *pool, const Case *c, FILE *in, FILE *out) {
    ml_source s = {c->form, c->out, c->in, c->bits, nullptr, nullptr, nullptr, nullptr, c->of_output, c->of_group, c->scaled, 0};
    s.codes = blob(in);
    s.scales = (float *)blob(in);
    s.zeros = (int16_t *)blob(in);
    s.groups = (int32_t *)blob(in);
    ml_matrix m;
    memset(&m, 0, sizeof m);
    m.kind = c->kind, m.out = c->out, m.in = c->in;
    m.blocks = (c->out + 31) / 32;
    m.padded_in = c->padded_in, m.group = c->group, m.gain = c->gain;
    size_t weights = (size_t)m.blocks * 32 * m.padded_in, pairs = weights / m.group * 2;
    const unsigned half_bytes[] = {1, 2, 4, 2}; // by kind
    m.codes = aligned(weights * half_bytes[m.kind] / 2);
    m.scales = c->kind == ML_BF16 ? nullptr : (uint16_t *)aligned(pairs);
    m.sums = c->kind == ML_BF16 ? nullptr : (int16_t *)aligned(pairs);
    m.zeros = s.zeros ? (int16_t *)aligned(pairs) : nullptr;
    m.order = (int32_t *)blob(in);
    m.table = (int8_t *)blob(in);
    m.bias = (float *)blob(in);
    float *x = (float *)blob(in), *y = (float *)aligned((size_t)c->rows * c->out * sizeof(float));
    if (pack(pool, &s, &m) || linear(pool, &m, x, c->rows, y)) abort();
    float *row = (float *)aligned((size_t)c->in * sizeof(float));
    int32_t last = c->out - 1;
    embedding(pool, &m, &last, 1, row);
    fwrite(y, sizeof(float), (size_t)c->rows * c->out, out);
    fwrite(row, sizeof(float), (size_t)c->in, out);
    for (int64_t rows = 1; rows <= c->rows; rows += 23) check_asks(&m, x, rows);
    if (m.kind == ML_SPLIT8) check_search(pool, &m, x, y);
    // The same by activations of bfloat16, the codes' values as they are in the table.
    uint16_t values[16] = {};
    for (int i = 0; m.table && i < 16; i++) values[i] = float_to_bf16(m.table[i]);
    m.activations = ML_ACTIVATIONS_BF16;
    m.values = values;
    if (linear(pool, &m, x, c->rows, y)) abort();
    for (int64_t rows = 1; rows <= c->rows; rows += 23) check_asks(&m, x, rows);
    fwrite(y, sizeof(float), (size_t)c->rows * c->out, out);
    const void *all[] = {s.codes, s.scales, s.zeros, s.groups, m.codes, m.scales, m.sums, m.zeros,
                         m.order, m.table,  m.bias,  x,        y,       row};
    for (const void *data : all) free((void *)data);
}

int main(int count, char **arguments) {
    if (count != 3) return 2;
    FILE *in = fopen(arguments[1], "rb"), *out = fopen(arguments[2], "wb");
    if (!in || !out) return 2;
    ml_pool *pool = ml_pool_create(2, nullptr);
    for (Case c; fread(&c, sizeof c, 1, in) == 1;) run(pool, &c, in, out);
    ml_pool_destroy(pool);
    fclose(in);
    return fclose(out);
}
