// Activations to fp8, a scale for each row, and rows of an fp8 table. The products are cuBLASLt's.
//
// Floor of quire_quantize_fp8: 2 bytes an element read, 1 written (T = 8192, K = 4096: 101 MB, 23 us at 4.3 TB/s). One
// block a row, 16-byte loads; the second pass over the row finds it in the first-level cache.
#pragma once

#include "gemm_params.h"
#include "quire.cuh"

namespace quire {

/// Eight columns of a row; zeros beyond its end.
template <typename T>
QUIRE_DEVICE void load_columns(float (&x)[8], const T* row, int column, int width) {
    if (width % 8 == 0 && column < width) {
        const auto packed = load<Vec<uint32_t, 4>>(row + column);
        QUIRE_UNROLL
        for (int i = 0; i < 4; ++i) {
            const float2 two = unpack2<T>(packed.v[i]);
            x[2 * i] = two.x, x[2 * i + 1] = two.y;
        }
    } else {
        QUIRE_UNROLL
        for (int i = 0; i < 8; ++i) x[i] = column + i < width ? to_f32(row[column + i]) : 0.0f;
    }
}

/// The largest over the block, whose warps all get it.
QUIRE_DEVICE uint32_t block_largest(uint32_t x) {
    QUIRE_SHARED(partials, uint32_t[QUIRE_FP8_THREADS / 32]);
    QUIRE_UNROLL
    for (int offset = 16; offset > 0; offset >>= 1) x = max(x, __shfl_xor_sync(kFullMask, x, offset));
    if (threadIdx.x % 32 == 0) partials[threadIdx.x / 32] = x;
    __syncthreads();
    QUIRE_UNROLL
    for (int i = 0; i < QUIRE_FP8_THREADS / 32; ++i) x = max(x, partials[i]);
    return x;
}

template <typename T>
QUIRE_DEVICE void quantize_fp8(const QuireFp8QuantizeParams& p) {
    constexpr float kTiny = 7.888609e-31f;  // 2^-100
    griddep_launch();
    griddep_wait();
    const int row = int(blockIdx.x);
    if (row >= *p.num_rows) return;
    const T* const from = static_cast<const T*>(p.x) + int64_t(row) * p.x_stride;
    // As integers, so that NaN is the largest.
    uint32_t largest = 0;
    for (int column = int(threadIdx.x) * 8; column < p.in_features; column += QUIRE_FP8_THREADS * 8) {
        float x[8];
        load_columns(x, from, column, p.in_features);
        QUIRE_UNROLL
        for (int i = 0; i < 8; ++i) largest = max(largest, __float_as_uint(x[i]) & 0x7fffffffu);
    }
    const float max_magnitude = __uint_as_float(block_largest(largest));
    const bool is_zero = max_magnitude < kTiny;
    const float inverse = is_zero ? 0.0f : __fdiv_rn(448.0f, max_magnitude);
    for (int column = int(threadIdx.x) * 8; column < p.q_stride; column += QUIRE_FP8_THREADS * 8) {
        float x[8];
        load_columns(x, from, column, p.in_features);
        Vec<e4m3, 8> bytes;
        QUIRE_UNROLL
        for (int i = 0; i < 8; ++i) bytes.v[i] = from_f32<e4m3>(__fmul_rn(x[i], inverse));
        store(reinterpret_cast<e4m3*>(p.q) + int64_t(row) * p.q_stride + column, bytes);
    }
    if (threadIdx.x == 0) p.scales[row] = is_zero ? 0.0f : __fdiv_rn(max_magnitude, 448.0f);
}

QUIRE_DEVICE void embed_fp8(const QuireFp8EmbedParams& p) {
    griddep_launch();
    griddep_wait();
    const int row = int(blockIdx.x);
    if (row >= *p.num_rows) return;
    int id = p.token_ids[row];
    if (id < 0) id = p.last_tokens[-1 - id];
    const bool known = id >= 0 && id < p.vocab;
    const e4m3* const from = reinterpret_cast<const e4m3*>(p.weight) + int64_t(known ? id : 0) * p.stride;
    const float scale = known ? p.w_scales[id] : __uint_as_float(0x7fffffffu);
    float* const to = p.out + int64_t(row) * p.hidden;
    for (int column = int(threadIdx.x); column < p.hidden; column += QUIRE_FP8_THREADS) {
        to[column] = __fmul_rn(p.scale, __fmul_rn(scale, to_f32(from[column])));
    }
}

}  // namespace quire
