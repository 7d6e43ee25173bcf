// What Python and the kernels hand each other: plain C structures, mirrored by ctypes in server/kernels/cpu/abi.py as
// Matrix, Layer, Model, KV, Pair, Arena, Job, Term, Jobs, Step and Call, whose pointers are c_void_p.
//
// All matrices are row-major. f32 is float, bf16 and f16 are their bits in uint16_t. Pointers are borrowed.
#pragma once
#include <stdint.h>

#define ML_ABI 8
#define ML_PUBLIC __attribute__((visibility("default")))
#define ML_BLOCK 32  // outputs of a packed block
#define ML_MODULES 7 // q, k, v, o, gate, up, down: LORA_MODULES' order

enum { ML_Q, ML_K, ML_V, ML_O, ML_GATE, ML_UP, ML_DOWN };
enum { ML_TABLE4 = 0, ML_INT8 = 1, ML_BF16 = 2, ML_SPLIT8 = 3 };
enum { ML_ACTIVATIONS_INT8 = 0, ML_ACTIVATIONS_BF16 = 1 };
enum { ML_KV_BF16 = 0, ML_KV_INT8 = 1 };
#define ML_KV_GROUP 32 // neighbouring values of a head that share a scale in an int8 cache

// A matrix [out, in] in blocks of 32 outputs; outputs and inputs are padded with weights that add nothing.
//
// w[o, i] = gain * scale[block][i / group][o % 32] * (value - zero), where value is table[code] or a signed byte and zero
// is zeros[...] or 0. Within a block a "word" is 4 inputs of all 32 outputs:
//   TABLE4  [blocks][padded_in / 4][64]: byte l of the 64 holds input 4w + l % 4 of output l / 4 in its low half, and of
//           output 16 + l / 4 in its high half
//   INT8    [blocks][padded_in / 4][128]: byte l holds input 4w + l % 4 of output l / 4
//   BF16    [blocks][padded_in / 2][32][2] bf16; group, scales, sums and zeros are unused
//   SPLIT8  a signed byte whose halves lie apart: all blocks' high halves as TABLE4's codes, then all blocks' low halves.
//           Input i's value is the byte less ml_dither(i) (split.h); search.h says what that is for
typedef struct {
    int32_t kind, out, in;
    int32_t blocks;    // ceil(out / 32)
    int32_t padded_in; // a multiple of 64
    int32_t group;     // 64 or 32 inputs to a scale
    float gain;        // a power of two that keeps the scales within f16's normal range
    int32_t activations; // what all but BF16 are multiplied by, which takes f32
    const int8_t *table;    // [16], TABLE4
    const void *codes;      // 64-byte aligned
    const uint16_t *scales; // f16 [blocks][padded_in / group][32]
    const int16_t *sums;    // [blocks][padded_in / group][32]: the group's values added up
    const int16_t *zeros;   // [blocks][padded_in / group][32] or null: subtracted from every value of the group
    const int32_t *order;   // [padded_in] or null: input i of the packed matrix is order[i] of x; -1 is padding
    const float *bias;      // [out] or null
    const uint16_t *values; // bf16 [16], TABLE4 with activations of bf16: what the codes stand for then, finer than table
} ml_matrix;

// A matrix as a checkpoint has it, to be packed. Of what it is made, see quant/.
enum { ML_FROM_NF4, ML_FROM_GPTQ, ML_FROM_AWQ, ML_FROM_INT8, ML_FROM_BF16 };
typedef struct {
    int32_t form, out, in, bits; // bits: GPTQ's, 4 or 8
    const void *codes;           // INT8: int8 [out][in]; BF16: bf16 [out][in]
    const float *scales;         // of output o and group g: scales[o * of_output + g * of_group]
    const int16_t *zeros;        // the same, or null; as ml_matrix's
    const int32_t *groups;       // [padded_in / group]: the source's group of each packed one; -1: all padding
    int64_t of_output, of_group;
    float scaled; // what scales are multiplied by
    int32_t reserved;
} ml_source;

// 16- or 32-bit weights that are brought to NF4 or int8, and where they go.
enum { ML_WEIGHTS_F32, ML_WEIGHTS_F16, ML_WEIGHTS_BF16 };
typedef struct {
    int32_t type;         // of the weights
    int32_t block;        // NF4: weights to a scale, a power of two of at most 4096. int8: 64; a row's last may be shorter
    int64_t rows, in;     // NF4: one row of all weights
    const void *weights;  // [rows][in]
    const float *between; // NF4: the fifteen values between codes
    uint8_t *codes;       // NF4: [ceil(in / 2)], the first of two in the high half; int8: [rows][in]
    float *scales;        // [rows][ceil(in / block)]: NF4: largest magnitudes; int8: those over `most`. NaN if one is not finite
    int32_t most;         // int8: the largest code's magnitude
    int32_t reserved;
} ml_encoding;

typedef struct {
    const float *attn_norm; // [hidden]
    const float *q_norm;    // [head_dim] or null, k_norm likewise
    const float *k_norm;
    const float *mlp_norm;
    ml_matrix module[ML_MODULES];
    int32_t window; // 0: full attention
    int32_t reserved;
} ml_layer;

