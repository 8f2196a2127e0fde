// Cuts a step's attention into items. One block: a thread a sequence, items in the order of the sequences.
//
// Few sequences are cut along their caches too, so that every multiprocessor has work; many are not, because partial
// sums cost a write and a read. The cut never changes a result (see attention_params.h), only who computes it.
#pragma once

#include "attention_params.h"
#include "quire.cuh"

namespace quire {

/// Items that a block should have at least, for a good balance at the end.
constexpr int kItemsPerBlock = 3;
/// More than any sequence has: items with all splits.
constexpr int kAllSplits = 1 << 30;

QUIRE_DEVICE int divide_up(int a, int b) { return (a + b - 1) / b; }

/// How much of each resource some work takes.
struct PlanNeed {
    int items = 0, partials = 0, counters = 0;

    QUIRE_DEVICE void add(const PlanNeed& other) {
        items += other.items;
        partials += other.partials;
        counters += other.counters;
    }
};

/// The query rows of a sequence.
struct PlanSequence {
    int q_start = 0, first_position = 0, rows = 0;

    QUIRE_DEVICE PlanSequence(const QuireAttentionPlanParams& p, int seq, int num_seqs) {
        if (seq >= num_seqs) return;
        q_start = p.cu_seqlens_q[seq];
        const int q_len = p.cu_seqlens_q[seq + 1] - q_start, kv_len = p.seq_lens[seq];
        // A padded row of a graph has no tokens.
        if (q_len <= 0 || kv_len < q_len) return;
        rows = q_len * p.group;
        first_position = kv_len - q_len;
    }
    QUIRE_DEVICE bool is_decode() const { return rows > 0 && rows <= QUIRE_DECODE_ROWS; }
    QUIRE_DEVICE bool is_prefill() const { return rows > QUIRE_DECODE_ROWS; }
};

/// Some rows of a sequence, and the splits that they see.
struct PlanTile {
    int row_begin, num_rows, kv_begin, kv_end, first_split, num_splits;

    QUIRE_DEVICE PlanTile(const QuireAttentionPlanParams& p, const PlanSequence& s, int index, int tile_rows) {
        row_begin = index * tile_rows;
        num_rows = min(tile_rows, s.rows - row_begin);
        kv_end = s.first_position + (row_begin + num_rows - 1) / p.group + 1;
        const int first_end = s.first_position + row_begin / p.group + 1;
        kv_begin = p.window > 0 ? max(0, first_end - p.window) : 0;
        first_split = kv_begin / QUIRE_KV_SPLIT;
        num_splits = divide_up(kv_end, QUIRE_KV_SPLIT) - first_split;
    }
    QUIRE_DEVICE PlanNeed need(int splits_per_item) const {
        PlanNeed need;
        need.items = 1;
        if (num_splits > splits_per_item) {
            need.items = divide_up(num_splits, splits_per_item);
            need.partials = num_splits * num_rows;
            need.counters = 1;
        }
        return need;
    }
};

/// One of the two lists.
struct PlanList {
    const QuireAttentionPlanParams& p;
    const bool prefill;
    const int tile_rows;
    int num_seqs;

