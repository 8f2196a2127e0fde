// The step's plan on the device: where each token row stands and where its K and V go, from three ints a sequence; and
// the upkeep of the resident block tables by what changed. A step then needs one small copy from the host.
//
// Floor: a few KB, so launch-bound. One thread a row; it finds its sequence by bisection in cu_seqlens_q, which the
// first-level cache holds.
#pragma once

#include "params.h"
#include "quire.cuh"

namespace quire {

QUIRE_DEVICE void step_plan(const QuireStepPlanParams& p) {
    griddep_launch();
    griddep_wait();
    const int num_seqs = *p.num_seqs, num_rows = p.cu_seqlens_q[num_seqs];
    const int row = int(blockIdx.x * blockDim.x + threadIdx.x);
    if (row == 0) *p.num_rows = num_rows;
    if (row >= p.bucket) return;
    int position = 0, slot = -1;
    if (row < num_rows) {
        // The last sequence whose first row is not after this one.
        int s = 0;
        for (int end = num_seqs; end - s > 1;) {
            const int middle = (s + end) / 2;
            if (p.cu_seqlens_q[middle] <= row) {
                s = middle;
            } else {
                end = middle;
            }
        }
        position = p.seq_lens[s] - (p.cu_seqlens_q[s + 1] - row);
        const int32_t* const table = p.block_tables + int64_t(p.seq_slots[s]) * p.table_stride;
        slot = table[position / p.page_tokens] * p.page_tokens + position % p.page_tokens;
    }
    p.positions[row] = position;
    p.slot_mapping[row] = slot;
}

QUIRE_DEVICE void update_tables(const QuireUpdateTablesParams& p) {
    griddep_launch();
    griddep_wait();
    const int num_entries = *p.num_entries;
    for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < num_entries; i += int(gridDim.x * blockDim.x)) {
        const int32_t* const entry = p.entries + 3 * int64_t(i);
        p.block_tables[int64_t(entry[0]) * p.table_stride + entry[1]] = entry[2];
    }
}

}  // namespace quire
