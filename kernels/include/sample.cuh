// Chooses a token for each row without sorting the vocabulary; the ids are those of the reference backend's sampler.
//
// Floor: one read of the logits for rows without truncation (R = 256, vocabulary 128k: 131 MB, 30 us at 4.3 TB/s), two
// with top-k or top-p (histogram, gather); greedy rows read nothing but the partial maxima. One block of 1024 threads a
// row, two 16-byte loads a thread: 32 KB in flight on a multiprocessor. After its first pass a row (512 KB) mostly
// lies in the second-level cache. Arithmetic counts here: about 70 instructions a logit where masses are summed (70 us
// for the example), 30 where they are not.
//
// Truncation keeps a prefix of the ranking. A histogram over the distance from the largest logit (counts for top-k,
// masses for top-p) names the bin in which the prefix ends. As a rule the bins up to there hold at most kCandidates
// tokens: they are gathered and sorted in shared memory, and the rest of the work is done on them ("few"). If not, the
// last token kept is found digit by digit with six more histograms ("many"); flat distributions alone come here.
#pragma once

#include "select.cuh"

namespace quire {

/// What a running sum of masses must exceed to be drawn: u times the total. Sums are integers, so its floor will do.
QUIRE_DEVICE Mass draw_target(double u, Mass total) { return Mass(u * double(total)); }

/// What the mass before a token must be less than for top-p to keep it.
QUIRE_DEVICE Mass mass_limit(float top_p, Mass total) { return Mass(ceil(double(top_p) * double(total))); }

/// Whether min-p keeps a token, in the reference's f64.
struct MinP {
    bool is_on;
    double log_min_p;
    double max;

