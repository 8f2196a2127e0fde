// Weights in 8 and 4 bits, activations in 8: integer products on the tensor cores, one float operation a group of 256
// inputs. The sums are exact and the float operations have a fixed order, so every kernel here gives the same bits as the
// reference, for any number of rows.
//
// Floor: the weights' bytes, once, while rows are few: gate_up of Llama-3.1-8B 62 MB in int4 (14.5 us at 4.3 TB/s), 117
// in int8; 2 M N K operations at 1.2 POPS (mma.sync on Hopper) where they are many.
// How it is met: weights are the A operand (16 outputs a fragment), packed at load so that a lane's 16 bytes of one load
// are whole registers of fragments, and a warp reads 512 consecutive bytes. A code becomes a byte by one multiplication
// and one subtraction for four weights: 6 instructions a register. Few rows (m8, m32): eight warps take a group each and
// pass the integer sums through shared memory to the threads that do the float operations in order; the next round's
// weights are on their way meanwhile (2 KiB a warp and panel, three blocks: 48 KiB). Many rows (wide): each warp has a
// panel of its own and 64 rows, no shared memory, no barrier; the activations come through L1.
//
// Packed order: for each panel of 16 rows, group of 256 inputs, tile of 64 inputs and lane 4 * r + q: inputs
// 16 q .. 16 q + 16 of the tile, of row r and then of row r + 8. int8: one byte each, the rows in separate halves of 512
// bytes. int4: 8 bytes a row; byte b of word w holds input 8 w + b in its low half, 8 w + 4 + b in its high half.
// Steps: 8 bytes for each (r, q / 2): of row r and the four tiles, then of row r + 8.
#pragma once

#include "gemm_params.h"
#include "mma.cuh"

namespace quire {

constexpr int kIntTiles = QUIRE_INT_UNIT / 64;

/// What a lane holds of a panel's weights for one group of inputs.
template <int Bits>
struct IntWeights {
    static constexpr int kLoads = Bits == 8 ? 2 * kIntTiles : kIntTiles;
    static constexpr int kBytes = kLoads * 512;
    uint4 v[kLoads];
    uint2 steps;

    /// Of QuireIntGemmParams or QuireMoeIntParams.
    template <typename Params>
    QUIRE_DEVICE void load(const Params& p, int panel, int group) {
        const int lane = threadIdx.x % 32;
        const size_t unit = size_t(panel) * p.groups + group;
        const auto* from = reinterpret_cast<const uint4*>(static_cast<const char*>(p.weight) + unit * kBytes) + lane;
        QUIRE_UNROLL
        for (int i = 0; i < kLoads; ++i) v[i] = __ldcs(from + 32 * i);
        if constexpr (Bits == 4) steps = __ldcs(reinterpret_cast<const uint2*>(p.steps + unit * 128) + lane / 2);
    }

    /// step * (code - zero) for four codes, one a byte, modulo 256.
    static QUIRE_DEVICE uint32_t widen(uint32_t codes, uint32_t step, uint32_t offset) {
        constexpr uint32_t kHigh = 0x80808080u;
        const uint32_t product = codes * step;
        return ((product | kHigh) - (offset & ~kHigh)) ^ ((product ^ ~offset) & kHigh);
    }

