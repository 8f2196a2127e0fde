// Arguments of the matrix kernels that are ours: small batches in 16 bits, and weights in 8 and 4 bits. Plain C.
//
// M: rows of x, at most the grid's; `num_rows` points to it on the device. N: outputs, K: inputs.
#ifndef QUIRE_GEMM_PARAMS_H
#define QUIRE_GEMM_PARAMS_H

#include <stdint.h>

#define QUIRE_GEMV_THREADS 256
/// Rows of x at most, and outputs of one block.
#define QUIRE_GEMV_ROWS 8
#define QUIRE_GEMV_OUTPUTS 32

/// quire_gemv_{bf16,f16}[_f32]: out = x w^T + bias, out in the type of x, or f32. Grid (N / QUIRE_GEMV_OUTPUTS rounded
/// up, 1, 1), block QUIRE_GEMV_THREADS. K a multiple of 8. A row's bits do not depend on the other rows or on M.
typedef struct QuireGemvParams {
    /// act [M, x_stride].
    const void* x;
    /// act [N, K], as in the checkpoint.
    const void* weight;
    /// f32 [N], or null.
    const float* bias;
    /// [M, out_stride].
    void* out;
    const int32_t* num_rows;
    int32_t in_features;
    int32_t out_features;
    int32_t x_stride;
    int32_t out_stride;
} QuireGemvParams;

/// Inputs that share a scale of the activations, and a unit of packed weights.
#define QUIRE_INT_UNIT 256
/// Outputs in a panel of packed weights.
#define QUIRE_INT_PANEL 16
#define QUIRE_INT_THREADS 256

/// quire_quantize_{bf16,f16}: activations to 8 bits, as `quantize_activations` of the backend crate, to the bit.
/// Grid (rows, groups / 8 rounded up, 1), block QUIRE_INT_THREADS: a warp a group.
typedef struct QuireQuantizeParams {
    /// act [M, x_stride].
    const void* x;
    /// int8 [M, groups * QUIRE_INT_UNIT], zeros beyond K.
    int8_t* q;
    /// f32 [M, groups].
    float* scales;
    /// M / rows_per_count.
    const int32_t* num_rows;
    int32_t in_features;
    /// K / QUIRE_INT_UNIT, rounded up.
    int32_t groups;
    int32_t x_stride;
    int32_t rows_per_count;
} QuireQuantizeParams;

/// quire_int{8,4}_gemm_{m8,m32,wide}_{bf16,f16,f32}: out = (sum over groups of scale * integer product) * w + bias, in
/// the order that the backend crate's `quant` defines, so all of them give the same bits for any M. The last part of the
/// name is the type of out.
/// m8: grid (panels, M / 8, 1); m32: grid (panels / 2, M / 32, 1); wide: grid (panels / 8, M / 64, 1); all rounded up;
/// block QUIRE_INT_THREADS.
typedef struct QuireIntGemmParams {
    /// Of quire_quantize.
    const int8_t* q;
    const float* x_scales;
    /// Packed: [panel][group][...], see int_gemm.cuh and the host's packing.
    const void* weight;
    /// int4: [panel][group][128] bytes `step | zero << 4`; int8: null.
    const uint8_t* steps;
    /// f32 [panels * QUIRE_INT_PANEL], one scale a row.
    const float* w_scales;
    /// f32 [N], or null.
    const float* bias;
    /// [M, out_stride].
    void* out;
    const int32_t* num_rows;
    int32_t groups;
    int32_t out_features;
    int32_t out_stride;
    int32_t reserved;
} QuireIntGemmParams;

/// quire_embed_int{8,4}: out[t] = scale * (w_scale * value) of row id of a packed matrix, to the bit as the reference. Grid (rows, 1, 1),
/// block QUIRE_INT_THREADS.
typedef struct QuireIntEmbedParams {
    /// As in QuireIntGemmParams.
    const void* weight;
    const uint8_t* steps;
    const float* w_scales;
    /// [T]. `id >= 0`: that row. Otherwise what slot `-1 - id` sampled last: last_tokens[-1 - id].
    const int32_t* token_ids;
    const int32_t* last_tokens;
    /// f32 [T, hidden].
    float* out;
    const int32_t* num_rows;
    int32_t hidden;
    int32_t groups;
    /// Ids outside 0..vocab give rows of NaN.
    int32_t vocab;
    float scale;
} QuireIntEmbedParams;

#define QUIRE_FP8_THREADS 256

/// quire_quantize_fp8_{bf16,f16}: activations to e4m3, as `quantize_fp8` of the backend crate, to the bit. Grid (rows, 1, 1),
/// block QUIRE_FP8_THREADS.
typedef struct QuireFp8QuantizeParams {
    /// act [M, x_stride].
    const void* x;
    /// e4m3 [M, q_stride], zeros beyond K.
    uint8_t* q;
    /// f32 [M].
    float* scales;
    const int32_t* num_rows;
    int32_t in_features;
    int32_t x_stride;
    /// K, rounded up to a multiple of 16.
    int32_t q_stride;
    int32_t reserved;
} QuireFp8QuantizeParams;

/// quire_embed_fp8: out[t] = scale * (w_scale * value) of row id, to the bit as the reference. Grid (rows, 1, 1), block
/// QUIRE_FP8_THREADS.
typedef struct QuireFp8EmbedParams {
    /// e4m3 [vocab, stride].
    const uint8_t* weight;
    /// f32 [vocab].
    const float* w_scales;
    /// As in QuireIntEmbedParams.
    const int32_t* token_ids;
    const int32_t* last_tokens;
    /// f32 [T, hidden].
    float* out;
    const int32_t* num_rows;
    int32_t hidden;
    int32_t stride;
    /// Ids outside 0..vocab give rows of NaN.
    int32_t vocab;
    float scale;
} QuireFp8EmbedParams;

#endif