    QUIRE_DEVICE bool keeps(float l) const { return !is_on || double(l) - max >= log_min_p; }
};

/// Masses of candidates 2 * threadIdx.x and the next, 0 from `count` on.
struct MassPair {
    Mass first, second;
};
template <typename ValueOf>
QUIRE_DEVICE MassPair masses_of_candidates(const SelectMemory& m, const LogitsRow& row, int count, ValueOf value_of) {
    const int i = int(threadIdx.x) * 2;
    return {i < count ? row.mass(value_of(m.candidates[i])) : 0,
            i + 1 < count ? row.mass(value_of(m.candidates[i + 1])) : 0};
}

/// How many of the candidates 0..count, sorted by rank, top-p keeps: those before which there is less than `top_p` of
/// `row_total`, or, if that is 0, of their own mass.
QUIRE_DEVICE int truncate_by_mass(SelectMemory& m, const LogitsRow& row, int count, float top_p, Mass row_total) {
    const MassPair mass = masses_of_candidates(m, row, count, [](Ranked r) { return value_of(r); });
    const int i = int(threadIdx.x) * 2;
    Mass total;
    const Mass before = block_scan(m, mass.first + mass.second, total);
    const Mass limit = mass_limit(top_p, row_total ? row_total : total);
    return __syncthreads_count(i < count && before < limit) +
           __syncthreads_count(i + 1 < count && before + mass.first < limit);
}

/// Draws from candidates 0..count, sorted by rank: sorts them by id, then takes the first at which the running sum of
/// masses exceeds the target.
QUIRE_DEVICE int draw_from_few(SelectMemory& m, const LogitsRow& row, int count, const MinP& min_p, double u) {
    // (~id, key), so that the largest has the lowest id.
    for (int i = int(threadIdx.x); i < count; i += QUIRE_SAMPLE_THREADS) {
        const Ranked r = m.candidates[i];
        m.candidates[i] = min_p.keeps(value_of(r)) ? r << 32 | r >> 32 : 0;
    }
    __syncthreads();
    sort_candidates(m, count);
    const MassPair mass = masses_of_candidates(m, row, count, [&](Ranked r) {
        return r ? value_of_key(uint32_t(r)) : minus_infinity();
    });
    Mass total;
    const Mass before = block_scan(m, mass.first + mass.second, total), target = draw_target(u, total);
    // Exactly one candidate is crossed by the target.
    if (before <= target && before + mass.first + mass.second > target) {
        const int i = int(threadIdx.x) * 2 + (before + mass.first <= target);
        m.found = int(~uint32_t(m.candidates[i] >> 32));
    }
    __syncthreads();
    return m.found;
}

/// Draws from all tokens of rank `last` and before (0: all), by sums over every 128 neighbouring ids.
QUIRE_DEVICE int draw_from_many(SelectMemory& m, Mass* sums, const LogitsRow& row, Ranked last, const MinP& min_p,
                                double u) {
    const auto kept_mass = [&](int id, float raw) {
        const float l = row.value(raw);
        return ranked(l, id) >= last && min_p.keeps(l) ? row.mass(l) : Mass(0);
    };
    const int lane = int(threadIdx.x) % 32, num_sums = (row.vocab + 127) / 128;
    __syncthreads();
    for (int group = int(threadIdx.x) / 32; group < num_sums; group += QUIRE_SAMPLE_THREADS / 32) {
        const int id = group * 128 + lane * 4;
        Mass sum = 0;
        if (id < row.vocab) {
            const auto in = load<Vec<float, 4>>(row.logits + id);
            QUIRE_UNROLL
            for (int i = 0; i < 4; ++i) {
                if (id + i < row.vocab) sum += kept_mass(id + i, in.v[i]);
            }
        }
        QUIRE_UNROLL
        for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(kFullMask, sum, offset);
        if (lane == 0) sums[group] = sum;
    }
    __syncthreads();

    // The group that the target falls into: each thread has some neighbouring groups.
    const int each = (num_sums + QUIRE_SAMPLE_THREADS - 1) / QUIRE_SAMPLE_THREADS, first = int(threadIdx.x) * each;
    Mass mine = 0, total;
    for (int i = first; i < min(first + each, num_sums); ++i) mine += sums[i];
    Mass before = block_scan(m, mine, total);
    const Mass target = draw_target(u, total);
    for (int i = first; i < min(first + each, num_sums); ++i) {
        if (before <= target && before + sums[i] > target) {
            m.found = i;
            m.before = before;
        }
        before += sums[i];
    }
    __syncthreads();

    // The id within the group: by the first warp.
    const int group = m.found;
    before = m.before;
    __syncthreads();
    if (threadIdx.x < 32) {
        const int id = group * 128 + lane * 4;
        Mass mass[4], sum = 0;
        QUIRE_UNROLL
        for (int i = 0; i < 4; ++i) {
            mass[i] = id + i < row.vocab ? kept_mass(id + i, row.logits[id + i]) : 0;
            sum += mass[i];
        }
        Mass inclusive = sum;
        QUIRE_UNROLL
        for (int offset = 1; offset < 32; offset <<= 1) {
            const Mass other = __shfl_up_sync(kFullMask, inclusive, unsigned(offset));
            if (lane >= offset) inclusive += other;
        }
        before += inclusive - sum;
        QUIRE_UNROLL
        for (int i = 0; i < 4; ++i) {
            if (before <= target && before + mass[i] > target) m.found = id + i;
            before += mass[i];
        }
    }
    __syncthreads();
    return m.found;
}

/// The rank at which a running weight (1 a token, or its mass), from the most likely on and down to `floor`, reaches
/// `limit(total)`: exact, by nine bits of the rank a pass. 0 if it never does.
template <bool kByMass, typename Limit>
QUIRE_DEVICE Ranked find_rank(SelectMemory& m, const LogitsRow& row, Ranked floor, Limit limit) {
    // 32 bits of logit and 22 of id, six digits; the largest first.
    constexpr int kDigit = 9, kIdBits = 22;
    const auto compact = [](Ranked r) { return r >> 32 << kIdBits | (r & ((1u << kIdBits) - 1)); };
    Ranked prefix = 0;
    Mass wanted = 0;
    for (int shift = 5 * kDigit; shift >= 0; shift -= kDigit) {
        __syncthreads();
        m.histogram.clear();
        __syncthreads();
        for_each_logit(row, [&](int id, float l) {
            const Ranked r = ranked(l, id), c = compact(r);
            if (r < floor || c >> (shift + kDigit) != prefix) return;
            const uint32_t digit = (1u << kDigit) - 1 - (uint32_t(c >> shift) & ((1u << kDigit) - 1));
            m.histogram.add(digit, kByMass ? row.mass(l) : Mass(1));
        });
        const bool is_first = shift == 5 * kDigit;
        find_bin(m, [&](Mass total) {
            if (is_first) wanted = limit(total);
            return wanted;
        });
        if (m.found < 0) return 0;
        wanted -= m.before;
        prefix = prefix << kDigit | ((1u << kDigit) - 1 - uint32_t(m.found));
    }
    const uint32_t low = uint32_t(prefix & ((1u << kIdBits) - 1)) | ~0u << kIdBits;
    return prefix >> kIdBits << 32 | low;
}

/// A draw from the row under the slot's temperature and truncation.
QUIRE_DEVICE int draw(SelectMemory& m, Mass* sums, const LogitsRow& row, const QuireSlotSampling& slot,
                      uint32_t position) {
    const double u = uniform(slot.seed, position);
    const MinP min_p = {slot.min_p > 0.0f, log(double(slot.min_p)), double(row.max)};
    const bool by_count = slot.top_k > 0 && slot.top_k < uint32_t(row.vocab), by_mass = slot.top_p < 1.0f;
    if (!by_count && !by_mass) return draw_from_many(m, sums, row, 0, min_p, u);

    m.histogram.clear();
    __syncthreads();
    for_each_logit(row, [&](int, float l) {
        const uint32_t bin = row.bin_of(l);
        if (bin != kFar) m.histogram.add(bin, by_count ? Mass(1) : row.mass(l));
    });
    Mass row_total = 0;
    find_bin(m, [&](Mass total) {
        row_total = total;
        return by_count ? Mass(slot.top_k) : mass_limit(slot.top_p, total);
    });
    // Fewer than k tokens with any mass: all of them are candidates.
    const uint32_t last_bin = m.found < 0 ? kBins - 1 : uint32_t(m.found);
    int count = gather_candidates(m, row, last_bin);
    if (count <= kCandidates) {
        if (by_count) count = min(count, int(slot.top_k));
        if (by_mass) count = truncate_by_mass(m, row, count, slot.top_p, by_count ? 0 : row_total);
        return draw_from_few(m, row, count, min_p, u);
    }
    Ranked last = 0;
    if (by_count) last = find_rank<false>(m, row, 0, [&](Mass) { return Mass(slot.top_k); });
    if (by_mass) {
        last = find_rank<true>(m, row, last, [&](Mass total) { return mass_limit(slot.top_p, total); });
    }
    return draw_from_many(m, sums, row, last, min_p, u);
}

/// What is chosen where no logit is left: the bitmask's lowest id, 0 without a bitmask.
QUIRE_DEVICE int lowest_allowed(const uint32_t* mask, int mask_words) {
    if (!mask) return 0;
    uint32_t lowest = 0xffffffffu;
    for (int i = int(threadIdx.x); i < mask_words; i += QUIRE_SAMPLE_THREADS) {
        if (mask[i]) {
            lowest = uint32_t(i) * 32 + uint32_t(__ffs(int(mask[i])) - 1);
            break;
        }
    }
    const Ranked best = block_best(Ranked(~lowest));
    const uint32_t id = ~uint32_t(best);
    return id == 0xffffffffu ? 0 : int(id);
}

QUIRE_DEVICE void sample(const QuireSampleParams& p) {
    QUIRE_SHARED(memory, SelectMemory);
    QUIRE_DYNAMIC_SHARED(sums);
    griddep_launch();
    griddep_wait();
    const int index = int(blockIdx.x);
    if (index >= *p.num_rows) return;
    const QuireLogitRow at = p.rows[index];
    if (at.target >= 0) {
        if (threadIdx.x == 0) p.sampled[index] = at.target;
        return;
    }
    const QuireSlotSampling slot = p.slots[at.slot];
    const uint32_t* const mask = mask_of(p.masks, p.mask_rows, p.mask_words, index);
    const bool adjusted = is_adjusted(slot, at.position, mask != nullptr);
    const Ranked best = best_of_parts(p.best, p.splits, index, 0);
    int token;
    if (uint32_t(best >> 32) <= kMinusInfinityKey) {
        token = lowest_allowed(mask, p.mask_words);
    } else if (slot.temperature == 0.0f) {
        token = id_of(best);
    } else {
        const float* const logits = (adjusted ? p.adjusted : p.logits) + int64_t(index) * p.stride;
        const LogitsRow row = logits_row(logits, p.vocab, slot.temperature, best);
        token = draw(memory, reinterpret_cast<Mass*>(sums), row, slot, at.position);
    }
    if (threadIdx.x != 0) return;
    p.sampled[index] = token;
    p.last_tokens[at.slot] = token;
    if (slot.counts >= 0 && token < p.vocab) p.counts[int64_t(slot.counts) * p.vocab + token] += 1;
}

}  // namespace quire