    /// The A fragments of a tile's two halves of 32 inputs.
    QUIRE_DEVICE void fragments(uint32_t (&a)[2][4], int tile) const {
        if constexpr (Bits == 8) {
            const uint4 &low = v[2 * tile], &high = v[2 * tile + 1];
            a[0][0] = low.x, a[0][1] = high.x, a[0][2] = low.y, a[0][3] = high.y;
            a[1][0] = low.z, a[1][1] = high.z, a[1][2] = low.w, a[1][3] = high.w;
        } else {
            const uint32_t words[2][2] = {{v[tile].x, v[tile].y}, {v[tile].z, v[tile].w}};
            QUIRE_UNROLL
            for (int row = 0; row < 2; ++row) {
                const uint32_t byte = (row == 0 ? steps.x : steps.y) >> (8 * tile);
                const uint32_t step = byte & 15, offset = step * (byte >> 4 & 15) * 0x01010101u;
                QUIRE_UNROLL
                for (int half = 0; half < 2; ++half) {
                    a[half][row] = widen(words[row][half] & 0x0f0f0f0fu, step, offset);
                    a[half][2 + row] = widen(words[row][half] >> 4 & 0x0f0f0f0fu, step, offset);
                }
            }
        }
    }
};

/// Integer sums over one group, for some panels and groups of eight rows of x beginning at `row`.
template <int Bits, int Panels, int RowGroups>
QUIRE_DEVICE void int_products(int32_t (&sums)[Panels][RowGroups][4], const QuireIntGemmParams& p,
                               const IntWeights<Bits> (&weights)[Panels], int group, int row, int num_rows) {
    const int lane = threadIdx.x % 32;
    QUIRE_UNROLL
    for (int i = 0; i < Panels * RowGroups * 4; ++i) sums[i / 4 / RowGroups][i / 4 % RowGroups][i % 4] = 0;
    const auto* x = reinterpret_cast<const uint4*>(p.q) + group * (QUIRE_INT_UNIT / 16) + lane % 4;
    QUIRE_UNROLL
    for (int tile = 0; tile < kIntTiles; ++tile) {
        uint32_t a[Panels][2][4];
        QUIRE_UNROLL
        for (int panel = 0; panel < Panels; ++panel) weights[panel].fragments(a[panel], tile);
        QUIRE_UNROLL
        for (int r = 0; r < RowGroups; ++r) {
            const int at = row + 8 * r + lane / 4;
            uint4 b = make_uint4(0, 0, 0, 0);
            if (at < num_rows) b = x[size_t(at) * p.groups * (QUIRE_INT_UNIT / 16) + 4 * tile];
            QUIRE_UNROLL
            for (int panel = 0; panel < Panels; ++panel) {
                mma_m16n8k32_int8(sums[panel][r], a[panel][0], b.x, b.y);
                mma_m16n8k32_int8(sums[panel][r], a[panel][1], b.z, b.w);
            }
        }
    }
}

template <typename Output>
QUIRE_DEVICE void write_int_output(const QuireIntGemmParams& p, int row, int output, float sum) {
    if (output >= p.out_features) return;
    const float bias = p.bias != nullptr ? p.bias[output] : 0.0f;
    const float value = __fadd_rn(__fmul_rn(sum, p.w_scales[output]), bias);
    static_cast<Output*>(p.out)[size_t(row) * p.out_stride + output] = from_f32<Output>(value);
}

/// Few rows: a block has `Panels` panels and 8 * RowGroups rows; each of its warps every eighth group.
template <int Bits, int Panels, int RowGroups, typename Output>
struct IntStream {
    static constexpr int kWarps = QUIRE_INT_THREADS / 32;
    static constexpr int kOutputs = Panels * QUIRE_INT_PANEL;
    static constexpr int kRows = 8 * RowGroups;
    /// Padded so that the eight outputs and four row pairs of a warp's store lie in different banks.
    using Parts = float[2][kWarps][kRows][kOutputs + 4];
    static constexpr int kShare = kOutputs * kRows / QUIRE_INT_THREADS > 0 ? kOutputs * kRows / QUIRE_INT_THREADS : 1;

