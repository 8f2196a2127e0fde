// Attention of sequences with few query rows (decode, and short speculation): one warp-wide M of 16 rows for a block of
// four warps, so that all query heads of a KV head share one read of its cache.
//
// Floor: the bytes of K and V, once. Llama-3.1-8B at 64 sequences of 2048 tokens: 537 MB a layer, 125 us at 4.3 TB/s.
// How it is met: 64 KiB of tiles a block (32 KiB of keys, 32 KiB of values), three blocks on a multiprocessor of 227 KiB
// (two on one of 163, one on one of 99) with at most 168 registers a thread.
// While a tile is computed at least one tile of keys and one of values is on its way: 3 * 32 KiB in flight a
// multiprocessor at head_dim 128, against the 32 KiB that 4.3 TB/s need at 1 us of latency. The loads run on from one
// item into the next, so a block never drains its pipeline before its last item. Arithmetic of a tile (64 tokens) is 16
// mma for the scores and 16 for the values in each warp, two barriers and one exponential for 2 scores a thread: near
// 1000 cycles, of the 5000 that the memory takes for the three tiles.
//
// The warps share a tile by tokens for the scores and by dimensions for the values, and meet twice: for the row maxima,
// and for the weights, which go through shared memory as the A fragments they already are.
#pragma once

#include "attention_tile.cuh"

namespace quire {

template <typename Number, bool Fp8, int Dim>
struct DecodeBlock {
    using Tile = KvTile<Fp8, Dim, QUIRE_DECODE_THREADS>;
    using Keys = KeyFragments<Number, Fp8, Tile>;
    using Values = ValueFragments<Number, Fp8, Tile>;
    using Out = OutputChunk<Fp8>;

    static constexpr int kWarps = QUIRE_DECODE_THREADS / 32;
    static constexpr int kTokens = Tile::kTokens;
    /// Tiles of keys, and of values, in shared memory.
    static constexpr int kStages = 32768 / Tile::kBytes;
    /// Groups of 8 tokens, and chunks of 16 bytes of dimensions, of one warp.
    static constexpr int kTokenGroups = kTokens / 8 / kWarps;
    static constexpr int kOutChunks = Tile::kChunks / kWarps;
    static constexpr int kGroups = Values::kColumns;
    /// Where the query fragments are: in registers, or, from 128 dimensions on, one copy for all warps.
    static constexpr bool kSharedQuery = Dim > 64;

    // Dynamic shared memory: keys, values, weights, maxima, scales.
    static constexpr int kWeightBytes = 16 * kTokens * 2;
    static constexpr int kWeights = 2 * kStages * Tile::kBytes;
    /// fp8: the weights times the values' scales, then the weights alone; else the same.
    static constexpr int kPlainWeights = kWeights + (Fp8 ? kWeightBytes : 0);
    static constexpr int kMaxima = kPlainWeights + kWeightBytes;
    static constexpr int kScales = kMaxima + kWarps * 16 * 4;
    static constexpr int kSharedBytes = kScales + (Fp8 ? 2 * kStages * kTokens * 4 : 0);

    const QuireAttentionParams& p;
    const ScoreRule rule;
    unsigned char* const memory;
    const SharedAddress shared;
    const int warp, lane;
    KvLoader<Fp8, Tile, true> loader;
    /// Slot of the current tile.
    int stage = 0;

    // The item's rows lane / 4 and lane / 4 + 8, and this warp's share of their sums.
    uint4 own_query[kSharedQuery ? 1 : Dim / 16];
    float max[2];
    float sum[4];
    float value_scale[kTokenGroups][2];
    float out[kOutChunks * kGroups][4];
    RowSum total[2];
    float total_out[kOutChunks * kGroups][4];

    QUIRE_DEVICE DecodeBlock(const QuireAttentionParams& params, unsigned char* dynamic, int num_work)
        : p(params),
          rule(params),
          memory(dynamic),
          shared(shared_address(dynamic)),
          warp(threadIdx.x / 32),
          lane(threadIdx.x % 32),
          loader(params, num_work) {}

    QUIRE_DEVICE SharedAddress keys(int slot) const { return shared + slot * Tile::kBytes; }
    QUIRE_DEVICE SharedAddress values(int slot) const { return shared + (kStages + slot) * Tile::kBytes; }
    /// Factors of keys, then of values; they come with the keys.
    static QUIRE_DEVICE int scales(int slot) { return kScales + slot * 2 * kTokens * 4; }

