// What decode and prefill attention share: how a tile of keys or values gets from its pages into shared memory and from
// there into fragments, and every floating-point operation on a row. A row's bits follow from this file alone, because
// both kernels apply the same operations in the same order: see attention_params.h on splits and tiles.
//
// For one row, with scores s (already masked: -inf where the row does not see the token):
//   per split:  m = -inf, l = 0, o = 0
//   per tile:   m' = max(m, factor * max s);  a = 2^(m - m');  p = 2^(factor * s - m') rounded to 16 bits
//               l = a * l + sum p;  o = a * o + p V       (both by mma, in chunks of 16 tokens)
//   then:       M' = max(M, m);  L = 2^(m - M') * l + 2^(M - M') * L;  the same for O
//   at last:    out = O / L
// A tile or split of which the row sees nothing changes nothing, to the bit; so it may be skipped or not.
#pragma once

#include "attention_params.h"
#include "mma.cuh"

namespace quire {

constexpr float kLog2E = 1.4426950408889634f;

#if defined(__CUDACC__)
QUIRE_DEVICE float exp2_approx(float x) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}
QUIRE_DEVICE float reciprocal_approx(float x) {
    float out;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}
#else
inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }
#endif
QUIRE_DEVICE float negative_infinity() { return __uint_as_float(0xff800000u); }

/// Two ones: a column of B that adds up the weights, so that sum and values use the same rounded weights.
template <typename Number>
QUIRE_DEVICE uint32_t ones() {
    return is_bf16<Number> ? 0x3f803f80u : 0x3c003c00u;
}

// ---- A row ---------------------------------------------------------------------------------------------------------

/// What turns products q . k into scores in units of log2.
struct ScoreRule {
    /// Of a score.
    float factor;
    /// 0: no cap.
    float cap;
    float cap_exponent;

    QUIRE_DEVICE explicit ScoreRule(const QuireAttentionParams& p) {
        const float scale = __fmul_rn(p.scale, kLog2E);
        cap = p.soft_cap;
        factor = cap > 0.0f ? kLog2E : scale;
        cap_exponent = cap > 0.0f ? __fdiv_rn(__fmul_rn(2.0f, scale), cap) : 0.0f;
    }
    /// cap * tanh(scale * s / cap), by tanh x = 1 - 2 / (e^2x + 1).
    QUIRE_DEVICE float capped(float s) const {
        const float e = exp2_approx(__fmul_rn(s, cap_exponent));
        return __fmaf_rn(__fmul_rn(-2.0f, cap), reciprocal_approx(__fadd_rn(e, 1.0f)), cap);
    }
};

/// 0 in place of -inf, so that differences with -inf are -inf and not NaN.
QUIRE_DEVICE float finite_max(float m) { return m == negative_infinity() ? 0.0f : m; }

/// Maximum (in units of log2) and sum of a row's weights.
struct RowSum {
    float max, sum;
};

/// How two sums become one: both are multiplied, then added.
struct MergeFactors {
    float mine, other;
};
QUIRE_DEVICE MergeFactors merge(RowSum& into, RowSum other) {
    const float max = fmaxf(into.max, other.max), base = finite_max(max);
    const MergeFactors f{exp2_approx(__fsub_rn(into.max, base)), exp2_approx(__fsub_rn(other.max, base))};
    into.max = max;
    into.sum = __fmaf_rn(f.other, other.sum, __fmul_rn(f.mine, into.sum));
    return f;
}
QUIRE_DEVICE float merge(MergeFactors f, float mine, float other) {
    return __fmaf_rn(f.other, other, __fmul_rn(f.mine, mine));
}

/// What multiplies the sum of values of query head `head` in the end.
QUIRE_DEVICE float finish(const QuireAttentionParams& p, RowSum row, int head) {
    if (p.sinks == nullptr) return __frcp_rn(row.sum);
    const MergeFactors f = merge(row, RowSum{__fmul_rn(p.sinks[head], kLog2E), 1.0f});
    return __fmul_rn(f.mine, __frcp_rn(row.sum));
}

