// attention_prefill.cuh on Hopper, head_dim 128: the same rows, tiles, splits and order of additions, with other
// instructions. One thread copies keys and values by boxes of 16 tokens, several tiles ahead; two warpgroups compute 64
// rows each by products of a warpgroup, so that one's softmax runs beside the other's products. Registers go from those
// that copy to those that compute.
//
// A warp of a warpgroup has the same rows and columns of a product in the same registers as with mma.sync, so everything
// between the products is PrefillBlock's own code. It has not run on a GPU yet: QUIRE_KERNELS=sm90a asks for it.
#pragma once

#include "attention_prefill.cuh"
#include "hopper.cuh"

namespace quire {

template <typename Number>
struct HopperPrefill : PrefillBlock<Number, false, 128> {
    using Base = PrefillBlock<Number, false, 128>;
    static constexpr int kTokens = Base::kTokens;
    static constexpr int kChunks = 128 / 16;

    // Shared memory: stages of keys and values, each as two halves of 64 columns whose rows are 128 bytes; then barriers.
    static constexpr int kBoxTokens = QUIRE_PAGE_BOX;
    static constexpr int kHalf = kTokens * 128;
    static constexpr int kStage = 4 * kHalf;
    static constexpr int kStages = QUIRE_SM90A_STAGES;
    static constexpr int kBarriers = kStages * kStage;

    /// The threads that compute, for what they do together.
    struct Consumers {
        static QUIRE_DEVICE int index() { return threadIdx.x; }
        static QUIRE_DEVICE int count() { return QUIRE_PREFILL_THREADS; }
        static QUIRE_DEVICE void sync() { named_barrier(1, QUIRE_PREFILL_THREADS); }
    };

    /// Where a block is in its ring of stages.
    struct Ring {
        SharedAddress shared;
        int stage = 0;
        uint32_t parity = 0;

        QUIRE_DEVICE explicit Ring(SharedAddress begin) : shared(begin) {}
        QUIRE_DEVICE SharedAddress tile() const { return shared + stage * kStage; }
        QUIRE_DEVICE SharedAddress full() const { return shared + kBarriers + 16 * stage; }
        QUIRE_DEVICE SharedAddress empty() const { return full() + 8; }
        QUIRE_DEVICE void advance() {
            if (++stage == kStages) stage = 0, parity ^= 1;
        }
    };

    uint32_t query[kChunks][4];

    QUIRE_DEVICE HopperPrefill(const QuireAttentionParams& params, unsigned char* dynamic, int num_work)
        : Base(params, dynamic, num_work) {}

    QUIRE_DEVICE void load_queries(const QuireAttentionItem& item, int head) {
        const int first = this->warp * 16 + this->lane / 4;
        const Row low(this->p, item, head, first), high(this->p, item, head, first + 8);
        QUIRE_UNROLL
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            const uint4 v = load_query<Number, false>(this->p, low, high, chunk);
            query[chunk][0] = v.x, query[chunk][1] = v.y, query[chunk][2] = v.z, query[chunk][3] = v.w;
        }
    }

