// AVX-512 and tiles of integer and bfloat16 products: Intel's from Sapphire Rapids on.
#define ML_LEVEL amx
#include "level.h"