/// The positions [begin, end) that a row sees; none for a row that does not exist.
struct Sight {
    int begin, end;

    /// Of row `index` of the item.
    static QUIRE_DEVICE Sight of(const QuireAttentionParams& p, const QuireAttentionItem& item, int index) {
        const int end = index < item.num_rows ? item.first_position + (item.row_begin + index) / p.group + 1 : 0;
        return {p.window > 0 ? max(0, end - p.window) : 0, end};
    }
    QUIRE_DEVICE float masked(float score, int position) const {
        return position >= begin && position < end ? score : negative_infinity();
    }
};

/// Where row `index` of an item lies in queries and output (the item's first row, if there are fewer).
struct Row {
    int token, head;
    bool exists;

    QUIRE_DEVICE Row(const QuireAttentionParams& p, const QuireAttentionItem& item, int kv_head, int index) {
        exists = index < item.num_rows;
        const int row = item.row_begin + (exists ? index : 0), t = row / p.group;
        token = item.q_start + t;
        head = kv_head * p.group + (row - t * p.group);
    }
};

// ---- A tile --------------------------------------------------------------------------------------------------------

/// A tile of keys or values in shared memory: rows of tokens, whose chunks of 16 bytes are permuted so that the eight
/// rows of an 8x8 matrix lie in different banks.
template <bool Fp8, int Dim, int Threads>
struct KvTile {
    /// The same in every kernel for this head size: it decides where maxima change, and so the bits.
    static constexpr int kTokens = Dim > 128 ? 32 : 64;
    static constexpr int kElement = Fp8 ? 1 : 2;
    static constexpr int kRowBytes = Dim * kElement;
    static constexpr int kBytes = kTokens * kRowBytes;
    static constexpr int kChunks = kRowBytes / 16;
    // How the block's threads copy it.
    static constexpr int kRowsPerPass = Threads / kChunks;
    static constexpr int kPasses = kTokens / kRowsPerPass;
    /// Pages are read in units of 16 tokens; this many of them concern one thread.
    static constexpr int kPages = kRowsPerPass >= 16 ? kPasses : kTokens / 16;
    static constexpr int kPassesPerPage = kPasses / kPages;
    static_assert(kPasses >= 1 && Threads % kChunks == 0 && QUIRE_KV_SPLIT % kTokens == 0, "shape");

    static QUIRE_DEVICE int swizzle(int row) { return kChunks >= 8 ? row & 7 : (row >> 1) & 3; }
    static QUIRE_DEVICE int offset(int row, int chunk) { return row * kRowBytes + ((chunk ^ swizzle(row)) << 4); }
};

/// Fragments of keys: B of q . k, one column a token. A step is 64 bytes of each of 8 tokens.
template <typename Number, bool Fp8, typename Tile>
struct KeyFragments {
    static constexpr int kSteps = Tile::kChunks / 4;
    /// Chunks of 16 elements in a step.
    static constexpr int kPerStep = Fp8 ? 4 : 2;
    uint32_t b[kPerStep][2];

    QUIRE_DEVICE void load(SharedAddress tile, int token, int step) {
        const int lane = Tile::kRowBytes > 256 ? fresh_lane() : int(threadIdx.x % 32);
        uint32_t words[4];
        ldmatrix_x4(words, tile + Tile::offset(token + lane % 8, 4 * step + lane / 8));
        if constexpr (Fp8) {
            QUIRE_UNROLL
            for (int i = 0; i < 4; ++i) widen_e4m3<Number>(words[i], b[i][0], b[i][1]);
        } else {
            b[0][0] = words[0], b[0][1] = words[1], b[1][0] = words[2], b[1][1] = words[3];
        }
    }
};

/// Fragments of values: B of p V, one column a dimension. For 32 tokens (two chunks of 16) and 16 bytes of dimensions.
template <typename Number, bool Fp8, typename Tile>
struct ValueFragments {
    /// Groups of 8 columns in 16 bytes.
    static constexpr int kColumns = Fp8 ? 2 : 1;
    /// [chunk of tokens][group of columns].
    uint32_t b[2][kColumns][2];