    static QUIRE_DEVICE void run(const QuireIntGemmParams& p, Parts& parts) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const int panel = blockIdx.x * Panels, row = blockIdx.y * kRows;
        const int panels = (p.out_features + QUIRE_INT_PANEL - 1) / QUIRE_INT_PANEL;
        IntWeights<Bits> weights[Panels];
        const auto load = [&](int group) {
            QUIRE_UNROLL
            for (int i = 0; i < Panels; ++i) weights[i].load(p, min(panel + i, panels - 1), group);
        };
        // Weights are nobody's output: their loads need not wait for the previous kernel.
        if (warp < p.groups) load(warp);
        griddep_wait();
        griddep_launch();
        const int num_rows = *p.num_rows;
        if (row >= num_rows) return;
        float totals[kShare] = {};
        for (int base = 0, buffer = 0; base < p.groups; base += kWarps, buffer ^= 1) {
            const int group = base + warp;
            if (group < p.groups) {
                int32_t sums[Panels][RowGroups][4];
                int_products<Bits, Panels, RowGroups>(sums, p, weights, group, row, num_rows);
                if (group + kWarps < p.groups) load(group + kWarps);
                QUIRE_UNROLL
                for (int i = 0; i < Panels * RowGroups * 4; ++i) {
                    const int at = i / 4 / RowGroups, r = i / 4 % RowGroups, c = i % 4;
                    parts[buffer][warp][8 * r + 2 * (lane % 4) + c % 2][16 * at + 8 * (c / 2) + lane / 4] =
                        float(sums[at][r][c]);
                }
            }
            __syncthreads();
            QUIRE_UNROLL
            for (int i = 0; i < kShare; ++i) {
                const int at = threadIdx.x + i * QUIRE_INT_THREADS, my_row = at / kOutputs;
                if (my_row >= kRows || row + my_row >= num_rows) continue;
                const float* scales = p.x_scales + size_t(row + my_row) * p.groups + base;
                const int groups = min(kWarps, p.groups - base);
                for (int w = 0; w < groups; ++w) {
                    totals[i] = __fmaf_rn(scales[w], parts[buffer][w][my_row][at % kOutputs], totals[i]);
                }
            }
        }
        QUIRE_UNROLL
        for (int i = 0; i < kShare; ++i) {
            const int at = threadIdx.x + i * QUIRE_INT_THREADS, my_row = at / kOutputs;
            if (my_row >= kRows || row + my_row >= num_rows) continue;
            write_int_output<Output>(p, row + my_row, panel * QUIRE_INT_PANEL + at % kOutputs, totals[i]);
        }
    }
};

/// Many rows: each warp has a panel and 64 rows, and goes over all groups alone.
template <int Bits, typename Output>
QUIRE_DEVICE void int_wide(const QuireIntGemmParams& p) {
    constexpr int kRowGroups = 8;
    const int lane = threadIdx.x % 32, row = blockIdx.y * 8 * kRowGroups;
    const int panel = blockIdx.x * (QUIRE_INT_THREADS / 32) + threadIdx.x / 32;
    const bool exists = panel * QUIRE_INT_PANEL < p.out_features;
    IntWeights<Bits> weights[1];
    if (exists) weights[0].load(p, panel, 0);
    griddep_wait();
    griddep_launch();
    const int num_rows = *p.num_rows;
    if (!exists || row >= num_rows) return;
    float totals[kRowGroups][4] = {};
    for (int group = 0; group < p.groups; ++group) {
        const IntWeights<Bits> now[1] = {weights[0]};
        if (group + 1 < p.groups) weights[0].load(p, panel, group + 1);
        int32_t sums[1][kRowGroups][4];
        int_products<Bits, 1, kRowGroups>(sums, p, now, group, row, num_rows);
        QUIRE_UNROLL
        for (int r = 0; r < kRowGroups; ++r) {
            QUIRE_UNROLL
            for (int j = 0; j < 2; ++j) {
                const int at = row + 8 * r + 2 * (lane % 4) + j;
                const float scale = at < num_rows ? p.x_scales[size_t(at) * p.groups + group] : 0.0f;
                totals[r][j] = __fmaf_rn(scale, float(sums[0][r][j]), totals[r][j]);
                totals[r][2 + j] = __fmaf_rn(scale, float(sums[0][r][2 + j]), totals[r][2 + j]);
            }
        }
    }
    QUIRE_UNROLL
    for (int i = 0; i < kRowGroups * 4; ++i) {
        const int r = i / 4, c = i % 4, at = row + 8 * r + 2 * (lane % 4) + c % 2;
        if (at < num_rows) write_int_output<Output>(p, at, panel * QUIRE_INT_PANEL + 8 * (c / 2) + lane / 4, totals[r][c]);
    }
}

