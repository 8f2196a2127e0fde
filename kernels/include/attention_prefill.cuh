// Attention of sequences with many query rows (prompts, chunks of prompts, long speculation). Each warp has 16 or 32
// rows of a tile of 128 (64 at head_dim 256) and computes them alone; the warps share the keys and values. The rows are
// those of one KV head: its query heads side by side, so that a tile of 128 rows covers 128 / group tokens.
//
// Floor: 2 * head_dim * 2 FLOP for each row and token it sees: a prompt of 8192 tokens of Llama-3.1-8B 0.55 TFLOP a
// layer, 0.70 ms at 790 TFLOP/s. mma.sync reaches near 60 % of that on Hopper (all of it on Ampere and Ada).
// How it is met: scores and weights never leave registers (a score fragment is a weight fragment); keys and values of
// the next tile are on their way while a tile is computed; one barrier a tile; fragments of keys and values serve all
// rows of a warp; accumulators are rescaled only where a maximum moved; masks only on the tiles that need them.
//
// The sums of a finished split are carried in device memory (64 KiB a block, hence in L2) while the next split runs: to
// keep two sets of accumulators in registers would cost more than 1 / 16 of the tiles' time, which this costs at most,
// and most prompts have few splits.
#pragma once

#include "attention_tile.cuh"

namespace quire {

template <typename Number, bool Fp8, int Dim>
struct PrefillBlock {
    using Tile = KvTile<Fp8, Dim, QUIRE_PREFILL_THREADS>;
    using Keys = KeyFragments<Number, Fp8, Tile>;
    using Values = ValueFragments<Number, Fp8, Tile>;
    using Out = OutputChunk<Fp8>;

    static constexpr int kWarps = QUIRE_PREFILL_THREADS / 32;
    static constexpr int kRows = 16 * kWarps;
    static constexpr int kTokens = Tile::kTokens;
    static constexpr int kStages = 2;
    static constexpr int kGroups = Values::kColumns;
    static constexpr int kOuts = Tile::kChunks * kGroups;
    static constexpr int kTokenGroups = kTokens / 8;

    // Dynamic shared memory: queries as fragments, keys, values, scales.
    static constexpr int kKeys = kRows * Dim * 2;
    static constexpr int kValues = kKeys + kStages * Tile::kBytes;
    static constexpr int kScales = kValues + kStages * Tile::kBytes;
    static constexpr int kSharedBytes = kScales + (Fp8 ? kStages * 2 * kTokens * 4 : 0);

    const QuireAttentionParams& p;
    const ScoreRule rule;
    unsigned char* const memory;
    const SharedAddress shared;
    const int warp, lane;
    KvLoader<Fp8, Tile, false> loader;
    int stage = 0;

    // Of rows lane / 4 and lane / 4 + 8 of the warp: sums of values in this split, and the rest. At 256 dimensions no
    // registers are left for the latter between its uses.
    float out[kOuts][4];
    struct RowState {
        Sight sight[2];
        /// Of this split; the sum as a fragment, all columns alike.
        float max[2], sum[4];
        /// Of the splits that are over.
        RowSum total[2];
    };
    static constexpr bool kSharedState = Dim > 128 && !Fp8;
    RowState own_state;
    QUIRE_DEVICE RowState state() const { return kSharedState ? shared_states()[threadIdx.x] : own_state; }
    QUIRE_DEVICE void keep_state(const RowState& state) {
        if (kSharedState) shared_states()[threadIdx.x] = state;
        else own_state = state;
    }
    static QUIRE_DEVICE RowState* shared_states() {
        if constexpr (kSharedState) {
            QUIRE_SHARED(states, RowState[QUIRE_PREFILL_THREADS]);
            return states;
        } else {
            return nullptr;
        }
    }

    QUIRE_DEVICE PrefillBlock(const QuireAttentionParams& params, unsigned char* dynamic, int num_work)
        : p(params),
          rule(params),
          memory(dynamic),
          shared(shared_address(dynamic)),
          warp(threadIdx.x / 32),
          lane(threadIdx.x % 32),
          loader(params, num_work) {}

    QUIRE_DEVICE SharedAddress keys(int slot) const { return shared + kKeys + slot * Tile::kBytes; }
    QUIRE_DEVICE SharedAddress values(int slot) const { return shared + kValues + slot * Tile::kBytes; }
    static QUIRE_DEVICE int scales(int slot) { return kScales + slot * 2 * kTokens * 4; }

