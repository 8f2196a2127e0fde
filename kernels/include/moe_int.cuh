// Mixtures of experts with weights in 8 and 4 bits: int_gemm.cuh's products, tile by tile as in moe.cuh.
//
// Floor: the weights' bytes, once, of the experts that were chosen: half of moe.cuh's, or a quarter and an eighth more.
// How it is met: a warp has two panels of 16 outputs and loads 4 KiB (int4: 2) of one at once; twelve warps on a
// multiprocessor have 48 KiB (24) on their way, against the 32 that the latency takes. A tile's rows come in groups of eight,
// of which those are computed that there are. Integer sums are exact and the float operations of an output follow the
// groups of inputs in order, so that no row shows its company.
#pragma once

#include "int_gemm.cuh"
#include "moe.cuh"

namespace quire {

template <int Bits, typename T, bool kGated>
struct MoeIntTile {
    static constexpr int kRowGroups = QUIRE_MOE_TILE_ROWS / 8;

    const QuireMoeIntParams& p;
    const QuireMoeTile& tile;
    /// First output of the warp's first panel, within the expert; and that panel's number, within the matrix.
    int output;
    int panel;
    float totals[2][kRowGroups][4] = {};

    QUIRE_DEVICE MoeIntTile(const QuireMoeIntParams& params, const QuireMoeTile& tile, int first)
        : p(params), tile(tile), output(first) {
        panel = (tile.expert * p.out_features * (kGated ? 2 : 1) + first) / QUIRE_INT_PANEL;
    }

    /// Row of q that this lane loads from in a group of rows. Looked up each time: eight of them would take registers.
    QUIRE_DEVICE int source(int r) const {
        // Rows past the tile's last repeat it.
        const int row = min(8 * r + fresh_lane() / 4, tile.count - 1), slot = p.slots[tile.first + row];
        return kGated ? slot / p.top_k : slot;
    }

    QUIRE_DEVICE bool has_second() const { return kGated || output + QUIRE_INT_PANEL < p.out_features; }
    /// Number of a panel. One that does not exist is computed as the first once more, and not written.
    QUIRE_DEVICE int panel_of(int i) const {
        if (i == 0 || !has_second()) return panel;
        return panel + (kGated ? p.out_features / QUIRE_INT_PANEL : 1);
    }

    /// Adds one group of inputs to one group of rows, for panel `which`.
    QUIRE_DEVICE void add(const IntWeights<Bits>& weights, int which, int group, int r) {
        const int lane = int(threadIdx.x) % 32, from = source(r);
        const auto* x = reinterpret_cast<const uint4*>(p.q) +
                        (size_t(from) * p.groups + group) * (QUIRE_INT_UNIT / 16) + lane % 4;
        int32_t sums[4] = {};
        QUIRE_UNROLL
        for (int i = 0; i < kIntTiles; ++i) {
            const uint4 b = x[4 * i];
            uint32_t a[2][4];
            weights.fragments(a, i);
            mma_m16n8k32_int8(sums, a[0], b.x, b.y);
            mma_m16n8k32_int8(sums, a[1], b.z, b.w);
        }
        QUIRE_UNROLL
        for (int j = 0; j < 2; ++j) {
            // The row of a sum is one that another lane loads.
            const int row = __shfl_sync(kFullMask, from, 4 * (2 * (lane % 4) + j));
            const float scale = p.x_scales[size_t(row) * p.groups + group];
            QUIRE_UNROLL
            for (int half = 0; half < 2; ++half) {
                float& total = totals[which][r][2 * half + j];
                total = __fmaf_rn(scale, float(sums[2 * half + j]), total);
            }
        }
    }

    QUIRE_DEVICE float scaled(int which, int half, float total) const {
        const int row = panel_of(which) * QUIRE_INT_PANEL + 8 * half + int(threadIdx.x) % 32 / 4;
        // As with a bias of zero.
        return __fadd_rn(__fmul_rn(total, p.w_scales[row]), 0.0f);
    }

    QUIRE_DEVICE void write(int r) const {
        const int lane = int(threadIdx.x) % 32;
        QUIRE_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int row = 8 * r + 2 * (lane % 4) + i % 2, half = i / 2;
            if (row >= tile.count) continue;
            T* const out = static_cast<T*>(p.out) + int64_t(p.slots[tile.first + row]) * p.out_features + output +
                           8 * half + lane / 4;
            const float low = scaled(0, half, totals[0][r][i]), high = scaled(1, half, totals[1][r][i]);
            if (kGated) {
                *out = from_f32<T>(__fmul_rn(moe_activate(p.kind, low), high));
            } else {
                *out = from_f32<T>(low);
                if (has_second()) out[QUIRE_INT_PANEL] = from_f32<T>(high);
            }
        }
    }

    QUIRE_DEVICE void run() {
        for (int group = 0; group < p.groups; ++group) {
            QUIRE_UNROLL
            for (int which = 0; which < 2; ++which) {
                IntWeights<Bits> weights;
                weights.load(p, panel_of(which), group);
                QUIRE_UNROLL
                for (int r = 0; r < kRowGroups; ++r) {
                    if (8 * r < tile.count) add(weights, which, group, r);
                }
            }
        }
        QUIRE_UNROLL
        for (int r = 0; r < kRowGroups; ++r) {
            if (8 * r < tile.count) write(r);
        }
    }
};

template <int Bits, typename T, bool kGated>
QUIRE_DEVICE void moe_int(const QuireMoeIntParams& p) {
    constexpr int kOutputs = kGated ? QUIRE_MOE_TILE_OUTPUTS : QUIRE_MOE_PAIR_OUTPUTS;
    constexpr int kWarps = QUIRE_MOE_THREADS / 32;
    griddep_wait();
    griddep_launch();
    const int parts = (p.out_features + kOutputs - 1) / kOutputs, items = *p.num_tiles * parts;
    for (int item = int(blockIdx.x); item < items; item += int(gridDim.x)) {
        const QuireMoeTile tile = p.tiles[item / parts];
        const int first = item % parts * kOutputs + int(threadIdx.x) / 32 * (kOutputs / kWarps);
        if (first < p.out_features) MoeIntTile<Bits, T, kGated>(p, tile, first).run();
    }
}

}  // namespace quire