/// One group of one row of activations to bytes, by a warp.
template <typename Number>
QUIRE_DEVICE void quantize_group(const QuireQuantizeParams& p, int row, int group) {
    constexpr float kTiny = 7.888609e-31f, kUlpIsOne = 12582912.0f;  // 2^-100; 1.5 * 2^23
    const int lane = threadIdx.x % 32, column = group * QUIRE_INT_UNIT + 8 * lane;
    const Number* from = static_cast<const Number*>(p.x) + size_t(row) * p.x_stride + column;
    float x[8];
    // As integers, so that NaN is the largest.
    uint32_t largest = 0;
    QUIRE_UNROLL
    for (int i = 0; i < 8; ++i) {
        x[i] = column + i < p.in_features ? to_f32(from[i]) : 0.0f;
        largest = max(largest, __float_as_uint(x[i]) & 0x7fffffffu);
    }
    QUIRE_UNROLL
    for (int offset = 16; offset > 0; offset >>= 1) largest = max(largest, __shfl_xor_sync(kFullMask, largest, offset));
    const float max_magnitude = __uint_as_float(largest);
    const bool is_zero = max_magnitude < kTiny;
    const float inverse = __fdiv_rn(127.0f, max_magnitude);
    uint32_t words[2] = {0, 0};
    QUIRE_UNROLL
    for (int i = 0; i < 8; ++i) {
        const uint32_t bits = __float_as_uint(__fadd_rn(__fmul_rn(x[i], inverse), kUlpIsOne));
        if (!is_zero) words[i / 4] |= (bits & 0xffu) << (8 * (i % 4));
    }
    const size_t at = size_t(row) * p.groups + group;
    *reinterpret_cast<uint2*>(p.q + at * QUIRE_INT_UNIT + 8 * lane) = make_uint2(words[0], words[1]);
    if (lane == 0) p.scales[at] = is_zero ? 0.0f : __fdiv_rn(max_magnitude, 127.0f);
}

template <typename Number>
QUIRE_DEVICE void quantize_activations(const QuireQuantizeParams& p) {
    griddep_wait();
    griddep_launch();
    const int group = blockIdx.y * (QUIRE_INT_THREADS / 32) + threadIdx.x / 32;
    if (int(blockIdx.x) < *p.num_rows * p.rows_per_count && group < p.groups) quantize_group<Number>(p, blockIdx.x, group);
}

/// A row of a packed matrix, back in f32. A thread takes the 16 inputs of one lane.
template <int Bits>
QUIRE_DEVICE void int_embed(const QuireIntEmbedParams& p) {
    griddep_wait();
    griddep_launch();
    const int row = int(blockIdx.x);
    if (row >= *p.num_rows) return;
    int id = p.token_ids[row];
    if (id < 0) id = p.last_tokens[-1 - id];
    const bool known = id >= 0 && id < p.vocab;
    const int r = known ? id % 8 : 0, half = known ? id / 8 % 2 : 0, panel = known ? id / QUIRE_INT_PANEL : 0;
    const float scale = known ? p.w_scales[id] : __uint_as_float(0x7fffffffu);
    for (int column = 16 * int(threadIdx.x); column < p.hidden; column += 16 * int(blockDim.x)) {
        const size_t unit = size_t(panel) * p.groups + column / QUIRE_INT_UNIT;
        const int tile = column % QUIRE_INT_UNIT / 64, lane = 4 * r + column % 64 / 16;
        uint32_t words[4];
        if constexpr (Bits == 8) {
            const auto* from = static_cast<const char*>(p.weight) + unit * IntWeights<8>::kBytes;
            const uint4 v = *reinterpret_cast<const uint4*>(from + (2 * tile + half) * 512 + lane * 16);
            words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
        } else {
            const auto* from = static_cast<const char*>(p.weight) + unit * IntWeights<4>::kBytes;
            const uint4 both = *reinterpret_cast<const uint4*>(from + tile * 512 + lane * 16);
            const uint2 v = half == 0 ? make_uint2(both.x, both.y) : make_uint2(both.z, both.w);
            const uint32_t byte = p.steps[unit * 128 + lane / 2 * 8 + half * 4 + tile];
            const uint32_t step = byte & 15, offset = step * (byte >> 4) * 0x01010101u;
            QUIRE_UNROLL
            for (int i = 0; i < 4; ++i) {
                words[i] = IntWeights<4>::widen((i < 2 ? v.x : v.y) >> (4 * (i % 2)) & 0x0f0f0f0fu, step, offset);
            }
        }
        float* out = p.out + size_t(row) * p.hidden + column;
        QUIRE_UNROLL
        for (int i = 0; i < 16; ++i) {
            const float value = float(int8_t(words[i / 4] >> (8 * (i % 4))));
            if (column + i < p.hidden) out[i] = __fmul_rn(p.scale, __fmul_rn(scale, value));
        }
    }
}

}  // namespace quire
