// Mixtures of experts: which experts a token goes to, which tokens an expert gets, and the sum of what they give.
//
// Floors at T = 64, 128 experts, k = 8, hidden 2048: route reads 32 KB, sort 2 KB, combine 2.1 MB (0.5 us): all three are
// latency. A row of logits stays in a warp's registers; k rounds of ten shuffles choose from it. The sort is one block: a
// step's slots are few (65536 for 8192 tokens, 64 a thread), and what follows needs the whole list.
#pragma once

#include "moe_params.h"
#include "quire.cuh"

namespace quire {

QUIRE_DEVICE void moe_route(const QuireMoeRouteParams& p) {
    constexpr int kEach = QUIRE_MOE_MAX_EXPERTS / 32;
    griddep_launch();
    griddep_wait();
    const int lane = int(threadIdx.x) % 32;
    const int row = int(blockIdx.x) * (QUIRE_MOE_ROUTE_THREADS / 32) + int(threadIdx.x) / 32;
    if (row >= *p.num_rows) return;
    const float lowest = __uint_as_float(0xff800000u);
    const float* const logits = p.logits + int64_t(row) * p.stride;

    // Logits, lowest for NaN and past the end; the softmax sees a NaN as it is.
    float mine[kEach];
    float max = lowest;
    QUIRE_UNROLL
    for (int i = 0; i < kEach; ++i) {
        const int expert = 32 * i + lane;
        mine[i] = expert < p.num_experts ? logits[expert] : lowest;
        max = fmaxf(max, mine[i]);
    }
    max = warp_max(max);
    float sum = 0.0f;
    QUIRE_UNROLL
    for (int i = 0; i < kEach; ++i) {
        if (32 * i + lane < p.num_experts) sum += __expf(mine[i] - max);
        if (!(mine[i] >= lowest)) mine[i] = lowest;
    }
    sum = warp_sum(sum);

    // Lane r keeps the expert of rank r, and those of ranks r + 32 and on are beyond what anyone asks for.
    uint32_t taken = 0;
    int my_expert = 0;
    float my_weight = 0.0f;
    for (int rank = 0; rank < p.top_k; ++rank) {
        float best = lowest;
        int expert = QUIRE_MOE_MAX_EXPERTS;
        QUIRE_UNROLL
        for (int i = 0; i < kEach; ++i) {
            const bool is_free = (taken >> i & 1) == 0 && 32 * i + lane < p.num_experts;
            if (is_free && (expert == QUIRE_MOE_MAX_EXPERTS || mine[i] > best)) best = mine[i], expert = 32 * i + lane;
        }
        QUIRE_UNROLL
        for (int offset = 16; offset > 0; offset >>= 1) {
            const float other = __shfl_xor_sync(kFullMask, best, offset);
            const int other_expert = __shfl_xor_sync(kFullMask, expert, offset);
            const bool none = expert == QUIRE_MOE_MAX_EXPERTS, other_none = other_expert == QUIRE_MOE_MAX_EXPERTS;
            const bool wins = other > best || (other == best && other_expert < expert);
            if (!other_none && (none || wins)) best = other, expert = other_expert;
        }
        if (expert % 32 == lane) taken |= 1u << (expert / 32);
        if (rank == lane) my_expert = expert, my_weight = __fdividef(__expf(best - max), sum);
    }
    float divisor = 1.0f;
    if (p.renormalise) {
        divisor = 0.0f;
        for (int rank = 0; rank < p.top_k; ++rank) divisor += __shfl_sync(kFullMask, my_weight, rank);
    }
    if (lane < p.top_k) {
        p.experts[int64_t(row) * p.top_k + lane] = my_expert;
        p.weights[int64_t(row) * p.top_k + lane] = __fdividef(my_weight, divisor);
    }
}

QUIRE_DEVICE void moe_sort(const QuireMoeSortParams& p) {
    constexpr int kEach = QUIRE_MOE_MAX_EXPERTS / 32;
    QUIRE_SHARED(counts, int32_t[QUIRE_MOE_MAX_EXPERTS]);
    QUIRE_SHARED(starts, int32_t[QUIRE_MOE_MAX_EXPERTS]);
    QUIRE_SHARED(first_tiles, int32_t[QUIRE_MOE_MAX_EXPERTS]);
    griddep_launch();
    const int thread = int(threadIdx.x), threads = int(blockDim.x);
    for (int expert = thread; expert < QUIRE_MOE_MAX_EXPERTS; expert += threads) counts[expert] = 0;
    __syncthreads();
    griddep_wait();
    const int num_slots = *p.num_rows * p.top_k;
    for (int slot = thread; slot < num_slots; slot += threads) atomicAdd(&counts[p.experts[slot]], 1);
    __syncthreads();
    if (thread < 32) {
        int slots = 0, tiles = 0;
        QUIRE_UNROLL
        for (int i = 0; i < kEach; ++i) {
            const int count = counts[thread * kEach + i];
            slots += count;
            tiles += (count + QUIRE_MOE_TILE_ROWS - 1) / QUIRE_MOE_TILE_ROWS;
        }
        int slots_end = slots, tiles_end = tiles;
        QUIRE_UNROLL
        for (int offset = 1; offset < 32; offset *= 2) {
            const int before = __shfl_up_sync(kFullMask, slots_end, offset);
            const int tiles_before = __shfl_up_sync(kFullMask, tiles_end, offset);
            if (thread >= offset) slots_end += before, tiles_end += tiles_before;
        }
        if (thread == 31) *p.num_tiles = tiles_end;
        slots = slots_end - slots;
        tiles = tiles_end - tiles;
        QUIRE_UNROLL
        for (int i = 0; i < kEach; ++i) {
            const int expert = thread * kEach + i, count = counts[expert];
            starts[expert] = slots;
            first_tiles[expert] = tiles;
            slots += count;
            tiles += (count + QUIRE_MOE_TILE_ROWS - 1) / QUIRE_MOE_TILE_ROWS;
        }
    }
    __syncthreads();
    for (int expert = thread; expert < p.num_experts; expert += threads) {
        QuireMoeTile* tile = p.tiles + first_tiles[expert];
        for (int done = 0; done < counts[expert]; done += QUIRE_MOE_TILE_ROWS) {
            const int count = min(counts[expert] - done, QUIRE_MOE_TILE_ROWS);
            *tile++ = QuireMoeTile{expert, starts[expert] + done, count, 0};
        }
    }
    __syncthreads();
    for (int slot = thread; slot < num_slots; slot += threads) p.slots[atomicAdd(&starts[p.experts[slot]], 1)] = slot;
}

template <typename T>
QUIRE_DEVICE void moe_combine(const QuireMoeCombineParams& p) {
    griddep_launch();
    griddep_wait();
    const int row = int(blockIdx.x);
    const int column = int(blockIdx.y) * QUIRE_MOE_COMBINE_COLUMNS + int(threadIdx.x) * 8;
    if (row >= *p.num_rows || column >= p.hidden) return;
    const int64_t first = int64_t(row) * p.top_k;
    const T* const y = static_cast<const T*>(p.y) + first * p.hidden + column;
    float sum[8] = {};
    for (int rank = 0; rank < p.top_k; ++rank) {
        const auto packed = load_once<Vec<uint32_t, 4>>(y + int64_t(rank) * p.hidden);
        const float weight = p.weights[first + rank];
        QUIRE_UNROLL
        for (int i = 0; i < 4; ++i) {
            const float2 both = unpack2<T>(packed.v[i]);
            sum[2 * i] += weight * both.x;
            sum[2 * i + 1] += weight * both.y;
        }
    }
    Vec<uint32_t, 4> packed;
    QUIRE_UNROLL
    for (int i = 0; i < 4; ++i) packed.v[i] = pack2<T>(sum[2 * i], sum[2 * i + 1]);
    store(static_cast<T*>(p.out) + int64_t(row) * p.hidden + column, packed);
}

}  // namespace quire