    /// Values of the tile before the loader's, keys of the loader's: one group of copies. Keys are needed first, so they
    /// run one tile ahead.
    QUIRE_DEVICE void fetch(int value_slot, int key_slot) {
        loader.copy(loader.last, 1, values(value_slot));
        loader.copy(loader.next, 0, keys(key_slot));
        loader.copy_scales(loader.next, shared + scales(key_slot));
        cp_async_commit();
        loader.advance();
    }
    QUIRE_DEVICE void fill_pipeline() {
        loader.copy(loader.next, 0, keys(0));
        loader.copy_scales(loader.next, shared + scales(0));
        cp_async_commit();
        loader.advance();
        QUIRE_UNROLL
        for (int slot = 0; slot + 1 < kStages; ++slot) fetch(slot, slot + 1);
        cp_async_wait<kStages - 1>();
        __syncthreads();
    }

    QUIRE_DEVICE void clear() {
        max[0] = max[1] = negative_infinity();
        QUIRE_UNROLL
        for (int i = 0; i < 4; ++i) sum[i] = 0.0f;
        QUIRE_UNROLL
        for (int j = 0; j < kOutChunks * kGroups; ++j) {
            QUIRE_UNROLL
            for (int i = 0; i < 4; ++i) out[j][i] = 0.0f;
        }
    }

    /// The scores of this warp's tokens, in units of the rule's factor; fp8: also the factors of their values.
    QUIRE_DEVICE void score(float (&s)[kTokenGroups][4], int token, const Sight& low, const Sight& high) {
        QUIRE_UNROLL
        for (int i = 0; i < kTokenGroups * 4; ++i) s[i / 4][i % 4] = 0.0f;
        QUIRE_UNROLL
        for (int step = 0; step < Keys::kSteps; ++step) {
            uint32_t a[Keys::kPerStep][4];
            QUIRE_UNROLL
            for (int i = 0; i < Keys::kPerStep; ++i) query(step * Keys::kPerStep + i, a[i]);
            QUIRE_UNROLL
            for (int g = 0; g < kTokenGroups; ++g) {
                Keys k;
                k.load(keys(stage), (warp * kTokenGroups + g) * 8, step);
                QUIRE_UNROLL
                for (int i = 0; i < Keys::kPerStep; ++i) mma_m16n8k16<Number>(s[g], a[i], k.b[i][0], k.b[i][1]);
            }
        }
        QUIRE_UNROLL
        for (int g = 0; g < kTokenGroups; ++g) {
            const int first = (warp * kTokenGroups + g) * 8;
            QUIRE_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int at = first + 2 * (lane % 4) + i % 2;
                if constexpr (Fp8) {
                    const float* factor = reinterpret_cast<const float*>(memory + scales(stage)) + at;
                    s[g][i] = __fmul_rn(s[g][i], factor[0]);
                    if (i < 2) value_scale[g][i] = factor[kTokens];
                }
                if (rule.cap > 0.0f) s[g][i] = rule.capped(s[g][i]);
                s[g][i] = (i < 2 ? low : high).masked(s[g][i], token + at);
            }
        }
    }

    /// New row maxima over the whole tile; returns by what the old sums shrink. Between its barrier and the next, the
    /// keys' slot and the slot of the previous values are free: new copies start.
    QUIRE_DEVICE void agree_on_max(const float (&s)[kTokenGroups][4], float (&shrink)[2], float (&base)[2]) {
        auto* maxima = reinterpret_cast<float*>(memory + kMaxima);
        QUIRE_UNROLL
        for (int i = 0; i < 2; ++i) {
            float m = negative_infinity();
            QUIRE_UNROLL
            for (int g = 0; g < kTokenGroups; ++g) m = fmaxf(m, fmaxf(s[g][2 * i], s[g][2 * i + 1]));
            m = fmaxf(m, __shfl_xor_sync(kFullMask, m, 1));
            m = fmaxf(m, __shfl_xor_sync(kFullMask, m, 2));
            if (lane % 4 == 0) maxima[warp * 16 + lane / 4 + 8 * i] = m;
        }
        __syncthreads();
        fetch(stage == 0 ? kStages - 1 : stage - 1, stage);
        QUIRE_UNROLL
        for (int i = 0; i < 2; ++i) {
            const float* of_row = maxima + lane / 4 + 8 * i;
            const float m = fmaxf(fmaxf(of_row[0], of_row[16]), fmaxf(of_row[32], of_row[48]));
            const float now = fmaxf(max[i], __fmul_rn(m, rule.factor));
            base[i] = finite_max(now);
            shrink[i] = exp2_approx(__fsub_rn(max[i], base[i]));
            max[i] = now;
        }
    }

