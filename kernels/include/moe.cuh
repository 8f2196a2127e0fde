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
//
// Weights in e4m3: half the bytes, and the same instructions. A 16-byte load is 16 inputs then, which become fragments of T
// in registers (exactly; ten operations for four weights, once for all rows of a tile); what activations were rounded to
// stays. Products of e4m3 with e4m3 would take activations in 8 bits: a launch more before each product, another
// rounding by up to a sixteenth, and sm_89 at least. They would pay only where rows are many, which experts rarely have.
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

/// Eight weights of a lane, of row r of a panel and of row r + 8, as A of two instructions: each with 16 inputs, of which
/// this lane has four.
template <typename T>
QUIRE_DEVICE void moe_fragments(uint32_t (&a)[2][4], const uint32_t (&low)[4], const uint32_t (&high)[4]) {
    QUIRE_UNROLL
    for (int i = 0; i < 2; ++i) {
        a[i][0] = low[2 * i], a[i][1] = high[2 * i], a[i][2] = low[2 * i + 1], a[i][3] = high[2 * i + 1];
    }
}

/// The same of e4m3.
template <typename T>
QUIRE_DEVICE void moe_fragments(uint32_t (&a)[2][4], const uint32_t (&low)[2], const uint32_t (&high)[2]) {
    QUIRE_UNROLL
    for (int i = 0; i < 2; ++i) {
        // Widening takes bytes 0 and 2, and 1 and 3.
        widen_e4m3<T>(__byte_perm(low[i], 0, 0x3120), a[i][0], a[i][2]);
        widen_e4m3<T>(__byte_perm(high[i], 0, 0x3120), a[i][1], a[i][3]);
    }
}

/// W: T or e4m3. Inputs are counted in octets: eight of each of four lanes, 32 in all. A lane's octets lie side by side
/// as far as 16 bytes go.
template <typename T, typename W, bool kGated, int kGroups>
struct MoeTile {
    /// Octets that lie side by side.
    static constexpr int kAdjacent = 2 / int(sizeof(W));
    /// Words of an octet.
    static constexpr int kWords = 2 * int(sizeof(W));
    /// Octets of a step. With many rows, sums take the registers, and the other half of 16 bytes waits in L1.
    static constexpr int kOctets = kGroups <= 2 ? 2 * kAdjacent : kGroups <= 4 ? kAdjacent : 1;
    /// Octets of a load.
    static constexpr int kPerLoad = kOctets < kAdjacent ? kOctets : kAdjacent;

    const QuireMoeGemmParams& p;
    const QuireMoeTile& tile;
    /// First output of each of the warp's panels.
    int outputs[2];
    const W* panels[2];
    /// Rows of x that this lane loads from; negative past the tile's last. Numbers, as pointers would take the registers.
    int rows[kGroups];

    struct Weights {
        /// [panel][half of its rows][octet]
        uint32_t v[2][2][kOctets][kWords];
    };

    QUIRE_DEVICE MoeTile(const QuireMoeGemmParams& params, const QuireMoeTile& tile, int first)
        : p(params), tile(tile) {
        const int lane = int(threadIdx.x) % 32;
        const int64_t matrix = int64_t(p.out_features) * p.in_features;
        const W* const expert = static_cast<const W*>(p.weight) + tile.expert * matrix * (kGated ? 2 : 1);
        outputs[0] = first;
        outputs[1] = kGated ? first : first + 16;
        panels[0] = expert;
        panels[1] = kGated ? expert + matrix : expert;
        QUIRE_UNROLL
        for (int r = 0; r < kGroups; ++r) {
            const int row = 8 * r + lane / 4;
            rows[r] = -1;
            if (row >= tile.count) continue;
            const int slot = p.slots[tile.first + row];
            rows[r] = kGated ? slot / p.top_k : slot;
        }
    }

    /// First input of this lane's octet.
    static QUIRE_DEVICE int column(int octet) {
        const int lane = int(threadIdx.x) % 32;
        return octet / kAdjacent * kAdjacent * 32 + (lane % 4 * kAdjacent + octet % kAdjacent) * 8;
    }