    /// All warps of a warpgroup take part in every product, also those whose rows see none of its tokens: to them the
    /// weights are zeros.
    QUIRE_DEVICE void tile(int token, SharedAddress keys) {
        float s[Base::kTokenGroups][4], base[2];
        product_fence();
        QUIRE_UNROLL
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            const SharedAddress columns = keys + chunk / 4 * kHalf + chunk % 4 * 32;
            product_m64n64k16<Number, false>(s, query[chunk], matrix_descriptor(columns), chunk > 0);
        }
        product_wait();
        typename Base::RowState rows = this->state();
        this->finish_scores(s, token, rows);
        this->raise_max(s, base, rows);
        uint32_t weights[kTokens / 16][4];
        QUIRE_UNROLL
        for (int t = 0; t < kTokens / 16; ++t) {
            this->weigh(s, base, t, weights[t]);
            mma_m16n8k16<Number>(rows.sum, weights[t], ones<Number>(), ones<Number>());
        }
        this->keep_state(rows);
        product_fence();
        QUIRE_UNROLL
        for (int t = 0; t < kTokens / 16; ++t) {
            QUIRE_UNROLL
            for (int half = 0; half < 2; ++half) {
                const SharedAddress values = keys + (2 + half) * kHalf + t * 16 * 128;
                product_m64n64k16<Number, true>(this->out + 8 * half, weights[t], matrix_descriptor(values), true);
            }
        }
        product_wait();
    }

    QUIRE_DEVICE void run_item(const QuireAttentionItem& item, int head, Ring& ring) {
        load_queries(item, head);
        const int first = this->warp * 16 + this->lane / 4;
        typename Base::RowState rows;
        rows.sight[0] = Sight::of(this->p, item, first);
        rows.sight[1] = Sight::of(this->p, item, first + 8);
        rows.total[0] = rows.total[1] = RowSum{negative_infinity(), 0.0f};
        this->clear(rows);
        for (int token = item.kv_begin / kTokens * kTokens; token < item.kv_end; token += kTokens) {
            mbarrier_wait(ring.full(), ring.parity);
            tile(token, ring.tile());
            mbarrier_arrive(ring.empty());
            ring.advance();
            const int after = token + kTokens;
            const bool last = after >= item.kv_end;
            if (last || after % QUIRE_KV_SPLIT == 0) this->end_split(item, head, token, last);
        }
        if (item.partial >= 0) {
            arrive_and_merge<Number, Consumers>(this->p, item, head);
            return;
        }
        this->write_rows(item, head);
    }

    /// One thread's work: the boxes of every tile of every item, as stages become free. Boxes of which no row sees
    /// anything are read from outside of the tensor, as zeros: their page may be anything.
    static QUIRE_DEVICE void copy_all(const QuireAttentionSm90aParams& params, int num_work, Ring ring) {
        const QuireAttentionParams& p = params.attention;
        const int mask = (1 << p.page_shift) - 1;
        // A stage is free until it was used for the first time.
        ring.parity = 1;
        for (int work = blockIdx.x; work < num_work; work += gridDim.x) {
            const QuireAttentionItem& item = p.items[work / p.num_kv_heads];
            const int head = work % p.num_kv_heads;
            const int32_t* table = p.block_tables + size_t(item.seq) * p.block_table_stride;
            for (int token = item.kv_begin / kTokens * kTokens; token < item.kv_end; token += kTokens) {
                mbarrier_wait(ring.empty(), ring.parity);
                mbarrier_expect(ring.full(), kStage);
                for (int box = 0; box < kTokens / kBoxTokens; ++box) {
                    const int begin = token + box * kBoxTokens;
                    const bool seen = begin + kBoxTokens > item.kv_begin && begin < item.kv_end;
                    const int page = seen ? table[begin >> p.page_shift] : 0;
                    for (int part = 0; part < 4; ++part) {
                        const int which = part / 2;
                        const int row = ((page * 2 + which) * p.num_kv_heads + head << p.page_shift) + (begin & mask);
                        const SharedAddress to = ring.tile() + part * kHalf + box * kBoxTokens * 128;
                        copy_box(to, params.pages, part % 2 * 64, seen ? row : params.num_rows, ring.full());
                    }
                }
                ring.advance();
            }
        }
    }
};

template <typename Number>
QUIRE_DEVICE void attention_prefill_sm90a(const QuireAttentionSm90aParams& params) {
    using Block = HopperPrefill<Number>;
    QUIRE_DYNAMIC_SHARED(dynamic);
    // Swizzled tiles begin at multiples of 1024 bytes.
    const SharedAddress shared = (shared_address(dynamic) + 1023) & ~1023u;
    typename Block::Ring ring(shared);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < Block::kStages; ++stage) {
            mbarrier_init(shared + Block::kBarriers + 16 * stage, 1);
            mbarrier_init(shared + Block::kBarriers + 16 * stage + 8, QUIRE_PREFILL_THREADS);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    griddep_wait();
    griddep_launch();
    const QuireAttentionParams& p = params.attention;
    const int num_work = *p.num_items * p.num_kv_heads;
    if (threadIdx.x >= QUIRE_PREFILL_THREADS) {
        give_registers<40>();
        if (threadIdx.x == QUIRE_PREFILL_THREADS) Block::copy_all(params, num_work, ring);
        return;
    }
    take_registers<232>();
    if (int(blockIdx.x) >= num_work) return;
    Block block(p, dynamic, num_work);
    for (int work = blockIdx.x; work < num_work; work += gridDim.x) {
        block.run_item(p.items[work / p.num_kv_heads], work % p.num_kv_heads, ring);
    }
}

}  // namespace quire
