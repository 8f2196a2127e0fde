// Mixtures of experts: the products of each expert with the rows that chose it.
//
// Floor: while an expert has few rows, its weights' bytes, once. Qwen3-30B-A3B at T = 64 (all 128 experts, four rows each):
// gate_up 805 MB, 187 us at 4.3 TB/s, down 403 MB, 94 us. Where rows are many, 2 M N K at what mma.sync gives.
// How it is met: as in gemv.cuh, the weights are the A operand, whose order of k within an instruction is that of 16-byte
// loads, so that fragments come straight from memory: no shared memory, no barrier. A warp has two panels of 16 outputs:
// the gate's and up's of the same outputs, or two neighbours; and a tile's rows in groups of eight, of which it computes
// those that there are (1, 2, 4 or 8 groups, a code each). The next weights are on their way meanwhile: 4 KiB a warp, 64
// KiB on a multiprocessor. Many rows: 16 products a load of x, which four warps share through L1, and the tiles of one
// expert run side by side, so that its weights come through L2.
// Every output is one chain over k in the same order, whatever the number of rows: no row shows its company.
#pragma once

#include "activation.cuh"
#include "moe_params.h"
#include "mma.cuh"

namespace quire {

QUIRE_DEVICE float moe_activate(int kind, float x) {
    switch (kind) {
        case QUIRE_ACT_SILU: return activate<QUIRE_ACT_SILU>(x);
        case QUIRE_ACT_GELU_TANH: return activate<QUIRE_ACT_GELU_TANH>(x);
        case QUIRE_ACT_GELU: return activate<QUIRE_ACT_GELU>(x);
        default: return activate<QUIRE_ACT_RELU>(x);
    }
}

template <typename T, bool kGated, int kGroups>
struct MoeTile {
    /// Inputs of a step, in chunks of 32: a 16-byte load of each of four lanes.
    static constexpr int kChunks = kGroups <= 2 ? 2 : 1;

    const QuireMoeGemmParams& p;
    const QuireMoeTile& tile;
    /// First output of each of the warp's panels.
    int outputs[2];
    const T* panels[2];
    /// Rows of x that this lane loads from; null past the tile's last.
    const T* rows[kGroups];

    struct Weights {
        /// [panel][half of its rows][chunk]
        uint4 v[2][2][kChunks];
    };

    QUIRE_DEVICE MoeTile(const QuireMoeGemmParams& params, const QuireMoeTile& tile, int first)
        : p(params), tile(tile) {
        const int lane = int(threadIdx.x) % 32;
        const int64_t matrix = int64_t(p.out_features) * p.in_features;
        const T* const expert = static_cast<const T*>(p.weight) + tile.expert * matrix * (kGated ? 2 : 1);
        outputs[0] = first;
        outputs[1] = kGated ? first : first + 16;
        panels[0] = expert;
        panels[1] = kGated ? expert + matrix : expert;
        QUIRE_UNROLL
        for (int r = 0; r < kGroups; ++r) {
            const int row = 8 * r + lane / 4;
            rows[r] = nullptr;
            if (row >= tile.count) continue;
            const int slot = p.slots[tile.first + row];
            rows[r] = static_cast<const T*>(p.x) + int64_t(kGated ? slot / p.top_k : slot) * p.in_features;
        }
    }

    QUIRE_DEVICE void load(Weights& w, int k) const {
        const int lane = int(threadIdx.x) % 32;
        QUIRE_UNROLL
        for (int i = 0; i < 4 * kChunks; ++i) {
            const int panel = i / 2 / kChunks, half = i / kChunks % 2, chunk = i % kChunks;
            const int output = outputs[panel] + 8 * half + lane / 4, column = k + 32 * chunk + 8 * (lane % 4);
            const bool exists = output < p.out_features && column < p.in_features;
            const T* const from = panels[panel] + int64_t(output) * p.in_features + column;
            w.v[panel][half][chunk] = exists ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
        }
    }

    QUIRE_DEVICE void multiply(float (&sum)[2][kGroups][4], const Weights& w, int k) const {
        const int lane = int(threadIdx.x) % 32;
        QUIRE_UNROLL
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            const int column = k + 32 * chunk + 8 * (lane % 4);
            QUIRE_UNROLL
            for (int r = 0; r < kGroups; ++r) {
                uint4 x = make_uint4(0, 0, 0, 0);
                if (rows[r] != nullptr && column < p.in_features) x = *reinterpret_cast<const uint4*>(rows[r] + column);
                QUIRE_UNROLL
                for (int panel = 0; panel < 2; ++panel) {
                    const uint4 &low = w.v[panel][0][chunk], &high = w.v[panel][1][chunk];
                    const uint32_t a[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
                    mma_m16n8k16<T>(sum[panel][r], a[0], x.x, x.y);
                    mma_m16n8k16<T>(sum[panel][r], a[1], x.z, x.w);
                }
            }
        }
    }

    QUIRE_DEVICE void run() const {
        float sum[2][kGroups][4] = {};
        Weights next;
        load(next, 0);
        for (int k = 0; k < p.in_features; k += 32 * kChunks) {
            const Weights now = next;
            if (k + 32 * kChunks < p.in_features) load(next, k + 32 * kChunks);
            multiply(sum, now, k);
        }
        const int lane = int(threadIdx.x) % 32;
        QUIRE_UNROLL
        for (int i = 0; i < kGroups * 2; ++i) {
            const int r = i / 2, row = 8 * r + 2 * (lane % 4) + i % 2;
            if (row >= tile.count) continue;
            T* const out = static_cast<T*>(p.out) + int64_t(p.slots[tile.first + row]) * p.out_features;
            QUIRE_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int output = 8 * half + lane / 4, c = 2 * half + i % 2;
                const float low = sum[0][r][c], high = sum[1][r][c];
                if (kGated) {
                    if (outputs[0] + output >= p.out_features) continue;
                    out[outputs[0] + output] = from_f32<T>(moe_activate(p.kind, low) * high);
                } else {
                    if (outputs[0] + output < p.out_features) out[outputs[0] + output] = from_f32<T>(low);
                    if (outputs[1] + output < p.out_features) out[outputs[1] + output] = from_f32<T>(high);
                }
            }
        }
    }
};

template <typename T, bool kGated>
QUIRE_DEVICE void moe_gemm(const QuireMoeGemmParams& p) {
    constexpr int kOutputs = kGated ? QUIRE_MOE_TILE_OUTPUTS : QUIRE_MOE_PAIR_OUTPUTS;
    constexpr int kWarps = QUIRE_MOE_THREADS / 32;
    griddep_wait();
    griddep_launch();
    const int parts = (p.out_features + kOutputs - 1) / kOutputs, items = *p.num_tiles * parts;
    for (int item = int(blockIdx.x); item < items; item += int(gridDim.x)) {
        const QuireMoeTile tile = p.tiles[item / parts];
        const int first = item % parts * kOutputs + int(threadIdx.x) / 32 * (kOutputs / kWarps);
        if (first >= p.out_features) continue;
        if (tile.count <= 8) {
            MoeTile<T, kGated, 1>(p, tile, first).run();
        } else if (tile.count <= 16) {
            MoeTile<T, kGated, 2>(p, tile, first).run();
        } else if (tile.count <= 32) {
            MoeTile<T, kGated, 4>(p, tile, first).run();
        } else {
            MoeTile<T, kGated, 8>(p, tile, first).run();
        }
    }
}

}  // namespace quire