    /// Puts this warp's weights where all warps find them, as A fragments.
    QUIRE_DEVICE void share_weights(const float (&s)[kTokenGroups][4], const float (&base)[2]) {
        QUIRE_UNROLL
        for (int g = 0; g < kTokenGroups; ++g) {
            const int group = warp * kTokenGroups + g;
            float w[4];
            QUIRE_UNROLL
            for (int i = 0; i < 4; ++i) w[i] = exp2_approx(__fmaf_rn(s[g][i], rule.factor, -base[i / 2]));
            const int place = ((group / 2) * 32 + lane) * 16 + group % 2 * 8;
            const uint2 plain = make_uint2(pack2<Number>(w[0], w[1]), pack2<Number>(w[2], w[3]));
            *reinterpret_cast<uint2*>(memory + kPlainWeights + place) = plain;
            if constexpr (Fp8) {
                QUIRE_UNROLL
                for (int i = 0; i < 4; ++i) w[i] = __fmul_rn(w[i], value_scale[g][i % 2]);
                *reinterpret_cast<uint2*>(memory + kWeights + place) =
                    make_uint2(pack2<Number>(w[0], w[1]), pack2<Number>(w[2], w[3]));
            }
        }
    }
    QUIRE_DEVICE void load_weights(int offset, int chunk, uint32_t (&a)[4]) const {
        const uint4 v = *reinterpret_cast<const uint4*>(memory + offset + (chunk * 32 + lane) * 16);
        a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
    }

    QUIRE_DEVICE void add_values(const float (&shrink)[2]) {
        QUIRE_UNROLL
        for (int i = 0; i < 4; ++i) sum[i] = __fmul_rn(sum[i], shrink[i / 2]);
        QUIRE_UNROLL
        for (int j = 0; j < kOutChunks * kGroups; ++j) {
            QUIRE_UNROLL
            for (int i = 0; i < 4; ++i) out[j][i] = __fmul_rn(out[j][i], shrink[i / 2]);
        }
        QUIRE_UNROLL
        for (int half = 0; half < kTokens / 32; ++half) {
            uint32_t weights[2][4];
            QUIRE_UNROLL
            for (int t = 0; t < 2; ++t) {
                load_weights(kPlainWeights, 2 * half + t, weights[t]);
                mma_m16n8k16<Number>(sum, weights[t], ones<Number>(), ones<Number>());
                if constexpr (Fp8) load_weights(kWeights, 2 * half + t, weights[t]);
            }
            QUIRE_UNROLL
            for (int c = 0; c < kOutChunks; ++c) {
                Values v;
                v.load(values(stage), 32 * half, warp * kOutChunks + c);
                QUIRE_UNROLL
                for (int t = 0; t < 2; ++t) {
                    QUIRE_UNROLL
                    for (int g = 0; g < kGroups; ++g) {
                        mma_m16n8k16<Number>(out[c * kGroups + g], weights[t], v.b[t][g][0], v.b[t][g][1]);
                    }
                }
            }
        }
    }

    QUIRE_DEVICE void tile(int token, const Sight& low, const Sight& high) {
        float s[kTokenGroups][4], shrink[2], base[2];
        score(s, token, low, high);
        agree_on_max(s, shrink, base);
        share_weights(s, base);
        cp_async_wait<kStages - 1>();
        __syncthreads();
        add_values(shrink);
        stage = stage + 1 == kStages ? 0 : stage + 1;
    }

