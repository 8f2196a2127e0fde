// Arguments of the kernels for LoRA adapters. Plain C: the Rust side mirrors it.
//
// T: token rows of the step; `num_rows` points to it on the device. `act`: bf16 or f16, the kernel's suffix.
#ifndef QUIRE_LORA_PARAMS_H
#define QUIRE_LORA_PARAMS_H

#include <stdint.h>

/// Parts of an adapter of one linear layer: q, k and v at most.
#define QUIRE_LORA_PARTS 3
/// Rows of A that a block multiplies, a warp each; columns that a block adds to, a thread each.
#define QUIRE_LORA_RANKS 8
#define QUIRE_LORA_COLUMNS 256
#define QUIRE_LORA_THREADS 256
/// Rows of a block of the kernels without and with the suffix _8.
#define QUIRE_LORA_ROWS 8

/// What an adapter adds to the outputs `first .. first + count`.
typedef struct QuireLoraPart {
    /// act [count, rank].
    const void* b;
    int32_t first;
    int32_t count;
    /// Its rows of `a`, which begin at a multiple of 8: `rank_begin .. rank_begin + rank`.
    int32_t rank_begin;
    /// A multiple of 8; factors of other ranks are filled up with zeros.
    int32_t rank;
    float scaling;
    int32_t reserved;
} QuireLoraPart;

/// An adapter of one linear layer.
typedef struct QuireLoraAdapter {
    /// act [rank, in_features]: the rows of all parts.
    const void* a;
    /// 0: it adds nothing to this layer.
    int32_t rank;
    int32_t num_parts;
    QuireLoraPart parts[QUIRE_LORA_PARTS];
} QuireLoraAdapter;

/// quire_lora_shrink_{bf16,f16}[_8]: out[t] = scaling * A x[t], with the adapter of row t; other rows are left alone.
/// _8: eight rows a block, which share what they read of A; the same bits. A warp sums a row of A: lane l takes inputs
/// 8 l .. 8 l + 8 of each 256 (of odd widths: inputs l of each 32), then the lanes meet in a fixed tree.
/// Grid (rows, ranks / QUIRE_LORA_RANKS rounded up, 1), _8: (rows / QUIRE_LORA_ROWS rounded up, ...);
/// block QUIRE_LORA_THREADS.
typedef struct QuireLoraShrinkParams {
    /// act [T, in_features].
    const void* x;
    const QuireLoraAdapter* adapters;
    /// [T] index into `adapters`; negative: none.
    const int32_t* row_adapters;
    /// f32 [T, stride].
    float* out;
    const int32_t* num_rows;
    int32_t in_features;
    /// At least the largest rank, a multiple of 8.
    int32_t stride;
} QuireLoraShrinkParams;

/// quire_lora_expand_{bf16,f16}[_8]: out[t] += B x[t]; the sum over the ranks, in their order, is added as a whole.
/// Grid (rows, out_features / QUIRE_LORA_COLUMNS rounded up, 1), _8 as above; block QUIRE_LORA_THREADS.
typedef struct QuireLoraExpandParams {
    /// f32 [T, stride]: what quire_lora_shrink has written.
    const float* x;
    const QuireLoraAdapter* adapters;
    const int32_t* row_adapters;
    /// act [T, out_features].
    void* out;
    const int32_t* num_rows;
    int32_t out_features;
    int32_t stride;
} QuireLoraExpandParams;

#endif
