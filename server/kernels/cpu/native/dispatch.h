// How Python finds out what a library holds, and what of it this processor can run.
#pragma once
#include <stdint.h>

#include "abi.h"

// What a level offers: functions by their names, of which abi.py knows the arguments. A null name ends the list.
typedef struct {
    const char *name;
    void (*call)(void);
} ml_export;
#define ML_EXPORT(function) {#function, (void (*)(void))function}

typedef struct {
    const char *name; // "avx2", "avx512_vnni", ...
    const ml_export *exports;
} ml_level;

// A size or an offset as the C compiler has it. A null name ends the list.
typedef struct {
    const char *name; // "ml_matrix", "ml_matrix.kind", ...
    int64_t bytes;
} ml_layout;

#ifdef __cplusplus
extern "C" {
#endif
ML_PUBLIC int32_t ml_abi(void);
ML_PUBLIC const char *ml_sources(void); // the digest of what it was compiled from
ML_PUBLIC const ml_layout *ml_layouts(void);
// The levels that were compiled, the fastest first; null past the last.
ML_PUBLIC const ml_level *ml_level_at(int32_t number);
// What this processor, or its system, lacks for a level: the name of one thing, or null.
ML_PUBLIC const char *ml_level_lacks(int32_t number);
#ifdef __cplusplus
}
#endif
