// Up to eight rows times a 16-bit matrix, as in decoding few sequences.
//
// Floor: the weights' bytes, once: gate_up of Llama-3.1-8B 235 MB, 55 us at 4.3 TB/s.
// How it is met: the weights are the A operand of mma (16 outputs a fragment) and the rows of x the B operand, so eight
// rows cost the same as one and nothing is padded to 16. Any order of k within an instruction is right as long as both
// operands have it, so a lane takes eight consecutive inputs of one weight row by one 16-byte load, and x the same way:
// no shared memory, no transposition. Eight warps take every eighth block of 64 inputs, two loads of weights ahead:
// 8 KiB of loads on their way for each warp, 128 KiB for two blocks on a multiprocessor (40 KiB would do).
// The warps' sums meet in shared memory and are added in the order of the warps. Nothing depends on M.
#pragma once

#include "gemm_params.h"
#include "mma.cuh"

namespace quire {

template <typename Number, typename Output>
struct GemvBlock {
    static constexpr int kWarps = QUIRE_GEMV_THREADS / 32;
    static constexpr int kTiles = QUIRE_GEMV_OUTPUTS / 16;
    static constexpr int kBlock = 64;
    static constexpr int kStep = kWarps * kBlock;

    /// What a lane loads for a block of inputs: [tile][row half][32 inputs].
    struct Weights {
        uint4 v[kTiles][2][kBlock / 32];
    };
    using Sums = float[kWarps][kTiles * 16][QUIRE_GEMV_ROWS + 1];

    const QuireGemvParams& p;
    const int warp, lane, first;

    QUIRE_DEVICE explicit GemvBlock(const QuireGemvParams& params)
        : p(params), warp(threadIdx.x / 32), lane(threadIdx.x % 32), first(blockIdx.x * QUIRE_GEMV_OUTPUTS) {}

    QUIRE_DEVICE void load_weights(Weights& w, int k) const {
        QUIRE_UNROLL
        for (int tile = 0; tile < kTiles; ++tile) {
            QUIRE_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int row = first + 16 * tile + 8 * half + lane / 4;
                const Number* from = static_cast<const Number*>(p.weight) + size_t(row) * p.in_features;
                QUIRE_UNROLL
                for (int i = 0; i < kBlock / 32; ++i) {
                    const int column = k + 32 * i + 8 * (lane % 4);
                    const bool exists = row < p.out_features && column < p.in_features;
                    w.v[tile][half][i] = exists ? __ldcs(reinterpret_cast<const uint4*>(from + column))
                                                : make_uint4(0, 0, 0, 0);
                }
            }
        }
    }

    QUIRE_DEVICE void multiply(float (&sum)[kTiles][4], const Weights& w, int k, int num_rows) const {
        QUIRE_UNROLL
        for (int i = 0; i < kBlock / 32; ++i) {
            const int row = lane / 4, column = k + 32 * i + 8 * (lane % 4);
            uint4 x = make_uint4(0, 0, 0, 0);
            if (row < num_rows && column < p.in_features) {
                x = *reinterpret_cast<const uint4*>(static_cast<const Number*>(p.x) + size_t(row) * p.x_stride + column);
            }
            QUIRE_UNROLL
            for (int tile = 0; tile < kTiles; ++tile) {
                const uint4 &low = w.v[tile][0][i], &high = w.v[tile][1][i];
                const uint32_t a[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
                mma_m16n8k16<Number>(sum[tile], a[0], x.x, x.y);
                mma_m16n8k16<Number>(sum[tile], a[1], x.z, x.w);
            }
        }
    }

    QUIRE_DEVICE void run(Sums& sums) const {
        float sum[kTiles][4] = {};
        Weights next;
        int k = warp * kBlock;
        // Weights are nobody's output: their loads need not wait for the previous kernel.
        load_weights(next, k);
        griddep_wait();
        griddep_launch();
        const int num_rows = min(*p.num_rows, QUIRE_GEMV_ROWS);
        for (; k < p.in_features; k += kStep) {
            const Weights now = next;
            if (k + kStep < p.in_features) load_weights(next, k + kStep);
            multiply(sum, now, k, num_rows);
        }
        QUIRE_UNROLL
        for (int tile = 0; tile < kTiles; ++tile) {
            QUIRE_UNROLL
            for (int i = 0; i < 4; ++i) sums[warp][16 * tile + 8 * (i / 2) + lane / 4][2 * (lane % 4) + i % 2] = sum[tile][i];
        }
        __syncthreads();
        const int output = threadIdx.x % QUIRE_GEMV_OUTPUTS, row = threadIdx.x / QUIRE_GEMV_OUTPUTS;
        if (row >= num_rows || first + output >= p.out_features) return;
        float total = p.bias != nullptr ? p.bias[first + output] : 0.0f;
        QUIRE_UNROLL
        for (int w = 0; w < kWarps; ++w) total = __fadd_rn(total, sums[w][output][row]);
        static_cast<Output*>(p.out)[size_t(row) * p.out_stride + first + output] = from_f32<Output>(total);
    }
};

template <typename Number, typename Output>
QUIRE_DEVICE void gemv(const QuireGemvParams& p) {
    using Block = GemvBlock<Number, Output>;
    static_assert(QUIRE_GEMV_THREADS == QUIRE_GEMV_OUTPUTS * QUIRE_GEMV_ROWS, "a thread an output");
    QUIRE_SHARED(sums, typename Block::Sums);
    Block(p).run(sums);
}

}  // namespace quire