    /// The split is over: into the item's sums, or into memory for the block that adds up.
    QUIRE_DEVICE void end_split(const QuireAttentionItem& item, int head, int split) {
        QUIRE_UNROLL
        for (int i = 0; i < 2; ++i) {
            const Row row(p, item, head, lane / 4 + 8 * i);
            if (item.partial >= 0) {
                const size_t index = partial_index(p, item, head, split, lane / 4 + 8 * i);
                QUIRE_UNROLL
                for (int c = 0; c < kOutChunks; ++c) {
                    Out::write_partial(p, row, index, warp * kOutChunks + c, out + c * kGroups, i == 1);
                }
                if (warp == 0 && lane % 4 == 0 && row.exists) {
                    reinterpret_cast<float2*>(p.partial_max_sum)[index] = make_float2(max[i], sum[2 * i]);
                }
            } else {
                const MergeFactors f = merge(total[i], RowSum{max[i], sum[2 * i]});
                QUIRE_UNROLL
                for (int j = 0; j < kOutChunks * kGroups; ++j) {
                    total_out[j][2 * i] = merge(f, total_out[j][2 * i], out[j][2 * i]);
                    total_out[j][2 * i + 1] = merge(f, total_out[j][2 * i + 1], out[j][2 * i + 1]);
                }
            }
        }
        clear();
    }

    static QUIRE_DEVICE uint4* shared_query() {
        QUIRE_SHARED(fragments, uint4[kSharedQuery ? Dim * 2 : 1]);
        return fragments;
    }
    QUIRE_DEVICE void query(int chunk, uint32_t (&a)[4]) const {
        const uint4 v = kSharedQuery ? shared_query()[chunk * 32 + lane] : own_query[kSharedQuery ? 0 : chunk];
        a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
    }
    /// The last item's have been read by all warps: they met since.
    QUIRE_DEVICE void load_queries(const QuireAttentionItem& item, int head) {
        const Row low(p, item, head, lane / 4), high(p, item, head, lane / 4 + 8);
        if constexpr (kSharedQuery) {
            QUIRE_UNROLL
            for (int i = 0; i < Dim / 16 / kWarps; ++i) {
                const int chunk = i * kWarps + warp;
                shared_query()[chunk * 32 + lane] = load_query<Number, Fp8>(p, low, high, chunk);
            }
            __syncthreads();
        } else {
            QUIRE_UNROLL
            for (int chunk = 0; chunk < Dim / 16; ++chunk) own_query[chunk] = load_query<Number, Fp8>(p, low, high, chunk);
        }
    }

    QUIRE_DEVICE void run_item(const QuireAttentionItem& item, int head) {
        const Sight low = Sight::of(p, item, lane / 4), high = Sight::of(p, item, lane / 4 + 8);
        load_queries(item, head);
        clear();
        total[0] = total[1] = RowSum{negative_infinity(), 0.0f};
        QUIRE_UNROLL
        for (int j = 0; j < kOutChunks * kGroups; ++j) {
            QUIRE_UNROLL
            for (int i = 0; i < 4; ++i) total_out[j][i] = 0.0f;
        }
        int split = item.split_offset;
        const int end = item.kv_end;
        for (int token = item.kv_begin / kTokens * kTokens; token < end; token += kTokens) {
            tile(token, low, high);
            const int after = token + kTokens;
            if (after % QUIRE_KV_SPLIT == 0 || after >= end) end_split(item, head, split++);
        }
        if (item.partial >= 0) {
            arrive_and_merge<Number>(p, item, head);
            return;
        }
        QUIRE_UNROLL
        for (int i = 0; i < 2; ++i) {
            const Row row(p, item, head, lane / 4 + 8 * i);
            const float f = finish(p, total[i], row.head);
            QUIRE_UNROLL
            for (int c = 0; c < kOutChunks; ++c) {
                Out::template write<Number>(p, row, warp * kOutChunks + c, total_out + c * kGroups, i == 1, f);
            }
        }
    }
};

template <typename Number, bool Fp8, int Dim>
QUIRE_DEVICE void attention_decode(const QuireAttentionParams& p) {
    QUIRE_DYNAMIC_SHARED(memory);
    griddep_wait();
    const int num_work = *p.num_items * p.num_kv_heads;
    if (int(blockIdx.x) >= num_work) return;
    DecodeBlock<Number, Fp8, Dim> block(p, memory, num_work);
    block.fill_pipeline();
    griddep_launch();
    for (int work = blockIdx.x; work < num_work; work += gridDim.x) {
        block.run_item(p.items[work / p.num_kv_heads], work % p.num_kv_heads);
    }
}

}  // namespace quire
