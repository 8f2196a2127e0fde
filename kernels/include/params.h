// Arguments of the kernels for embedding, norms, rotary embedding, activations, page copies and the step's plan.
// (Sampling: sampling_params.h. Attention and GEMM have headers of their own.) Plain C: the Rust side mirrors it.
//
// T: token rows of the step, at most the grid's rows; `num_rows` points to it on the device, so that a captured graph
// serves every step of its bucket. `act`: bf16 or f16, the kernel's suffix. Rows are contiguous unless a stride is given.
#ifndef QUIRE_PARAMS_H
#define QUIRE_PARAMS_H

#include <stdint.h>

/// quire_embed_{bf16,f16}: out[t] = scale * table[id]. Grid (rows, 1, 1), block QUIRE_ROW_THREADS.
typedef struct QuireEmbedParams {
    /// act [vocab, hidden].
    const void* table;
    /// [T]. `id >= 0`: that token. Otherwise what slot `-1 - id` sampled last: last_tokens[-1 - id].
    const int32_t* token_ids;
    const int32_t* last_tokens;
    /// f32 [T, hidden]: the residual stream.
    float* out;
    const int32_t* num_rows;
    int32_t hidden;
    /// Ids outside 0..vocab give rows of NaN: the host checks its own, and the sampler writes no others.
    int32_t vocab;
    float scale;
    int32_t reserved;
} QuireEmbedParams;

/// quire_add_norm_{bf16,f16}[_wide,_any]: residual += delta, then out = residual / rms(residual) * weight.
/// quire_post_norm_*: residual += delta / rms(delta) * delta_weight, then the same.
/// Grid (rows, 1, 1); block QUIRE_NORM_THREADS(hidden), which fixes the order of the sum. hidden a multiple of 8, at most
/// 8192; _wide: at most QUIRE_NORM_MAX_HIDDEN; _any: whatever hidden, slower, block QUIRE_ROW_THREADS.
typedef struct QuireAddNormParams {
    /// f32 [T, hidden], updated if there is a delta.
    float* residual;
    /// act [T, hidden]; of add_norm, or null.
    const void* delta;
    /// f32 [hidden]; of post_norm alone.
    const float* delta_weight;
    /// f32 [hidden].
    const float* weight;
    /// act [T, hidden].
    void* out;
    const int32_t* num_rows;
    int32_t hidden;
    float eps;
} QuireAddNormParams;

/// quire_rope_cache_{bf16,f16}[_any][_kv8]: for each row of q, k, v: add the bias, normalise heads of q and k, rotate
/// them by the row's position, write q (and k, if asked) back and k and v to their page.
/// head_dim and rotary_dim multiples of 16, head_dim at most 512; _any: both even, head_dim at most 512, slower.
/// Grid (rows, QUIRE_ROPE_BLOCKS(num_heads + 2 * num_kv_heads, head_dim), 1) (_any: QUIRE_ROPE_ANY_BLOCKS), block
/// QUIRE_ROPE_THREADS.
typedef struct QuireRopeCacheParams {
    /// act [T, (num_heads + 2 * num_kv_heads) * head_dim].
    void* qkv;
    /// f32, a row of qkv; or null.
    const float* bias;
    /// f32 [head_dim]; both or neither null.
    const float* q_norm;
    const float* k_norm;
    /// f32 [positions, rotary_dim / 2, 2]: cosine, sine. Null: no rotation.
    const float* rope;
    /// [T].
    const int32_t* positions;
    /// [T] page * page_tokens + offset; negative: the row has no place in the cache.
    const int32_t* slot_mapping;
    /// The layer's pages [page][2][num_kv_heads][page_tokens][head_dim], act or e4m3 (_kv8).
    void* kv;
    /// _kv8: f32 [page][2][num_kv_heads][page_tokens]. Each key's and value's own power of two: what the element times
    /// it gives is exact in bf16, and no token's bytes depend on its neighbours in the page.
    float* kv_scales;
    const int32_t* num_rows;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;
    /// Columns that are rotated, from the head's first; the others pass. 0 without `rope`.
    int32_t rotary_dim;
    int32_t page_tokens;
    float eps;
    /// Not 0: k and v go back to qkv too (tests read them; attention does not).
    int32_t write_back;
    int32_t reserved;
} QuireRopeCacheParams;

/// quire_act_{bf16,f16}[_any]: out = f(in), or f(gate) * up where in holds gate's columns, then up's.
/// Grid (rows, QUIRE_ACT_BLOCKS(width), 1), block QUIRE_ACT_THREADS. width a multiple of 8; _any: whatever width.
typedef struct QuireActParams {
    /// act [T, width] or, gated, [T, 2 * width].
    const void* in;
    /// act [T, width].
    void* out;
    const int32_t* num_rows;
    int32_t width;
    /// QUIRE_ACT_*.
    int32_t kind;
    int32_t gated;
    int32_t reserved;
} QuireActParams;

#define QUIRE_ACT_SILU 0
#define QUIRE_ACT_GELU_TANH 1
#define QUIRE_ACT_GELU 2
#define QUIRE_ACT_RELU 3

