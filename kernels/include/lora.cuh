// LoRA adapters, any mix of them in a batch: shrink by A, expand by B (arXiv 2106.09685; batched as in Punica, arXiv
// 2310.18547, and S-LoRA, arXiv 2311.03285).
//
// Floor: the factors of each adapter, once a step: r = 16 on all linear layers of Llama-3.1-8B 84 MB, 20 us at 4.3 TB/s.
// In decoding every row has a block of its own, so that rows of one adapter meet in the L2 cache. Of a prompt eight rows
// share a block and what it reads of A, and walk over B while it is in the L1 cache; what is left is the bytes of x and out.
// Nothing but the row's own adapter and values decides about a bit: not the kernel, not the other rows of the block.
#pragma once

#include "lora_params.h"
#include "quire.cuh"

namespace quire {

/// `sum + a * x` over eight numbers, in their order.
template <typename T>
QUIRE_DEVICE float lora_dot8(float sum, const Vec<uint32_t, 4>& a, const Vec<uint32_t, 4>& x) {
    QUIRE_UNROLL
    for (int i = 0; i < 4; ++i) {
        const float2 u = unpack2<T>(a.v[i]), v = unpack2<T>(x.v[i]);
        sum = __fmaf_rn(u.x, v.x, sum);
        sum = __fmaf_rn(u.y, v.y, sum);
    }
    return sum;
}

/// A row of A times the rows of `group`, in every lane.
template <typename T, int kRows>
QUIRE_DEVICE void lora_dots(float (&sums)[kRows], const T* a, const T* x, int in_features, uint32_t group) {
    const int lane = int(threadIdx.x) % 32;
    QUIRE_UNROLL
    for (int i = 0; i < kRows; ++i) sums[i] = 0.0f;
    if (in_features % 8 == 0) {
        for (int k = 8 * lane; k < in_features; k += 256) {
            const auto weights = load<Vec<uint32_t, 4>>(a + k);
            QUIRE_UNROLL
            for (int i = 0; i < kRows; ++i) {
                if (!(group >> i & 1)) continue;
                sums[i] = lora_dot8<T>(sums[i], weights, load<Vec<uint32_t, 4>>(x + int64_t(i) * in_features + k));
            }
        }
    } else {
        for (int k = lane; k < in_features; k += 32) {
            const float weight = to_f32(a[k]);
            QUIRE_UNROLL
            for (int i = 0; i < kRows; ++i) {
                if (group >> i & 1) sums[i] = __fmaf_rn(weight, to_f32(x[int64_t(i) * in_features + k]), sums[i]);
            }
        }
    }
    QUIRE_UNROLL
    for (int i = 0; i < kRows; ++i) sums[i] = warp_sum(sums[i]);
}

/// The factor of a row of A.
QUIRE_DEVICE float lora_scaling(const QuireLoraAdapter& adapter, int rank) {
    float scaling = 0.0f;
    QUIRE_UNROLL
    for (int i = 0; i < QUIRE_LORA_PARTS; ++i) {
        const QuireLoraPart& part = adapter.parts[i];
        if (i < adapter.num_parts && rank >= part.rank_begin && rank < part.rank_begin + part.rank) scaling = part.scaling;
    }
    return scaling;
}

template <typename T, int kRows>
QUIRE_DEVICE void lora_shrink(const QuireLoraShrinkParams& p) {
    griddep_launch();
    griddep_wait();
    const int first = int(blockIdx.x) * kRows, rows = min(*p.num_rows - first, kRows);
    const int rank = int(blockIdx.y) * QUIRE_LORA_RANKS + int(threadIdx.x) / 32;
    const T* const x = static_cast<const T*>(p.x) + int64_t(first) * p.in_features;
    uint32_t left = rows > 0 ? (1u << rows) - 1 : 0;
    // Rows that share an adapter, one group after the other; which rows are in a group never shows in a sum.
    for (int i = 0; i < rows; ++i) {
        if (!(left >> i & 1)) continue;
        const int id = p.row_adapters[first + i];
        uint32_t group = 0;
        for (int j = i; j < rows; ++j) group |= uint32_t(p.row_adapters[first + j] == id) << j;
        left &= ~group;
        if (id < 0 || rank >= p.adapters[id].rank) continue;
        const QuireLoraAdapter& adapter = p.adapters[id];
        float sums[kRows];
        lora_dots<T, kRows>(sums, static_cast<const T*>(adapter.a) + int64_t(rank) * p.in_features, x, p.in_features, group);
        if (threadIdx.x % 32 != 0) continue;
        const float scaling = lora_scaling(adapter, rank);
        QUIRE_UNROLL
        for (int j = 0; j < kRows; ++j) {
            if (group >> j & 1) p.out[int64_t(first + j) * p.stride + rank] = __fmul_rn(sums[j], scaling);
        }
    }
}

/// A row of B times the shrunk row.
template <typename T>
QUIRE_DEVICE float lora_column(const QuireLoraPart& part, int column, const float* x) {
    const T* const b = static_cast<const T*>(part.b) + int64_t(column - part.first) * part.rank;
    float sum = 0.0f;
    for (int j = 0; j < part.rank; j += 8) {
        const auto weights = load<Vec<uint32_t, 4>>(b + j);
        const auto low = load<Vec<float, 4>>(x + j), high = load<Vec<float, 4>>(x + j + 4);
        QUIRE_UNROLL
        for (int i = 0; i < 4; ++i) {
            const float2 w = unpack2<T>(weights.v[i]);
            const Vec<float, 4>& s = i < 2 ? low : high;
            sum = __fmaf_rn(w.x, s.v[2 * (i % 2)], sum);
            sum = __fmaf_rn(w.y, s.v[2 * (i % 2) + 1], sum);
        }
    }
    return sum;
}

template <typename T, int kRows>
QUIRE_DEVICE void lora_expand(const QuireLoraExpandParams& p) {
    griddep_launch();
    griddep_wait();
    const int first = int(blockIdx.x) * kRows, rows = min(*p.num_rows - first, kRows);
    const int column = int(blockIdx.y) * QUIRE_LORA_COLUMNS + int(threadIdx.x);
    if (column >= p.out_features) return;
    for (int row = first; row < first + rows; ++row) {
        const int id = p.row_adapters[row];
        if (id < 0) continue;
        const QuireLoraAdapter& adapter = p.adapters[id];
        for (int i = 0; i < adapter.num_parts; ++i) {
            const QuireLoraPart& part = adapter.parts[i];
            if (column < part.first || column >= part.first + part.count) continue;
            const float sum = lora_column<T>(part, column, p.x + int64_t(row) * p.stride + part.rank_begin);
            T* const out = static_cast<T*>(p.out) + int64_t(row) * p.out_features + column;
            *out = from_f32<T>(__fadd_rn(to_f32(*out), sum));
        }
    }
}

}  // namespace quire
