// The last header of a level: its table of functions. A header that has some to offer defines ML_<ITS NAME>_EXPORTS, a
// list of ML_EXPORT(function), each with a comma after it.
#pragma once
#include "dispatch.h"

#define ML_JOIN(a, b) a##b
#define ML_TABLE_NAME(level) ML_JOIN(ml_level_, level)
#define ML_TEXT(x) #x
#define ML_LEVEL_TEXT(level) ML_TEXT(level)

static const ml_export ml_exports[] = {
#ifdef ML_PACK_EXPORTS
    ML_PACK_EXPORTS
#endif
#ifdef ML_ENCODE_EXPORTS
    ML_ENCODE_EXPORTS
#endif
#ifdef ML_LINEAR_EXPORTS
    ML_LINEAR_EXPORTS
#endif
#ifdef ML_EMBEDDING_EXPORTS
    ML_EMBEDDING_EXPORTS
#endif
#ifdef ML_ROWS_EXPORTS
    ML_ROWS_EXPORTS
#endif
#ifdef ML_LIMITS_EXPORTS
    ML_LIMITS_EXPORTS
#endif
#ifdef ML_NORM_EXPORTS
    ML_NORM_EXPORTS
#endif
#ifdef ML_ROPE_EXPORTS
    ML_ROPE_EXPORTS
#endif
#ifdef ML_ATTENTION_EXPORTS
    ML_ATTENTION_EXPORTS
#endif
#ifdef ML_LORA_EXPORTS
    ML_LORA_EXPORTS
#endif
#ifdef ML_FORWARD_EXPORTS
    ML_FORWARD_EXPORTS
#endif
#ifdef ML_SAMPLE_EXPORTS
    ML_SAMPLE_EXPORTS
#endif
#ifdef ML_SEARCH_EXPORTS
    ML_SEARCH_EXPORTS
#endif
#ifdef ML_RUN_EXPORTS
    ML_RUN_EXPORTS
#endif
    {nullptr, nullptr},
};

extern const ml_level ML_TABLE_NAME(ML_LEVEL);
const ml_level ML_TABLE_NAME(ML_LEVEL) = {ML_LEVEL_TEXT(ML_LEVEL), ml_exports};
