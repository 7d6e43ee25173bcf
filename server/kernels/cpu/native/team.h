// The threads of a step. Every member runs the same program; take() deals out the pieces of a phase, barrier() ends it.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "abi.h"

typedef struct ml_pool ml_pool;

typedef struct {
    ml_pool *pool;
    int member, members;
} ml_team;

#ifdef __cplusplus
extern "C" {
#endif
// A pool of `members` (at least 1). Its threads are started by its first program, and again by the first one in a child
// of fork(). Member i > 0 is held on core cores[i]; null: where the system puts it. The caller, member 0, is never held.
// Null if there is no memory.
ML_PUBLIC ml_pool *ml_pool_create(int32_t members, const int32_t *cores);
// Ends its threads and frees what it has. No program may be running.
ML_PUBLIC void ml_pool_destroy(ml_pool *pool);
// Run `program` on every member; the caller is member 0. One program at a time: others wait their turn,
// and none may start one inside another. Where threads can't be started there are fewer members than the pool's.
void ml_run(ml_pool *pool, void (*program)(ml_team team, void *argument), void *argument);
// The number of the next piece of this phase, from 0. Reset by barrier().
int64_t ml_take(ml_team team);
// One of the `count` pieces of this phase that is left, or -1. A member gets neighbours one after the other while it
// has any of its own share, and then from the end of another's: for pieces that are read from memory in a row. A phase's
// pieces are dealt out by this or by ml_take(), not both.
int64_t ml_take_near(ml_team team, int64_t count);
// Wait until all members are here. What was written before it is seen by all after it.
void ml_barrier(ml_team team);
// At least `bytes` of memory of the whole program, 64-byte aligned, the same for all members; call it as one member of
// a phase of its own. It is kept for the next program. Null if there is none.
void *ml_scratch(ml_pool *pool, size_t bytes);
// The same for one member alone.
void *ml_own_scratch(ml_team team, size_t bytes);
#ifdef __cplusplus
}
#endif