    QUIRE_DEVICE void fetch(int slot) {
        loader.copy(loader.next, 0, keys(slot));
        loader.copy(loader.next, 1, values(slot));
        loader.copy_scales(loader.next, shared + scales(slot));
        cp_async_commit();
        loader.advance();
    }

    // A warp's queries stay in shared memory as fragments; no other warp touches them.
    QUIRE_DEVICE uint4* query(int chunk) const {
        return reinterpret_cast<uint4*>(memory) + (warp * (Dim / 16) + chunk) * 32 + lane;
    }
    QUIRE_DEVICE void keep_query(const QuireAttentionItem& item, int head) const {
        const Row low(p, item, head, warp * 16 + lane / 4), high(p, item, head, warp * 16 + lane / 4 + 8);
        QUIRE_UNROLL
        for (int chunk = 0; chunk < Dim / 16; ++chunk) {
            *query(chunk) = load_query<Number, Fp8>(p, low, high, chunk);
        }
    }

    /// Begins a split.
    QUIRE_DEVICE void clear(RowState& rows) {
        rows.max[0] = rows.max[1] = negative_infinity();
        QUIRE_UNROLL
        for (int i = 0; i < 4; ++i) rows.sum[i] = 0.0f;
        keep_state(rows);
        QUIRE_UNROLL
        for (int j = 0; j < kOuts; ++j) {
            QUIRE_UNROLL
            for (int i = 0; i < 4; ++i) out[j][i] = 0.0f;
        }
    }

    QUIRE_DEVICE void multiply_keys(float (&s)[kTokenGroups][4]) const {
        QUIRE_UNROLL
        for (int g = 0; g < kTokenGroups; ++g) {
            QUIRE_UNROLL
            for (int i = 0; i < 4; ++i) s[g][i] = 0.0f;
        }
        QUIRE_UNROLL
        for (int step = 0; step < Keys::kSteps; ++step) {
            uint32_t a[Keys::kPerStep][4];
            QUIRE_UNROLL
            for (int i = 0; i < Keys::kPerStep; ++i) {
                const uint4 v = *query(step * Keys::kPerStep + i);
                a[i][0] = v.x, a[i][1] = v.y, a[i][2] = v.z, a[i][3] = v.w;
            }
            QUIRE_UNROLL
            for (int g = 0; g < kTokenGroups; ++g) {
                Keys k;
                k.load(keys(stage), 8 * g, step);
                QUIRE_UNROLL
                for (int i = 0; i < Keys::kPerStep; ++i) mma_m16n8k16<Number>(s[g], a[i], k.b[i][0], k.b[i][1]);
            }
        }
    }

    /// From products to scores.
    QUIRE_DEVICE void finish_scores(float (&s)[kTokenGroups][4], int token, const RowState& rows) const {
        const Sight &low = rows.sight[0], &high = rows.sight[1];
        if constexpr (Fp8) {
            const float* factor = reinterpret_cast<const float*>(memory + scales(stage)) + 2 * (lane % 4);
            QUIRE_UNROLL
            for (int g = 0; g < kTokenGroups; ++g) {
                QUIRE_UNROLL
                for (int i = 0; i < 4; ++i) s[g][i] = __fmul_rn(s[g][i], factor[8 * g + i % 2]);
            }
        }
        if (rule.cap > 0.0f) {
            QUIRE_UNROLL
            for (int g = 0; g < kTokenGroups; ++g) {
                QUIRE_UNROLL
                for (int i = 0; i < 4; ++i) s[g][i] = rule.capped(s[g][i]);
            }
        }
        const bool all = token >= low.begin && token >= high.begin && token + kTokens <= low.end &&
                         token + kTokens <= high.end;
        if (__all_sync(kFullMask, all)) return;
        QUIRE_UNROLL
        for (int g = 0; g < kTokenGroups; ++g) {
            QUIRE_UNROLL
            for (int i = 0; i < 4; ++i) {
                s[g][i] = (i < 2 ? low : high).masked(s[g][i], token + 8 * g + 2 * (lane % 4) + i % 2);
            }
        }
    }

