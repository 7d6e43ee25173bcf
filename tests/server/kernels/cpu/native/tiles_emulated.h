// AMX's tiles in plain C++, one unit for each thread, for processors that have none. What the processor would refuse ends
// the program. It counts products, and units that are in use.
#include <stdlib.h>
#include <string.h>

extern "C" {
ML_PUBLIC int64_t ml_tile_dots = 0, ml_tile_units = 0;
}

struct Unit {
    bool used;
    ml_tile_shapes shapes;
    uint8_t data[8][16][64];
};
static thread_local Unit unit;

static void tiles_must(bool right) {
    if (!right) abort();
}

static void tiles_release() {
    if (unit.used) __atomic_fetch_sub(&ml_tile_units, 1, __ATOMIC_RELAXED);
    memset(&unit, 0, sizeof unit);
}

static void tiles_shape(const ml_tile_shapes *shapes) {
    tiles_release();
    tiles_must(shapes->palette == 1 && !shapes->first_row);
    for (uint8_t each : shapes->reserved) tiles_must(!each);
    for (int tile = 0; tile < 16; tile++) {
        bool none = !shapes->bytes[tile] && !shapes->rows[tile], some = shapes->bytes[tile] && shapes->rows[tile];
        tiles_must(tile < 8 ? none || some : none);
        tiles_must(shapes->bytes[tile] <= 64 && shapes->rows[tile] <= 16);
    }
    unit.shapes = *shapes;
    unit.used = true;
    __atomic_fetch_add(&ml_tile_units, 1, __ATOMIC_RELAXED);
}

static void tile_zero(int tile) {
    tiles_must(unit.used && unit.shapes.rows[tile]);
    memset(unit.data[tile], 0, sizeof unit.data[tile]);
}

static void tile_load(int tile, const void *from, int64_t stride) {
    tile_zero(tile);
    for (int row = 0; row < unit.shapes.rows[tile]; row++)
        memcpy(unit.data[tile][row], (const char *)from + row * stride, unit.shapes.bytes[tile]);
}

static void tile_store(int tile, void *to, int64_t stride) {
    tiles_must(unit.used && unit.shapes.rows[tile]);
    for (int row = 0; row < unit.shapes.rows[tile]; row++)
        memcpy((char *)to + row * stride, unit.data[tile][row], unit.shapes.bytes[tile]);
}

static void tile_dot(int sums, int u, int w) {
    const ml_tile_shapes *s = &unit.shapes;
    tiles_must(unit.used && s->rows[sums] && sums != u && sums != w && u != w);
    tiles_must(s->rows[sums] == s->rows[u] && s->bytes[sums] == s->bytes[w] && s->bytes[u] == 4 * s->rows[w]);
    for (int m = 0; m < s->rows[sums]; m++)
        for (int n = 0; n < s->bytes[sums] / 4; n++) {
            int32_t sum;
            memcpy(&sum, unit.data[sums][m] + 4 * n, 4);
            for (int k = 0; k < s->bytes[u]; k++)
                sum += unit.data[u][m][k] * (int8_t)unit.data[w][k / 4][4 * n + k % 4];
            memcpy(unit.data[sums][m] + 4 * n, &sum, 4);
        }
    __atomic_fetch_add(&ml_tile_dots, 1, __ATOMIC_RELAXED);
}