/// quire_soft_cap: x = cap * tanh(x / cap), in place. Grid (rows, QUIRE_CAP_BLOCKS(cols), 1), block QUIRE_ROW_THREADS.
typedef struct QuireSoftCapParams {
    /// f32 [rows, stride].
    float* x;
    const int32_t* num_rows;
    int32_t cols;
    int32_t stride;
    float cap;
    int32_t reserved;
} QuireSoftCapParams;

/// quire_gather_rows_{bf16,f16}: out[i] = in[rows[i]]. Grid (rows, 1, 1), block QUIRE_ROW_THREADS.
typedef struct QuireGatherRowsParams {
    /// act [T, hidden].
    const void* in;
    /// Indices, `row_stride` int32 apart.
    const int32_t* rows;
    /// act [num_rows, hidden].
    void* out;
    const int32_t* num_rows;
    int32_t row_stride;
    int32_t hidden;
} QuireGatherRowsParams;

/// quire_copy_pages: dst page <- src page in every layer, for pairs that do not touch each other's pages (no page is a
/// destination twice, or both source and destination). Grid: any, it strides; block QUIRE_COPY_THREADS.
typedef struct QuireCopyPagesParams {
    /// [num_pairs, 2]: source page, destination page.
    const int32_t* pairs;
    const int32_t* num_pairs;
    /// Layer 0's page 0; pages of one layer are contiguous. The two may be one; either may be mapped host memory.
    const void* src;
    void* dst;
    /// Bytes of a page of one layer, a multiple of 16 (of 4: slower), and between layers.
    uint64_t page_bytes;
    uint64_t src_layer_stride;
    uint64_t dst_layer_stride;
    int32_t num_layers;
    int32_t reserved;
} QuireCopyPagesParams;

/// quire_step_plan: from what the host sends once a step (three ints a sequence) to what the layers' kernels read.
/// Grid (rows of the bucket / QUIRE_PLAN_STEP_THREADS, rounded up, 1, 1), block QUIRE_PLAN_STEP_THREADS.
/// Grid (QUIRE_PLAN_GRID, 1, 1), block QUIRE_PLAN_THREADS_STEP.
typedef struct QuireStepPlanParams {
    /// [S + 1], S = *num_seqs.
    const int32_t* cu_seqlens_q;
    /// [S] tokens in the cache once the step has run.
    const int32_t* seq_lens;
    /// [S].
    const int32_t* seq_slots;
    const int32_t* num_seqs;
    /// [slots, table_stride] page numbers, resident; indexed by slot.
    const int32_t* block_tables;
    /// [T rounded up to the bucket]: absolute position; rows past the last get 0.
    int32_t* positions;
    /// [bucket]: page * page_tokens + offset; rows past the last get -1.
    int32_t* slot_mapping;
    /// One: T.
    int32_t* num_rows;
    int32_t table_stride;
    int32_t page_tokens;
    /// Rows of `positions` and `slot_mapping`.
    int32_t bucket;
    int32_t reserved;
} QuireStepPlanParams;

/// quire_update_tables: block_tables[entry.row][entry.column] = entry.page. Any grid, it strides; 256 threads.
typedef struct QuireUpdateTablesParams {
    /// [num_entries, 3]: row (slot), column, page.
    const int32_t* entries;
    const int32_t* num_entries;
    int32_t* block_tables;
    int32_t table_stride;
    int32_t reserved;
} QuireUpdateTablesParams;

// Launch shapes.
#define QUIRE_ROW_THREADS 256
/// Eight columns a thread; _wide: up to four times as many.
#define QUIRE_NORM_MAX_HIDDEN 32768
#define QUIRE_NORM_VECTORS(hidden) ((hidden) <= 8192 ? 1 : 4)
#define QUIRE_NORM_THREADS(hidden) \
    ((((hidden) / 8 + QUIRE_NORM_VECTORS(hidden) - 1) / QUIRE_NORM_VECTORS(hidden) + 31) / 32 * 32)
/// Threads that share a head: a power of two, sixteen columns each.
#define QUIRE_ROPE_LANES(head_dim) \
    ((head_dim) <= 16 ? 1 : (head_dim) <= 32 ? 2 : (head_dim) <= 64 ? 4 : (head_dim) <= 128 ? 8 : (head_dim) <= 256 ? 16 : 32)
#define QUIRE_ROPE_BLOCKS(heads, head_dim) (((heads) * QUIRE_ROPE_LANES(head_dim) + 255) / 256)
#define QUIRE_ROPE_ANY_BLOCKS(heads) (((heads) * 32 + 255) / 256)
/// Sixteen columns a thread.
#define QUIRE_ACT_BLOCKS(width) (((width) + 16 * 256 - 1) / (16 * 256))
#define QUIRE_CAP_BLOCKS(cols) (((cols) + 8 * QUIRE_ROW_THREADS - 1) / (8 * QUIRE_ROW_THREADS))
#define QUIRE_ROPE_THREADS 256
#define QUIRE_ACT_THREADS 256
#define QUIRE_COPY_THREADS 256
#define QUIRE_PLAN_STEP_THREADS 256

#endif
