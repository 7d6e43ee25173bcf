// AVX-512 with integer dot products: Intel's from Cascade Lake, AMD's from Zen 4 on.
#define ML_LEVEL avx512_vnni
#include "level.h"
