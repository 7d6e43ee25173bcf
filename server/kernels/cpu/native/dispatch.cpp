// What was compiled, and what of it this processor can run. Compiled for the baseline: nothing here may use an
// instruction of a level. build.py defines ML_LEVELS, the levels as X(name) with the fastest first, and ML_SOURCES.
#include "dispatch.h"

#include <stddef.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define X(name) extern "C" const ml_level ml_level_##name;
ML_LEVELS
#undef X

#define X(name) &ml_level_##name,
static const ml_level *const levels[] = {ML_LEVELS nullptr};
#undef X

#if defined(__x86_64__)
// Where cpuid tells of a feature, and the states (bits of XCR0) that the system must save for it.
enum Register { A, B, C, D };
enum State : uint32_t { AVX = 0x6, AVX512 = 0xe6, TILES = 0x60000 };
typedef struct {
    const char *name;
    uint32_t leaf, subleaf;
    Register in;
    int bit;
    State states;
} Feature;

static const Feature avx2[] = {{"AVX2", 7, 0, B, 5, AVX}, {"FMA", 1, 0, C, 12, AVX}, {"F16C", 1, 0, C, 29, AVX}, {}};
static const Feature avx512[] = {
    {"AVX-512 F", 7, 0, B, 16, AVX512},
    {"AVX-512 DQ", 7, 0, B, 17, AVX512},
    {"AVX-512 BW", 7, 0, B, 30, AVX512},
    {"AVX-512 VL", 7, 0, B, 31, AVX512},
    {},
};
static const Feature vnni[] = {{"AVX-512 VNNI", 7, 0, C, 11, AVX512}, {}};
static const Feature bf16[] = {{"AVX-512 BF16", 7, 1, A, 5, AVX512}, {}};
static const Feature tiles[] = {
#ifndef ML_EMULATE_TILES // by which tests do without
    {"AMX", 7, 0, D, 24, TILES},
    {"AMX INT8", 7, 0, D, 25, TILES},
#endif
    {},
};
static const struct {
    const char *name;
    const Feature *needs[6];
} needed[] = {
    {"avx2", {avx2}},
    {"avx512_vnni", {avx2, avx512, vnni}},
    {"avx512_bf16", {avx2, avx512, vnni, bf16}},
    {"amx", {avx2, avx512, vnni, bf16, tiles}},
};

static uint64_t saved_states() {
    uint32_t r[4] = {}, low, high;
    if (!__get_cpuid(1, &r[A], &r[B], &r[C], &r[D]) || !(r[C] >> 27 & 1)) return 0; // OSXSAVE
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static bool has(const Feature *feature) {
    uint32_t r[4] = {};
    if (!__get_cpuid_count(feature->leaf, feature->subleaf, &r[A], &r[B], &r[C], &r[D])) return false;
    return (r[feature->in] >> feature->bit & 1) && (saved_states() & feature->states) == feature->states;
}

// Linux saves tiles for a process that has asked for it.
static bool may_use_tiles() {
#if defined(ML_EMULATE_TILES)
    return true;
#elif defined(__linux__)
    return !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */);
#else
    return false;
#endif
}

static const char *lacks(const char *level) {
    for (const auto &each : needed) {
        if (strcmp(each.name, level)) continue;
        for (const Feature *const *features = each.needs; *features; features++)
            for (const Feature *feature = *features; feature->name; feature++)
                if (!has(feature)) return feature->name;
        return strcmp(level, "amx") || may_use_tiles() ? nullptr : "the system's leave to use AMX tiles";
    }
    return "a known name";
}
#elif defined(__aarch64__) && defined(__linux__)
static const char *lacks(const char *) {
    return getauxval(AT_HWCAP) >> 20 & 1 ? nullptr : "NEON dot products"; // HWCAP_ASIMDDP
}
#elif defined(__aarch64__)
static const char *lacks(const char *) { return nullptr; } // Apple's have all
#else
static const char *lacks(const char *) { return "a known processor"; }
#endif

#define SIZE(type) {#type, sizeof(type)}
#define AT(type, field) {#type "." #field, offsetof(type, field)}
static const ml_layout layouts[] = {
#include "layouts.h"
    {nullptr, 0},
};

extern "C" {
int32_t ml_abi(void) { return ML_ABI; }
const char *ml_sources(void) { return ML_SOURCES; }
const ml_layout *ml_layouts(void) { return layouts; }
const ml_level *ml_level_at(int32_t number) {
    return number < 0 || number >= (int32_t)(sizeof levels / sizeof *levels) ? nullptr : levels[number];
}
const char *ml_level_lacks(int32_t number) {
    const ml_level *level = ml_level_at(number);
    return level ? lacks(level->name) : "such a level";
}
}