    QUIRE_DEVICE void load(SharedAddress tile, int token, int chunk) {
        const int lane = Tile::kRowBytes > 256 ? fresh_lane() : int(threadIdx.x % 32);
        uint32_t words[4];
        ldmatrix_x4_trans(words, tile + Tile::offset(token + lane, chunk));
        QUIRE_UNROLL
        for (int i = 0; i < 4; ++i) {
            if constexpr (Fp8) {
                widen_e4m3<Number>(words[i], b[i / 2][0][i % 2], b[i / 2][1][i % 2]);
            } else {
                b[i / 2][0][i % 2] = words[i];
            }
        }
    }
};

/// The A fragment of elements 16 * chunk .. + 16 of two query rows. With fp8 keys the order within 16 is that of
/// the widened bytes, which is the same as long as both factors have it.
template <typename Number, bool Fp8>
QUIRE_DEVICE uint4 load_query(const QuireAttentionParams& p, const Row& low, const Row& high, int chunk) {
    uint32_t a[4];
    const int q = threadIdx.x % 4;
    QUIRE_UNROLL
    for (int i = 0; i < 2; ++i) {
        const Row& row = i == 0 ? low : high;
        const Number* from = static_cast<const Number*>(p.q) + size_t(row.token) * p.q_stride + row.head * p.head_dim;
        uint32_t first = 0, second = 0;
        if constexpr (Fp8) {
            const int column = 16 * chunk + 4 * q;
            if (row.exists && column < p.head_dim) {
                const uint2 four = *reinterpret_cast<const uint2*>(from + column);
                first = __byte_perm(four.x, four.y, 0x5410);
                second = __byte_perm(four.x, four.y, 0x7632);
            }
        } else {
            const int column = 16 * chunk + 2 * q;
            if (row.exists && column < p.head_dim) first = *reinterpret_cast<const uint32_t*>(from + column);
            if (row.exists && column + 8 < p.head_dim) second = *reinterpret_cast<const uint32_t*>(from + column + 8);
        }
        a[i] = first;
        a[2 + i] = second;
    }
    return make_uint4(a[0], a[1], a[2], a[3]);
}

// ---- From pages ----------------------------------------------------------------------------------------------------

/// Walks over the tiles of all work of a block, one item after the other, ahead of the warps that use them. Page numbers
/// are read one tile ahead of their use and, with `Ahead`, the next item's bounds one item ahead (three registers).
template <bool Fp8, typename Tile, bool Ahead>
struct KvLoader {
    /// A tile, as far as a thread needs to know it.
    struct Ref {
        /// First position; positions outside [begin, end) become zeros.
        int token, begin, end, head;
        int pages[Tile::kPages];
        /// fp8: of the token whose scale this thread copies.
        int scale_page;
    };

    const QuireAttentionParams& p;
    /// The tile to be copied next, and the one before it.
    Ref next, last;
    int next_work, num_work;
    /// Where the sequence's row of the block table begins.
    int table;
    int upcoming_seq, upcoming_begin, upcoming_end;

    QUIRE_DEVICE KvLoader(const QuireAttentionParams& params, int total) : p(params), num_work(total) {
        next_work = blockIdx.x;
        if (Ahead) look_up();
        open();
        last = next;
    }

