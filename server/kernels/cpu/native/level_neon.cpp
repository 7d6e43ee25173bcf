// NEON with integer dot products: Arm processors from 2018 on.
#define ML_LEVEL neon
#include "level.h"
