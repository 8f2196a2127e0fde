// The tools that sampling and log-probabilities share, for one block of QUIRE_SAMPLE_THREADS that owns a row: passes over
// the logits, histograms of counts or masses, scans, and the sort of a few candidates.
#pragma once

#include "sample_math.cuh"

namespace quire {

/// Bins of a histogram: the block's threads.
constexpr int kBins = QUIRE_SAMPLE_THREADS;
/// Candidates that are sorted in shared memory; a power of two, two a thread.
constexpr int kCandidates = 2 * QUIRE_SAMPLE_THREADS;
/// No bin.
constexpr uint32_t kFar = 0xffffffffu;

/// A row of logits as it is sampled from.
struct LogitsRow {
    const float* logits;
    int vocab;
    /// 1: as they are.
    float temperature;
    float max;

    QUIRE_DEVICE float value(float raw) const {
        const float l = sanitize(raw);
        return temperature == 1.0f ? l : sanitize(__fdiv_rn(l, temperature));
    }
    QUIRE_DEVICE Mass mass(float l) const { return mass_of(__fsub_rn(max, l)); }
    /// Bins of equal width in distance from the largest logit, 1/32 each, so that kBins of them cover every mass but
    /// zero; kFar where it is zero. Rounding may move a token into the next bin, but never past a more likely one.
    QUIRE_DEVICE uint32_t bin_of(float l) const {
        const float distance = __fsub_rn(max, l);
        return distance < kMaxDistance ? uint32_t(distance * 32.0f) : kFar;
    }
};

QUIRE_DEVICE LogitsRow logits_row(const float* logits, int vocab, float temperature, Ranked best) {
    LogitsRow row = {logits, vocab, temperature, 0.0f};
    row.max = row.value(value_of(best));
    return row;
}

/// Calls `f(id, l)` for every id of the row: four neighbours a thread, two 16-byte loads in flight.
template <typename F>
QUIRE_DEVICE void for_each_logit(const LogitsRow& row, F f) {
    constexpr int kTile = QUIRE_SAMPLE_THREADS * 4;
    for (int first = int(threadIdx.x) * 4; first < row.vocab; first += 2 * kTile) {
        const bool has_second = first + kTile < row.vocab;
        const auto lo = load<Vec<float, 4>>(row.logits + first);
        Vec<float, 4> hi = {};
        if (has_second) hi = load<Vec<float, 4>>(row.logits + first + kTile);
        QUIRE_UNROLL
        for (int i = 0; i < 4; ++i) {
            if (first + i < row.vocab) f(first + i, row.value(lo.v[i]));
        }
        QUIRE_UNROLL
        for (int i = 0; i < 4; ++i) {
            if (first + kTile + i < row.vocab) f(first + kTile + i, row.value(hi.v[i]));
        }
    }
}

/// Sums of 64 bits kept as two words, because shared memory adds words: a carry is seen by whoever caused it.
struct Histogram {
    uint32_t lo[kBins];
    uint32_t hi[kBins];

    QUIRE_DEVICE void clear() {
        lo[threadIdx.x] = 0;
        hi[threadIdx.x] = 0;
    }
    QUIRE_DEVICE void add(uint32_t bin, Mass weight) {
        const uint32_t low = uint32_t(weight);
        const uint32_t before = atomicAdd(&lo[bin], low);
        const uint32_t high = uint32_t(weight >> 32) + (before + low < before);
        if (high) atomicAdd(&hi[bin], high);
    }
    QUIRE_DEVICE Mass sum(int bin) const { return Mass(hi[bin]) << 32 | lo[bin]; }
};

/// What the block shares while it samples one row.
struct SelectMemory {
    Histogram histogram;
    Ranked candidates[kCandidates];
    Mass warp_sums[32];
    /// Written by one thread, read by all after a barrier.
    uint32_t count;
    int found;
    Mass before;
};

/// Sum of `x` over the threads before this one; `total` over all. Exact, so in any order.
QUIRE_DEVICE Mass block_scan(SelectMemory& m, Mass x, Mass& total) {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    Mass inclusive = x;
    QUIRE_UNROLL
    for (int offset = 1; offset < 32; offset <<= 1) {
        const Mass other = __shfl_up_sync(kFullMask, inclusive, unsigned(offset));
        if (lane >= offset) inclusive += other;
    }
    __syncthreads();
    if (lane == 31) m.warp_sums[warp] = inclusive;
    __syncthreads();
    Mass sums = m.warp_sums[lane];
    QUIRE_UNROLL
    for (int offset = 1; offset < 32; offset <<= 1) {
        const Mass other = __shfl_up_sync(kFullMask, sums, unsigned(offset));
        if (lane >= offset) sums += other;
    }
    total = __shfl_sync(kFullMask, sums, 31);
    const Mass before_warp = warp == 0 ? 0 : __shfl_sync(kFullMask, sums, (warp + 31) % 32);
    return before_warp + inclusive - x;
}

/// Of the histogram's bins in ascending order, the first at which the running sum reaches `limit(total)`: into m.found,
/// and the sum before it into m.before; m.found is -1 if none does. Ends with a barrier.
template <typename Limit>
QUIRE_DEVICE void find_bin(SelectMemory& m, Limit limit) {
    __syncthreads();
    const Mass mine = m.histogram.sum(int(threadIdx.x));
    if (threadIdx.x == 0) m.found = -1;
    Mass total;
    const Mass before = block_scan(m, mine, total), wanted = limit(total);
    if (before < wanted && before + mine >= wanted) {
        m.found = int(threadIdx.x);
        m.before = before;
    }
    __syncthreads();
}

/// Sorts the first `count` candidates, largest first (bitonic). `count` <= kCandidates; what lies behind is overwritten.
QUIRE_DEVICE void sort_candidates(SelectMemory& m, int count) {
    int size = 2;
    while (size < count) size *= 2;
    for (int i = int(threadIdx.x); i < size; i += QUIRE_SAMPLE_THREADS) {
        if (i >= count) m.candidates[i] = 0;
    }
    for (int run = 2; run <= size; run *= 2) {
        for (int step = run / 2; step > 0; step /= 2) {
            __syncthreads();
            const int pair = int(threadIdx.x);
            if (pair < size / 2) {
                const int i = pair / step * step * 2 + pair % step, j = i + step;
                const Ranked a = m.candidates[i], b = m.candidates[j];
                if ((a < b) == ((i & run) == 0)) {
                    m.candidates[i] = b;
                    m.candidates[j] = a;
                }
            }
        }
    }
    __syncthreads();
}

/// Collects every token whose distance is in bins 0..=last, sorted, and returns how many there are; if there are more
/// than kCandidates, only how many.
QUIRE_DEVICE int gather_candidates(SelectMemory& m, const LogitsRow& row, uint32_t last) {
    if (threadIdx.x == 0) m.count = 0;
    __syncthreads();
    for_each_logit(row, [&](int id, float l) {
        if (row.bin_of(l) > last) return;
        const uint32_t at = atomicAdd(&m.count, 1u);
        if (at < uint32_t(kCandidates)) m.candidates[at] = ranked(l, id);
    });
    __syncthreads();
    const int count = int(m.count);
    if (count <= kCandidates) sort_candidates(m, count);
    return count;
}

}  // namespace quire