typedef struct {
    int32_t layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, positions;
    float eps;
    int32_t reserved;
    const float *cos; // [positions, head_dim], both halves alike
    const float *sin;
    const ml_layer *layer;
    const ml_matrix *embedding; // INT8 (the head's own, where they are tied) or BF16: [vocab, hidden]
    const float *final_norm;
    const ml_matrix *head;
} ml_model;

// The KV cache: slots / block_size blocks of [layers][2] halves, keys then values; kv_cache.h says how a half lies.
typedef struct {
    void *data; // 64-byte aligned
    int64_t slots;
    int32_t block_size;
    int32_t form; // ML_KV_BF16, ML_KV_INT8
} ml_kv;

// A module's adapters in one layer, bf16, the scale folded into B. An adapter owns a range of rank rows, and that share of
// both buffers for all layers: of A from element start * layers * in on, its own [layers][rank][in]; of B from
// start * layers * ceil(out / 32) * 32 on, its own [layers][ceil(out / 32)][rank][32].
typedef struct {
    const uint16_t *a;
    const uint16_t *b;
    int32_t layer, layers;
} ml_pair;

typedef struct {
    const ml_pair *pair; // [ML_MODULES], of layer 0
} ml_arena;

// Tokens that use an adapter's range of rank rows of a module, each once. A token's jobs stand in the order in which they
// are added; ranges of rank 0 have none. The last `others` of the rank rows hold no factors: see ml_term.
typedef struct {
    int32_t start, rank, count;
    int32_t others;
    const int32_t *tokens; // [count]
    const float *weights;  // [count]
    const int32_t *places; // [count]: where the token's rank products lie in the step's shrunk buffer
} ml_job;

// What an adapter does to the module's own output for a token: row `row` of the range's B is a gain or an offset. A token's
// stand together, in order: y = (1 + sum of weight * gain) * W x + bias + sum of weight * offset.
enum { ML_TERM_GAIN, ML_TERM_OFFSET };
typedef struct {
    int32_t token;
    int32_t start, rank; // the range's, as ml_job's
    int32_t row;
    int32_t kind;
    float weight;
} ml_term;

typedef struct {
    int32_t count;
    int32_t width;    // f32 of the shrunk buffer that all jobs together use
    const ml_job *job;
    int32_t terms;
    int32_t reserved;
    const ml_term *term; // [terms]
} ml_jobs;

typedef struct {
    int32_t tokens, sequences, table_width;
    int32_t reserved;
    const int32_t *ids;          // [tokens]
    const int32_t *positions;    // [tokens]
    const int32_t *slots;        // [tokens]: where k and v go
    const int32_t *query_start;  // [sequences + 1]
    const int32_t *context_lens; // [sequences]: with this step's tokens
    const int32_t *block_tables; // [sequences][table_width]
    uint8_t *finite;             // [tokens]: set to 0 where keys or values are not finite
    const float *const *given;   // [tokens]: f32 [hidden] in the place of a token's row, or null; null: none has any
    ml_jobs jobs[ML_MODULES];
} ml_step;

// What an op of a step works on. Intermediate results that the caller doesn't bring lie in the team's memory.
typedef struct {
    const ml_model *model;
    const ml_kv *kv;
    const ml_arena *arena;
    const ml_step *step;
    int32_t layer;
    int32_t reserved;
    float *x;   // [tokens, hidden]: read, and added to in place
    float *qkv; // [tokens, (heads + 2 * kv_heads) * head_dim]; q is rotated in place
    float *o;   // [tokens, heads * head_dim]
    float *h;   // [tokens, intermediate]
} ml_call;

// How rows of logits become tokens, and what is told of them. Columns are [rows].
typedef struct {
    int32_t rows, vocab;
    int32_t top; // alternatives that are told of a row, at most
    int32_t reserved;
    const float *logits;               // [any, vocab]
    const int32_t *places;             // which row of the logits
    const double *inverse_temperature; // 0: the best token
    const int32_t *top_k;              // 0: all
    const double *top_p;               // 1 or more: all
    const double *min_p;
    const uint64_t *seed; // of the numbers that it is drawn with: see uniform.h
    const uint64_t *choice;
    const uint64_t *position;
    const int32_t *told;  // alternatives that are told; -1: nothing is, not even of the token itself
    int32_t *ids;         // the token; -1: a logit is NaN or infinite
    double *logprobs;     // natural log of the softmax of the logits at the token
    int32_t *top_ids;     // [rows, top], best first
    double *top_logprobs; // [rows, top]
    const uint32_t *const *masks; // bits of the ids that may be drawn, the lowest first; null, or a row's is null: all
} ml_sampling;

// A step from its tokens to the next ones.
typedef struct {
    const ml_call *call; // x is given
    const int32_t *rows; // [count]: tokens whose logits are wanted
    int64_t count;
    float *hidden;               // [count, hidden]
    float *logits;               // [count, vocab]
    const ml_sampling *sampling; // null: nothing is sampled
    double *seconds;             // [2]: what layers and head took, and what sampling did
    int32_t wake;                // a file descriptor that gets a byte before anything is computed; -1: none
    int32_t strange;             // out: how many tokens' states, keys or values are not finite
    int32_t searched;            // out: whether the tokens were found without the logits, which weren't written then
    int32_t reserved;
} ml_run_call;
