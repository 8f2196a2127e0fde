// Arguments of the kernels for mixtures of experts. Plain C: the Rust side mirrors it.
//
// T: token rows of the step; `num_rows` points to it on the device. k: experts of a token. A slot is a token and a rank:
// token t has slots t * k .. t * k + k, in rank order. `act`: bf16 or f16, the kernel's suffix.
#ifndef QUIRE_MOE_PARAMS_H
#define QUIRE_MOE_PARAMS_H

#include <stdint.h>

#define QUIRE_MOE_MAX_EXPERTS 512
/// Most slots of a tile, and outputs of a block of the products.
#define QUIRE_MOE_TILE_ROWS 64
#define QUIRE_MOE_TILE_OUTPUTS 64
#define QUIRE_MOE_PAIR_OUTPUTS 128

/// Slots of one expert that a block computes at once: `slots[first .. first + count]`.
typedef struct QuireMoeTile {
    int32_t expert;
    int32_t first;
    int32_t count;
    int32_t reserved;
} QuireMoeTile;

/// quire_moe_route: the k largest logits of each row, ties to the lower number, and their weights: the softmax over all
/// experts, if asked divided by the sum of those chosen. NaN counts as the smallest. A warp a row.
/// Grid (rows / 8 rounded up, 1, 1), block QUIRE_MOE_ROUTE_THREADS.
typedef struct QuireMoeRouteParams {
    /// f32 [T, stride].
    const float* logits;
    /// [T, k].
    int32_t* experts;
    float* weights;
    const int32_t* num_rows;
    /// At most QUIRE_MOE_MAX_EXPERTS.
    int32_t num_experts;
    int32_t stride;
    int32_t top_k;
    int32_t renormalise;
} QuireMoeRouteParams;

/// quire_moe_sort: slots by expert, and the tiles that they make. Within an expert the order is not fixed, and nothing
/// that is computed from it shows it. Grid (1, 1, 1), block QUIRE_MOE_SORT_THREADS.
typedef struct QuireMoeSortParams {
    /// [T * k].
    const int32_t* experts;
    const int32_t* num_rows;
    /// [T * k].
    int32_t* slots;
    /// [num_experts + T * k / QUIRE_MOE_TILE_ROWS] at most.
    QuireMoeTile* tiles;
    int32_t* num_tiles;
    int32_t num_experts;
    int32_t top_k;
} QuireMoeSortParams;

/// quire_moe_gate_up_{bf16,f16}: out[slot] = f(x[slot / k] gate^T) * (x[slot / k] up^T) with the slot's expert.
/// quire_moe_down_{bf16,f16}: out[slot] = x[slot] w^T.
/// Any grid, they take tiles in turn (tiles times outputs / QUIRE_MOE_TILE_OUTPUTS, for down QUIRE_MOE_PAIR_OUTPUTS);
/// block QUIRE_MOE_THREADS.
/// A slot's bits do not depend on the other slots, or on the tile that it is in.
/// quire_moe_{gate_up,down}_fp8_{bf16,f16}: the same with weights of e4m3, widened to act, and a scale for each output.
typedef struct QuireMoeGemmParams {
    /// act [T, K]; for down act [T * k, K].
    const void* x;
    /// act or e4m3 [num_experts, N, K]; for gate_up [num_experts, 2 N, K], gate's rows first. N the outputs, K a multiple of
    /// 8, of 16 with e4m3.
    const void* weight;
    /// f32, one for each row of an e4m3 weight, else null.
    const float* w_scales;
    /// act [T * k, N].
    void* out;
    const int32_t* slots;
    const QuireMoeTile* tiles;
    const int32_t* num_tiles;
    int32_t in_features;
    int32_t out_features;
    int32_t top_k;
    /// QUIRE_ACT_*; gate_up only.
    int32_t kind;
} QuireMoeGemmParams;

/// quire_moe_{gate_up,down}_int{8,4}_{bf16,f16}: the same products of activations in 8 bits with packed weights, to the bit
/// as quire_int{8,4}_gemm and a nonlinearity of their sums in f32. N a multiple of QUIRE_INT_PANEL; grid and block as
/// above.
typedef struct QuireMoeIntParams {
    /// Of quire_quantize: int8 [T, groups * QUIRE_INT_UNIT] and f32 [T, groups]; for down, a row a slot.
    const int8_t* q;
    const float* x_scales;
    /// As in QuireIntGemmParams; rows in the order of QuireMoeGemmParams.
    const void* weight;
    const uint8_t* steps;
    const float* w_scales;
    /// act [T * k, N].
    void* out;
    const int32_t* slots;
    const QuireMoeTile* tiles;
    const int32_t* num_tiles;
    int32_t groups;
    int32_t out_features;
    int32_t top_k;
    /// QUIRE_ACT_*; gate_up only.
    int32_t kind;
} QuireMoeIntParams;

/// quire_moe_combine_{bf16,f16}: out[t] = sum of weights[slot] * y[slot] over t's slots, in rank order, in f32.
/// Grid (rows, hidden / QUIRE_MOE_COMBINE_COLUMNS rounded up, 1), block QUIRE_MOE_COMBINE_THREADS. hidden a multiple of 8.
typedef struct QuireMoeCombineParams {
    /// act [T * k, hidden].
    const void* y;
    const float* weights;
    /// act [T, hidden].
    void* out;
    const int32_t* num_rows;
    int32_t hidden;
    int32_t top_k;
} QuireMoeCombineParams;

#define QUIRE_MOE_ROUTE_THREADS 256
#define QUIRE_MOE_SORT_THREADS 1024
#define QUIRE_MOE_THREADS 128
#define QUIRE_MOE_COMBINE_THREADS 256
#define QUIRE_MOE_COMBINE_COLUMNS 2048

#endif