    /// New row maxima; the old sums shrink accordingly.
    QUIRE_DEVICE void raise_max(const float (&s)[kTokenGroups][4], float (&base)[2], RowState& rows) {
        float shrink[2];
        QUIRE_UNROLL
        for (int i = 0; i < 2; ++i) {
            float m = negative_infinity();
            QUIRE_UNROLL
            for (int g = 0; g < kTokenGroups; ++g) m = fmaxf(m, fmaxf(s[g][2 * i], s[g][2 * i + 1]));
            m = fmaxf(m, __shfl_xor_sync(kFullMask, m, 1));
            m = fmaxf(m, __shfl_xor_sync(kFullMask, m, 2));
            const float now = fmaxf(rows.max[i], __fmul_rn(m, rule.factor));
            base[i] = finite_max(now);
            shrink[i] = exp2_approx(__fsub_rn(rows.max[i], base[i]));
            rows.max[i] = now;
        }
        if (!__any_sync(kFullMask, shrink[0] != 1.0f || shrink[1] != 1.0f)) return;
        QUIRE_UNROLL
        for (int i = 0; i < 4; ++i) rows.sum[i] = __fmul_rn(rows.sum[i], shrink[i / 2]);
        QUIRE_UNROLL
        for (int j = 0; j < kOuts; ++j) {
            QUIRE_UNROLL
            for (int i = 0; i < 4; ++i) out[j][i] = __fmul_rn(out[j][i], shrink[i / 2]);
        }
    }

    /// Weights of 16 tokens as an A fragment, in place of their scores.
    QUIRE_DEVICE void weigh(float (&s)[kTokenGroups][4], const float (&base)[2], int chunk, uint32_t (&a)[4]) const {
        QUIRE_UNROLL
        for (int h = 0; h < 2; ++h) {
            float(&w)[4] = s[2 * chunk + h];
            QUIRE_UNROLL
            for (int i = 0; i < 4; ++i) w[i] = exp2_approx(__fmaf_rn(w[i], rule.factor, -base[i / 2]));
            a[2 * h] = pack2<Number>(w[0], w[1]);
            a[2 * h + 1] = pack2<Number>(w[2], w[3]);
        }
    }
    /// fp8: the same weights times the factors of the values.
    QUIRE_DEVICE void scale_weights(const float (&s)[kTokenGroups][4], int chunk, uint32_t (&a)[4]) const {
        const float* factor = reinterpret_cast<const float*>(memory + scales(stage)) + kTokens + 2 * (lane % 4);
        QUIRE_UNROLL
        for (int h = 0; h < 2; ++h) {
            const int g = 2 * chunk + h;
            a[2 * h] = pack2<Number>(__fmul_rn(s[g][0], factor[8 * g]), __fmul_rn(s[g][1], factor[8 * g + 1]));
            a[2 * h + 1] = pack2<Number>(__fmul_rn(s[g][2], factor[8 * g]), __fmul_rn(s[g][3], factor[8 * g + 1]));
        }
    }