    QUIRE_DEVICE int num_tiles(const PlanSequence& s) const {
        return (prefill ? s.is_prefill() : s.is_decode()) ? divide_up(s.rows, tile_rows) : 0;
    }
    QUIRE_DEVICE PlanNeed need(const PlanSequence& s, int splits_per_item) const {
        PlanNeed sum;
        for (int i = num_tiles(s) - 1; i >= 0; --i) sum.add(PlanTile(p, s, i, tile_rows).need(splits_per_item));
        return sum;
    }
    QUIRE_DEVICE void write(int seq, const PlanSequence& s, int splits_per_item, PlanNeed at) const {
        for (int i = num_tiles(s) - 1; i >= 0; --i) {
            const PlanTile tile(p, s, i, tile_rows);
            const PlanNeed need = tile.need(splits_per_item);
            const bool is_shared = need.items > 1;
            for (int j = 0; j < need.items; ++j) {
                const int offset = is_shared ? j * splits_per_item : 0, first = tile.first_split + offset;
                const int after = is_shared ? first + splits_per_item : kAllSplits / QUIRE_KV_SPLIT;
                QuireAttentionItem item{};
                item.seq = p.seq_slots != nullptr ? p.seq_slots[seq] : seq;
                item.q_start = s.q_start;
                item.first_position = s.first_position;
                item.row_begin = tile.row_begin;
                item.num_rows = tile.num_rows;
                item.kv_begin = max(tile.kv_begin, first * QUIRE_KV_SPLIT);
                item.kv_end = min(tile.kv_end, after * QUIRE_KV_SPLIT);
                item.num_splits = tile.num_splits;
                item.split_offset = offset;
                item.partial = is_shared ? at.partials : -1;
                item.counter = at.counters;
                item.num_items = need.items;
                (prefill ? p.prefill_items : p.decode_items)[at.items + j] = item;
            }
            at.add(need);
        }
    }
};

/// Sum of the block's values below this thread, and of all of them.
struct BlockScan {
    int before, all;
};
QUIRE_DEVICE BlockScan block_scan(int value) {
    QUIRE_SHARED(sums, int[32]);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sum = value;
    QUIRE_UNROLL
    for (int offset = 1; offset < 32; offset <<= 1) {
        const int below = __shfl_up_sync(kFullMask, sum, offset);
        if (lane >= offset) sum += below;
    }
    __syncthreads();
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    BlockScan out{sum - value, 0};
    for (int w = 0; w < int(blockDim.x / 32); ++w) {
        if (w < warp) out.before += sums[w];
        out.all += sums[w];
    }
    return out;
}

/// What the whole list needs; the same in every thread.
QUIRE_DEVICE PlanNeed total_need(const PlanList& list, int splits_per_item) {
    PlanNeed sum;
    for (int seq = threadIdx.x; seq < list.num_seqs; seq += blockDim.x) {
        sum.add(list.need(PlanSequence(list.p, seq, list.num_seqs), splits_per_item));
    }
    sum.items = block_scan(sum.items).all;
    sum.partials = block_scan(sum.partials).all;
    sum.counters = block_scan(sum.counters).all;
    return sum;
}

/// The fewest splits an item may have so that the list fits; more where one split an item is not needed to fill the
/// device.
QUIRE_DEVICE int choose_splits(const PlanList& list) {
    const QuireAttentionPlanParams& p = list.p;
    const int wanted = kItemsPerBlock * (list.prefill ? p.prefill_blocks : p.decode_blocks);
    if (total_need(list, kAllSplits).items * p.num_kv_heads >= wanted) return kAllSplits;
    const int items = total_need(list, 1).items * p.num_kv_heads;
    for (int splits = max(1, items / max(1, 2 * wanted)); splits < kAllSplits / 2; splits *= 2) {
        const PlanNeed need = total_need(list, splits);
        if (need.items <= p.max_items && need.partials <= p.max_partials && need.counters <= p.max_counters) {
            return splits;
        }
    }
    return kAllSplits;
}

QUIRE_DEVICE void plan_list(const QuireAttentionPlanParams& p, bool prefill) {
    const PlanList list{p, prefill, prefill ? p.prefill_rows : QUIRE_DECODE_ROWS, *p.num_seqs};
    const int splits_per_item = choose_splits(list);
    PlanNeed base;
    for (int first = 0; first < list.num_seqs; first += blockDim.x) {
        const int seq = first + threadIdx.x;
        const PlanSequence s(p, seq, list.num_seqs);
        const PlanNeed need = list.need(s, splits_per_item);
        const BlockScan items = block_scan(need.items), partials = block_scan(need.partials),
                        counters = block_scan(need.counters);
        PlanNeed at = base;
        at.add({items.before, partials.before, counters.before});
        list.write(seq, s, splits_per_item, at);
        base.add({items.all, partials.all, counters.all});
    }
    if (threadIdx.x == 0) *(prefill ? p.num_prefill_items : p.num_decode_items) = base.items;
}

}  // namespace quire