    QUIRE_DEVICE void look_up() {
        if (next_work >= num_work) return;
        const QuireAttentionItem* item = p.items + next_work / p.num_kv_heads;
        upcoming_seq = __ldg(&item->seq);
        upcoming_begin = __ldg(&item->kv_begin);
        upcoming_end = __ldg(&item->kv_end);
    }
    /// Begins the upcoming item; an empty tile after the last one.
    QUIRE_DEVICE void open() {
        if (next_work >= num_work) {
            next.token = next.begin = next.end = 0;
            return;
        }
        if (!Ahead) look_up();
        next.head = next_work % p.num_kv_heads;
        next.begin = upcoming_begin;
        next.end = upcoming_end;
        next.token = upcoming_begin / Tile::kTokens * Tile::kTokens;
        table = upcoming_seq * p.block_table_stride;
        next_work += gridDim.x;
        if (Ahead) look_up();
        find_pages();
    }
    QUIRE_DEVICE int page_of(int token) const {
        // Within the 16 tokens that share a page some may be seen even if this one is not.
        const bool seen = (token | 15) >= next.begin && (token & ~15) < next.end;
        return seen ? __ldg(p.block_tables + table + (token >> p.page_shift)) : 0;
    }
    QUIRE_DEVICE void find_pages() {
        const int row = threadIdx.x / Tile::kChunks;
        QUIRE_UNROLL
        for (int g = 0; g < Tile::kPages; ++g) {
            next.pages[g] = page_of(next.token + g * Tile::kPassesPerPage * Tile::kRowsPerPass + row);
        }
        if constexpr (Fp8) {
            if (int(threadIdx.x) < Tile::kTokens) next.scale_page = page_of(next.token + threadIdx.x);
        }
    }
    /// To the following tile.
    QUIRE_DEVICE void advance() {
        last = next;
        if (next.end == 0) return;
        if (next.token + Tile::kTokens < next.end) {
            next.token += Tile::kTokens;
            find_pages();
        } else {
            open();
        }
    }

    /// Starts the copy of the keys (which = 0) or values (1) of a tile.
    QUIRE_DEVICE void copy(const Ref& tile, int which, SharedAddress to) const {
        if (tile.end == 0) return;
        const int chunk = threadIdx.x % Tile::kChunks, row_bytes = p.head_dim * Tile::kElement;
        const int mask = (1 << p.page_shift) - 1;
        const bool has_column = 16 * chunk < row_bytes;
        const auto* kv = static_cast<const unsigned char*>(p.kv);
        QUIRE_UNROLL
        for (int pass = 0; pass < Tile::kPasses; ++pass) {
            const int row = pass * Tile::kRowsPerPass + threadIdx.x / Tile::kChunks, token = tile.token + row;
            const bool valid = has_column && token >= tile.begin && token < tile.end;
            const uint32_t index = head_page(tile.pages[pass / Tile::kPassesPerPage], which, tile.head) + (token & mask);
            const auto* from = kv + size_t(index) * uint32_t(row_bytes) + 16 * chunk;
            cp_async_16(to + Tile::offset(row, chunk), valid ? from : kv, valid);
        }
    }
    /// fp8: starts the copy of the factors of a tile's keys, then of its values.
    QUIRE_DEVICE void copy_scales(const Ref& tile, SharedAddress to) const {
        if (!Fp8 || tile.end == 0 || int(threadIdx.x) >= Tile::kTokens) return;
        const int token = tile.token + threadIdx.x, mask = (1 << p.page_shift) - 1;
        const bool valid = token >= tile.begin && token < tile.end;
        QUIRE_UNROLL
        for (int which = 0; which < 2; ++which) {
            const uint32_t index = head_page(tile.scale_page, which, tile.head) + (token & mask);
            cp_async_4(to + 4 * (which * Tile::kTokens + threadIdx.x), p.kv_scales + (valid ? index : 0), valid);
        }
    }
    /// First token of a page's keys or values of a head, counted in tokens from the first page.
    QUIRE_DEVICE uint32_t head_page(int page, int which, int head) const {
        return uint32_t((page * 2 + which) * p.num_kv_heads + head) << p.page_shift;
    }
};

// ---- Sums of splits ------------------------------------------------------------------------------------------------

/// Where partial results of row `row` and split `split` (counted from the row's first) begin.
QUIRE_DEVICE size_t partial_index(const QuireAttentionParams& p, const QuireAttentionItem& item, int head, int split,
                                  int row) {
    return (size_t(item.partial) + split * item.num_rows + row) * p.num_kv_heads + head;
}

/// All threads of a block, for what they do together.
struct BlockThreads {
    static QUIRE_DEVICE int index() { return threadIdx.x; }
    static QUIRE_DEVICE int count() { return blockDim.x; }
    static QUIRE_DEVICE void sync() { __syncthreads(); }
};