    QUIRE_DEVICE void load(Weights& w, int first) const {
        const int lane = fresh_lane();
        QUIRE_UNROLL
        for (int i = 0; i < 4 * kOctets; i += kPerLoad) {
            const int panel = i / 2 / kOctets, half = i / kOctets % 2, octet = i % kOctets;
            const int output = outputs[panel] + 8 * half + lane / 4, at = column(first + octet);
            Vec<uint32_t, kWords * kPerLoad> words{};
            if (output < p.out_features && at < p.in_features) {
                words = quire::load<decltype(words)>(panels[panel] + int64_t(output) * p.in_features + at);
            }
            QUIRE_UNROLL
            for (int j = 0; j < kWords * kPerLoad; ++j) w.v[panel][half][octet + j / kWords][j % kWords] = words.v[j];
        }
    }

    QUIRE_DEVICE void multiply(float (&sum)[2][kGroups][4], const Weights& w, int first) const {
        QUIRE_UNROLL
        for (int octet = 0; octet < kOctets; ++octet) {
            const int at = column(first + octet);
            uint32_t a[2][2][4];
            QUIRE_UNROLL
            for (int panel = 0; panel < 2; ++panel) moe_fragments<T>(a[panel], w.v[panel][0][octet], w.v[panel][1][octet]);
            QUIRE_UNROLL
            for (int r = 0; r < kGroups; ++r) {
                uint4 x = make_uint4(0, 0, 0, 0);
                const T* const from = static_cast<const T*>(p.x) + int64_t(rows[r]) * p.in_features + at;
                if (rows[r] >= 0 && at < p.in_features) x = *reinterpret_cast<const uint4*>(from);
                QUIRE_UNROLL
                for (int panel = 0; panel < 2; ++panel) {
                    mma_m16n8k16<T>(sum[panel][r], a[panel][0], x.x, x.y);
                    mma_m16n8k16<T>(sum[panel][r], a[panel][1], x.z, x.w);
                }
            }
        }
    }

    /// Of an output of a panel.
    QUIRE_DEVICE float scaled(int panel, int output, float sum) const {
        if (sizeof(W) == sizeof(T)) return sum;
        const int64_t matrix = (kGated ? 2 : 1) * int64_t(tile.expert) + (kGated ? panel : 0);
        return sum * p.w_scales[matrix * p.out_features + output];
    }

    QUIRE_DEVICE void run() const {
        float sum[2][kGroups][4] = {};
        Weights next;
        load(next, 0);
        const int end = (p.in_features + 32 * kAdjacent - 1) / (32 * kAdjacent) * kAdjacent;
        for (int octet = 0; octet < end; octet += kOctets) {
            const Weights now = next;
            if (octet + kOctets < end) load(next, octet + kOctets);
            multiply(sum, now, octet);
        }
        const int lane = int(threadIdx.x) % 32;
        QUIRE_UNROLL
        for (int i = 0; i < kGroups * 2; ++i) {
            const int r = i / 2, row = 8 * r + 2 * (lane % 4) + i % 2;
            if (row >= tile.count) continue;
            T* const out = static_cast<T*>(p.out) + int64_t(p.slots[tile.first + row]) * p.out_features;
            QUIRE_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int c = 2 * half + i % 2, first = outputs[0] + 8 * half + lane / 4;
                const int second = outputs[1] + 8 * half + lane / 4;
                if (first >= p.out_features) continue;
                const float low = scaled(0, first, sum[0][r][c]);
                if (kGated) {
                    out[first] = from_f32<T>(moe_activate(p.kind, low) * scaled(1, second, sum[1][r][c]));
                } else {
                    out[first] = from_f32<T>(low);
                    if (second < p.out_features) out[second] = from_f32<T>(scaled(1, second, sum[1][r][c]));
                }
            }
        }
    }
};

template <typename T, typename W, bool kGated>
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
            MoeTile<T, W, kGated, 1>(p, tile, first).run();
        } else if (tile.count <= 16) {
            MoeTile<T, W, kGated, 2>(p, tile, first).run();
        } else if (tile.count <= 32) {
            MoeTile<T, W, kGated, 4>(p, tile, first).run();
        } else {
            MoeTile<T, W, kGated, 8>(p, tile, first).run();
        }
    }
}

}  // namespace quire
