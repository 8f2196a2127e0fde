// The nonlinearity of feed-forward layers, with the gate's product where there is one.
//
// Floor: gated reads 4 and writes 2 bytes an output: T = 8192, width 14336: 705 MB, 164 us at 4.3 TB/s. A thread has two
// independent vectors, so four 16-byte loads in flight: 128 KB on a full multiprocessor. No shared memory, no barrier.
#pragma once

#include "params.h"
#include "quire.cuh"

namespace quire {

template <int kKind>
QUIRE_DEVICE float activate(float x) {
    if (kKind == QUIRE_ACT_SILU) return __fdividef(x, 1.0f + __expf(-x));
    if (kKind == QUIRE_ACT_GELU_TANH) {
        const float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
        return 0.5f * x * (1.0f + tanhf(inner));
    }
    if (kKind == QUIRE_ACT_GELU) return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
    return fmaxf(x, 0.0f);
}

/// Eight columns a thread, a warp's neighbours.
QUIRE_DEVICE void soft_cap(const QuireSoftCapParams& p) {
    griddep_launch();
    griddep_wait();
    const int row = int(blockIdx.x);
    if (row >= *p.num_rows) return;
    float* const x = p.x + int64_t(row) * p.stride;
    const int first = int(blockIdx.y) * 8 * QUIRE_ROW_THREADS, end = min(first + 8 * QUIRE_ROW_THREADS, p.cols);
    for (int col = first + int(threadIdx.x); col < end; col += QUIRE_ROW_THREADS) {
        x[col] = p.cap * tanhf(__fdividef(x[col], p.cap));
    }
}

template <typename T, int kKind>
QUIRE_DEVICE void act_row(const QuireActParams& p, int row) {
    constexpr int kVectors = 2, kTile = QUIRE_ACT_THREADS * 8;
    const T* const in = static_cast<const T*>(p.in) + int64_t(row) * p.width * (p.gated ? 2 : 1);
    T* const out = static_cast<T*>(p.out) + int64_t(row) * p.width;
    const int first = int(blockIdx.y) * kVectors * kTile + int(threadIdx.x) * 8;
    Vec<uint32_t, 4> gate[kVectors], up[kVectors];
    QUIRE_UNROLL
    for (int i = 0; i < kVectors; ++i) {
        const int col = first + i * kTile;
        if (col >= p.width) continue;
        gate[i] = load_once<Vec<uint32_t, 4>>(in + col);
        if (p.gated) up[i] = load_once<Vec<uint32_t, 4>>(in + p.width + col);
    }
    QUIRE_UNROLL
    for (int i = 0; i < kVectors; ++i) {
        const int col = first + i * kTile;
        if (col >= p.width) continue;
        Vec<uint32_t, 4> packed;
        QUIRE_UNROLL
        for (int j = 0; j < 4; ++j) {
            const float2 g = unpack2<T>(gate[i].v[j]);
            float x = activate<kKind>(g.x), y = activate<kKind>(g.y);
            if (p.gated) {
                const float2 u = unpack2<T>(up[i].v[j]);
                x *= u.x, y *= u.y;
            }
            packed.v[j] = pack2<T>(x, y);
        }
        store(out + col, packed);
    }
}

template <typename T, int kKind>
QUIRE_DEVICE void act_row_any(const QuireActParams& p, int row) {
    constexpr int kColumns = QUIRE_ACT_THREADS * 16;
    const T* const in = static_cast<const T*>(p.in) + int64_t(row) * p.width * (p.gated ? 2 : 1);
    T* const out = static_cast<T*>(p.out) + int64_t(row) * p.width;
    const int first = int(blockIdx.y) * kColumns, end = min(first + kColumns, p.width);
    for (int col = first + int(threadIdx.x); col < end; col += QUIRE_ACT_THREADS) {
        const float x = activate<kKind>(to_f32(in[col]));
        out[col] = from_f32<T>(p.gated ? x * to_f32(in[p.width + col]) : x);
    }
}

template <typename T, bool kAny, int kKind>
QUIRE_DEVICE void act_kind(const QuireActParams& p, int row) {
    if (kAny) {
        act_row_any<T, kKind>(p, row);
    } else {
        act_row<T, kKind>(p, row);
    }
}

template <typename T, bool kAny>
QUIRE_DEVICE void act(const QuireActParams& p) {
    griddep_launch();
    griddep_wait();
    const int row = int(blockIdx.x);
    if (row >= *p.num_rows) return;
    switch (p.kind) {
        case QUIRE_ACT_SILU: return act_kind<T, kAny, QUIRE_ACT_SILU>(p, row);
        case QUIRE_ACT_GELU_TANH: return act_kind<T, kAny, QUIRE_ACT_GELU_TANH>(p, row);
        case QUIRE_ACT_GELU: return act_kind<T, kAny, QUIRE_ACT_GELU>(p, row);
        default: return act_kind<T, kAny, QUIRE_ACT_RELU>(p, row);
    }
}

}  // namespace quire
