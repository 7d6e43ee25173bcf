// AVX-512 with integer and bfloat16 dot products: Intel's Cooper Lake and Sapphire Rapids, AMD's from Zen 4 on.
#define ML_LEVEL avx512_bf16
#include "level.h"
