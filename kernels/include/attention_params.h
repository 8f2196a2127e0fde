// Arguments of the attention kernels, and the work list that drives them. Plain C: the Rust side mirrors it.
//
// A *row* is one query head of one query token of one KV head: rows of a sequence are numbered
// `token * group + head_in_group`, so that the heads which share a KV head share the loads of its keys. A *split* is
// QUIRE_KV_SPLIT positions at a fixed absolute place. Every kernel computes a row split by split, each split from
// scratch and in tiles of fixed absolute place, and adds the splits up in index order; so a row has the same bits
// whichever kernel computes it, in whatever chunk or batch, and however the splits are spread over blocks.
//
// The lists are made on the device by quire_attention_plan. Their length lives on the device too, so the grid is
// fixed: (number of SMs * blocks per SM, 1, 1), and blocks stride over `items * num_kv_heads`.
#ifndef QUIRE_ATTENTION_PARAMS_H
#define QUIRE_ATTENTION_PARAMS_H

#include <stdint.h>

/// Positions in a KV split. A multiple of every tile and of every page.
#define QUIRE_KV_SPLIT 512
/// Query rows that the decode kernel takes at most: the M of one matrix instruction.
#define QUIRE_DECODE_ROWS 16
/// Threads in a block.
#define QUIRE_DECODE_THREADS 128
/// Query rows of the prefill kernel's tile.
#define QUIRE_PREFILL_ROWS 128
#define QUIRE_PREFILL_THREADS 256
/// Of quire_attention_prefill_sm90a: those that compute, and a warpgroup to copy.
#define QUIRE_SM90A_THREADS 384
/// Tiles of 64 tokens on their way or in use, 32 KiB each.
#define QUIRE_SM90A_STAGES 4
/// Tokens in a box that is copied at once: the smallest page.
#define QUIRE_PAGE_BOX 16
#define QUIRE_ATTENTION_PLAN_THREADS 256

/// A piece of work for one block (and each KV head): some rows of one sequence over some consecutive splits.
typedef struct QuireAttentionItem {
    /// Row of the block table.
    int32_t seq;
    /// The sequence's first row in q and out.
    int32_t q_start;
    /// Absolute position of that row.
    int32_t first_position;
    /// First row of the item, counted from the sequence's first (see above).
    int32_t row_begin;
    int32_t num_rows;
    /// Positions that any row of the item sees within the item's splits: never empty.
    int32_t kv_begin;
    int32_t kv_end;
    /// Splits that the item's rows see altogether, and how many of them come before the item's first.
    int32_t num_splits;
    int32_t split_offset;
    /// First of `num_splits * num_rows` partial results, or -1: the item has all splits and writes `out` itself.
    int32_t partial;
    /// Arrival counter of the items that share these rows, and how many they are. The last of them adds up.
    int32_t counter;
    int32_t num_items;
    int32_t reserved[4];
} QuireAttentionItem;

/// quire_attention_{decode,prefill}_*: one layer. Either kernel computes any item of at most its rows. Both lists number
/// their partial results and counters from zero: the kernels of a stream run one after the other.
typedef struct QuireAttentionParams {
    /// [T, q_stride]: head h of a token at column h * head_dim.
    const void* q;
    /// The layer's pages: [page][2][num_kv_heads][page_tokens][head_dim], keys then values. Only positions below the
    /// sequence's length and not below its window are read. Values must be finite.
    const void* kv;
    /// fp8 only: [page][2][num_kv_heads][page_tokens] f32, the factor of each key and each value. One a token, not one a
    /// page: a page fills over many steps, and a scale that the first token sets does not fit the last.
    const float* kv_scales;
    /// [T, out_stride].
    void* out;
    /// [S, block_table_stride] page numbers.
    const int32_t* block_tables;
    const QuireAttentionItem* items;
    const int32_t* num_items;
    /// [partials, num_kv_heads, head_dim] f32: sums of splits, not divided yet.
    float* partial_out;
    /// [partials, num_kv_heads, 2] f32: maximum (in units of log2) and sum of weights.
    float* partial_max_sum;
    /// [counters, num_kv_heads]: zero before the first launch; every launch leaves zeros.
    int32_t* counters;
    /// Prefill only: [gridDim.x, rows * tile_dim] f32 for items of several splits, see quire_attention_prefill.
    float* carry;
    /// [num_kv_heads * group] f32 logits that take part in each row's sum but carry no value (gpt-oss), or null.
    const float* sinks;
    /// Multiplies q . k.
    float scale;
    /// Scores become soft_cap * tanh(score / soft_cap); 0: they don't.
    float soft_cap;
    /// A row at position p sees max(0, p + 1 - window)..=p; 0: all of 0..=p.
    int32_t window;
    int32_t num_kv_heads;
    /// Query heads per KV head.
    int32_t group;
    /// At most the kernel's; a multiple of 8 (of 16 with fp8 pages). Columns beyond it count as zero.
    int32_t head_dim;
    /// log2 of page_tokens, 4 or more.
    int32_t page_shift;
    /// Elements between rows.
    int32_t block_table_stride;
    int32_t q_stride;
    int32_t out_stride;
} QuireAttentionParams;

/// quire_attention_prefill_sm90a_*: what quire_attention_prefill does, for head_dim 128 and 16-bit pages.
typedef struct QuireAttentionSm90aParams {
    /// A CUtensorMap of the layer's pages as rows of a head's numbers, one a token: [pages * 2 * num_kv_heads *
    /// page_tokens, 128], in boxes of QUIRE_PAGE_BOX rows of 64, swizzled by 128 bytes.
    __attribute__((aligned(64))) uint64_t pages[16];
    QuireAttentionParams attention;
    /// Of `pages`. A row of this number is outside.
    int32_t num_rows;
    int32_t reserved[13];
} QuireAttentionSm90aParams;

/// quire_attention_plan: one block, once a step and kind of window. Sequences whose rows fit QUIRE_DECODE_ROWS go to the
/// decode list, the others to the prefill list, which is ordered from the last rows of a sequence to the first.
typedef struct QuireAttentionPlanParams {
    /// [S + 1]; [S] tokens in the cache once the step has run; [S] row of the block table, or null: the sequence's own
    /// number; and S.
    const int32_t* cu_seqlens_q;
    const int32_t* seq_lens;
    const int32_t* seq_slots;
    const int32_t* num_seqs;
    QuireAttentionItem* decode_items;
    int32_t* num_decode_items;
    QuireAttentionItem* prefill_items;
    int32_t* num_prefill_items;
    int32_t num_kv_heads;
    int32_t group;
    /// As the layers' own.
    int32_t window;
    /// Rows of the prefill kernel's tile: QUIRE_PREFILL_ROWS.
    int32_t prefill_rows;
    /// Blocks that run at once; rows of few sequences are spread over as many.
    int32_t decode_blocks;
    int32_t prefill_blocks;
    /// What the lists hold. Where they would not do, items take several splits.
    int32_t max_items;
    int32_t max_partials;
    int32_t max_counters;
    int32_t reserved;
} QuireAttentionPlanParams;

#endif
