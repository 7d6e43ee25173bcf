// AVX2, FMA and F16C: x86 processors from 2013 on.
#define ML_LEVEL avx2
#include "level.h"
