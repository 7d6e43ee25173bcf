// What every level is made of, in this order. A level's file defines ML_LEVEL and includes this; the flags that it is
// compiled with (build.py) choose between the forms in these headers.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)
// gcc 12's own headers leave on purpose undefined what a full mask overwrites.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "abi.h"
#include "simd.h"
#include "team.h"
#include "dot.h"
#include "quantize.h"
#include "tile.h"
#include "linear.h"
#include "embedding.h"
#include "pack.h"
#include "encode.h"
#include "limits.h"
#include "norm.h"
#include "kv_cache.h"
#include "rope.h"
#include "turn.h"
#include "attention_read.h"
#include "attention_tile.h"
#include "attention.h"
#include "lora.h"
#include "forward.h"
#include "step.h"
#include "uniform.h"
#include "sample.h"
#include "search.h"
#include "report.h"
#include "run.h"
#include "table.h"