    QUIRE_DEVICE void add_values(float (&s)[kTokenGroups][4], const float (&base)[2], RowState& rows) {
        QUIRE_UNROLL
        for (int half = 0; half < kTokens / 32; ++half) {
            uint32_t weights[2][4];
            QUIRE_UNROLL
            for (int t = 0; t < 2; ++t) {
                weigh(s, base, 2 * half + t, weights[t]);
                mma_m16n8k16<Number>(rows.sum, weights[t], ones<Number>(), ones<Number>());
                if constexpr (Fp8) scale_weights(s, 2 * half + t, weights[t]);
            }
            keep_state(rows);
            QUIRE_UNROLL
            for (int c = 0; c < Tile::kChunks; ++c) {
                // Keeps the compiler from loading more fragments ahead than there are registers.
                if (Dim > 128 && c % 2 == 0) __syncwarp();
                Values v;
                v.load(values(stage), 32 * half, c);
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

    QUIRE_DEVICE void tile(int token) {
        {
            // A tile that no row of the warp sees changes nothing.
            const RowState rows = state();
            const Sight &low = rows.sight[0], &high = rows.sight[1];
            const bool some = token < high.end || token < low.end;
            const bool passed = token + kTokens <= low.begin && (token + kTokens <= high.begin || high.end == 0);
            if (!__any_sync(kFullMask, some && !passed)) return;
        }
        float s[kTokenGroups][4], base[2];
        multiply_keys(s);
        RowState rows = state();
        finish_scores(s, token, rows);
        raise_max(s, base, rows);
        add_values(s, base, rows);
    }

    /// A split is over. Its sums go to memory for the block that adds up, or join those of the item's earlier splits.
    QUIRE_DEVICE void end_split(const QuireAttentionItem& item, int head, int token, bool last) {
        const int after_first = token / QUIRE_KV_SPLIT - item.kv_begin / QUIRE_KV_SPLIT;
        RowState rows = state();
        if (item.partial >= 0) {
            QUIRE_UNROLL
            for (int i = 0; i < 2; ++i) {
                const Row row(p, item, head, warp * 16 + lane / 4 + 8 * i);
                const size_t index = partial_index(p, item, head, item.split_offset + after_first, warp * 16 + lane / 4 + 8 * i);
                QUIRE_UNROLL
                for (int c = 0; c < Tile::kChunks; ++c) {
                    Out::write_partial(p, row, index, c, out + c * kGroups, i == 1);
                }
                if (lane % 4 == 0 && row.exists) {
                    reinterpret_cast<float2*>(p.partial_max_sum)[index] = make_float2(rows.max[i], rows.sum[2 * i]);
                }
            }
            clear(rows);
            return;
        }
        const MergeFactors f[2] = {merge(rows.total[0], RowSum{rows.max[0], rows.sum[0]}),
                                   merge(rows.total[1], RowSum{rows.max[1], rows.sum[2]})};
        keep_state(rows);
        auto* carry = reinterpret_cast<float4*>(p.carry) + size_t(blockIdx.x) * (kRows * Dim / 4) + threadIdx.x;
        QUIRE_UNROLL
        for (int j = 0; j < kOuts; ++j) {
            // Keeps the compiler from loading all at once, for which there are no registers.
            if (j % 2 == 0) __syncwarp();
            float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (after_first > 0) sums = carry[j * QUIRE_PREFILL_THREADS];
            out[j][0] = merge(f[0], sums.x, out[j][0]);
            out[j][1] = merge(f[0], sums.y, out[j][1]);
            out[j][2] = merge(f[1], sums.z, out[j][2]);
            out[j][3] = merge(f[1], sums.w, out[j][3]);
            if (!last) carry[j * QUIRE_PREFILL_THREADS] = make_float4(out[j][0], out[j][1], out[j][2], out[j][3]);
        }
        if (!last) clear(rows);
    }

    QUIRE_DEVICE void run_item(const QuireAttentionItem& item, int head) {
        keep_query(item, head);
        __syncwarp();
        const int first = warp * 16 + lane / 4;
        RowState rows;
        rows.sight[0] = Sight::of(p, item, first);
        rows.sight[1] = Sight::of(p, item, first + 8);
        rows.total[0] = rows.total[1] = RowSum{negative_infinity(), 0.0f};
        clear(rows);
        for (int token = item.kv_begin / kTokens * kTokens; token < item.kv_end; token += kTokens) {
            cp_async_wait<0>();
            __syncthreads();
            fetch(stage ^ 1);
            tile(token);
            stage ^= 1;
            const int after = token + kTokens;
            const bool last = after >= item.kv_end;
            if (last || after % QUIRE_KV_SPLIT == 0) end_split(item, head, token, last);
        }
        if (item.partial >= 0) {
            arrive_and_merge<Number>(p, item, head);
            return;
        }
        write_rows(item, head);
    }

    /// What an item with all its splits leaves.
    QUIRE_DEVICE void write_rows(const QuireAttentionItem& item, int head) const {
        const RowState rows = state();
        QUIRE_UNROLL
        for (int i = 0; i < 2; ++i) {
            const Row row(p, item, head, warp * 16 + lane / 4 + 8 * i);
            const float f = finish(p, rows.total[i], row.head);
            QUIRE_UNROLL
            for (int c = 0; c < Tile::kChunks; ++c) {
                Out::template write<Number>(p, row, c, out + c * kGroups, i == 1, f);
            }
        }
    }
};

template <typename Number, bool Fp8, int Dim>
QUIRE_DEVICE void attention_prefill(const QuireAttentionParams& p) {
    QUIRE_DYNAMIC_SHARED(memory);
    griddep_wait();
    const int num_work = *p.num_items * p.num_kv_heads;
    if (int(blockIdx.x) >= num_work) return;
    PrefillBlock<Number, Fp8, Dim> block(p, memory, num_work);
    block.fetch(0);
    griddep_launch();
    for (int work = blockIdx.x; work < num_work; work += gridDim.x) {
        block.run_item(p.items[work / p.num_kv_heads], work % p.num_kv_heads);
    }
}

}  // namespace quire