/// Called by all `Threads` after they wrote an item's partial results: the block that comes last adds up all splits of
/// these rows, and leaves the counter at zero for the next launch.
template <typename Number, typename Threads = BlockThreads>
QUIRE_DEVICE void arrive_and_merge(const QuireAttentionParams& p, const QuireAttentionItem& item, int head) {
    QUIRE_SHARED(is_last, int);
    __threadfence();
    Threads::sync();
    if (Threads::index() == 0) {
        int32_t* counter = p.counters + size_t(item.counter) * p.num_kv_heads + head;
        is_last = atomicAdd(counter, 1) == item.num_items - 1;
        if (is_last) *counter = 0;
    }
    Threads::sync();
    if (!is_last) return;
    __threadfence();
    const int vectors = p.head_dim / 4;
    for (int i = Threads::index(); i < item.num_rows * vectors; i += Threads::count()) {
        const int row = i / vectors, column = i % vectors * 4;
        RowSum total{negative_infinity(), 0.0f};
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
        for (int split = 0; split < item.num_splits; ++split) {
            const size_t index = partial_index(p, item, head, split, row);
            const float2 ms = __ldcg(reinterpret_cast<const float2*>(p.partial_max_sum) + index);
            const float4 o = __ldcg(reinterpret_cast<const float4*>(p.partial_out + index * p.head_dim + column));
            const MergeFactors f = merge(total, RowSum{ms.x, ms.y});
            sum = make_float4(merge(f, sum.x, o.x), merge(f, sum.y, o.y), merge(f, sum.z, o.z), merge(f, sum.w, o.w));
        }
        const Row place(p, item, head, row);
        const float f = finish(p, total, place.head);
        Number* out = static_cast<Number*>(p.out) + size_t(place.token) * p.out_stride + place.head * p.head_dim + column;
        *reinterpret_cast<uint2*>(out) = make_uint2(pack2<Number>(__fmul_rn(sum.x, f), __fmul_rn(sum.y, f)),
                                                    pack2<Number>(__fmul_rn(sum.z, f), __fmul_rn(sum.w, f)));
    }
}

/// A thread's share of the sums of two rows over one chunk of 16 bytes of columns, in the order of the columns.
template <bool Fp8>
struct OutputChunk {
    static constexpr int kWidth = Fp8 ? 4 : 2;
    /// Of dimensions.
    static QUIRE_DEVICE int column(int chunk) { return (Fp8 ? 16 : 8) * chunk + kWidth * int(threadIdx.x % 4); }
    /// Number `i` of row `high` out of the chunk's accumulators.
    static QUIRE_DEVICE float get(const float (*c)[4], bool high, int i) {
        const int at = high ? 2 : 0;
        return Fp8 ? c[i % 2][at + i / 2] : c[0][at + i];
    }

    template <typename Number>
    static QUIRE_DEVICE void write(const QuireAttentionParams& p, const Row& row, int chunk, const float (*c)[4],
                                   bool high, float factor) {
        if (!row.exists || column(chunk) >= p.head_dim) return;
        Vec<uint32_t, kWidth / 2> packed;
        QUIRE_UNROLL
        for (int i = 0; i < kWidth; i += 2) {
            packed.v[i / 2] = pack2<Number>(__fmul_rn(get(c, high, i), factor), __fmul_rn(get(c, high, i + 1), factor));
        }
        store(static_cast<Number*>(p.out) + size_t(row.token) * p.out_stride + row.head * p.head_dim + column(chunk),
              packed);
    }
    static QUIRE_DEVICE void write_partial(const QuireAttentionParams& p, const Row& row, size_t index, int chunk,
                                           const float (*c)[4], bool high) {
        if (!row.exists || column(chunk) >= p.head_dim) return;
        Vec<float, kWidth> values;
        QUIRE_UNROLL
        for (int i = 0; i < kWidth; ++i) values.v[i] = get(c, high, i);
        store(p.partial_out + index * p.head_dim + column(chunk), values);
    }
};

}  // namespace quire
