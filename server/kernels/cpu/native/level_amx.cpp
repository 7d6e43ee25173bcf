// AVX-512 and tiles of integer products (AMX): Intel's servers from Sapphire Rapids on.
#define ML_LEVEL amx
#include "level.h"
