// From raw logits to those that are sampled from: minimum length, bitmask, bias, penalties, in the reference's order and
// with its roundings; and the largest logit of each part of a row, which is the answer for greedy rows.
//
// Floor: one read of the logits, f32: R = 256, vocabulary 128k: 131 MB, 30 us at 4.3 TB/s; rows that are adjusted are
// written once too. A block takes 8192 ids, eight 16-byte loads a thread, four in flight: with six blocks 96 KB on a
// multiprocessor. One row fills 16 blocks, so that a batch of one is not left to a single multiprocessor.
#pragma once

#include "sample_math.cuh"

namespace quire {

/// What changes the logits of one row.
struct Adjustment {
    const uint32_t* mask;
    int mask_words;
    const uint32_t* counts;
    float repetition, presence, frequency;
};

QUIRE_DEVICE float adjust(const Adjustment& a, int id, float l, float bias) {
    if (a.mask) {
        const bool allowed = id / 32 < a.mask_words && (a.mask[id / 32] >> (id % 32) & 1);
        if (!allowed) l = minus_infinity();
    }
    l = __fadd_rn(l, bias);
    if (a.counts) {
        const uint32_t count = a.counts[id], output = count & 0x7fffffffu;
        if (count != 0 && a.repetition != 1.0f) {
            l = l > 0.0f ? __fdiv_rn(l, a.repetition) : __fmul_rn(l, a.repetition);
        }
        if (output > 0) {
            l = __fsub_rn(l, a.presence);
            l = __fsub_rn(l, __fmul_rn(a.frequency, float(output)));
        }
    }
    return sanitize(l);
}

/// Ids of one part whose logits have a bias or are held back: one bit each.
struct SpecialIds {
    uint32_t words[QUIRE_LOGITS_PART / 32];
};

QUIRE_DEVICE void mark_special(SpecialIds& special, const int32_t* ids, int count, int begin, int end) {
    for (int i = int(threadIdx.x); i < count; i += QUIRE_LOGITS_THREADS) {
        const int at = ids[i] - begin;
        if (at >= 0 && ids[i] < end) atomicOr(&special.words[at / 32], 1u << (at % 32));
    }
}

/// The ids that were marked: their logits once more, with bias, or -inf. Returns the best of the caller's.
QUIRE_DEVICE Ranked adjust_special(const QuireLogitsParams& p, const QuireSlotSampling& slot, const Adjustment& a,
                                   bool holds, const float* raw, float* out, int begin, int end) {
    Ranked best = 0;
    const int32_t* const stops = p.stop_ids + slot.stop_begin;
    for (int i = int(threadIdx.x); i < slot.bias_count; i += QUIRE_LOGITS_THREADS) {
        const int id = p.bias_ids[slot.bias_begin + i];
        if (id < begin || id >= end) continue;
        bool held = false;
        for (int s = 0; holds && s < slot.stop_count; ++s) held |= stops[s] == id;
        if (held) continue;
        const float l = adjust(a, id, sanitize(raw[id]), p.bias_values[slot.bias_begin + i]);
        out[id] = l;
        best = max(best, ranked(l, id));
    }
    for (int i = int(threadIdx.x); holds && i < slot.stop_count; i += QUIRE_LOGITS_THREADS) {
        if (stops[i] >= begin && stops[i] < end) out[stops[i]] = minus_infinity();
    }
    return best;
}

/// The largest of ids begin..end as they are: four 16-byte loads a thread at a time.
QUIRE_DEVICE Ranked best_of_part(const float* raw, int begin, int end) {
    constexpr int kLoads = 4, kTile = QUIRE_LOGITS_THREADS * 4;
    float best = minus_infinity();
    int best_id = begin;
    for (int first = begin + int(threadIdx.x) * 4; first < end; first += kLoads * kTile) {
        Vec<float, 4> in[kLoads];
        QUIRE_UNROLL
        for (int j = 0; j < kLoads; ++j) {
            if (first + j * kTile < end) in[j] = load<Vec<float, 4>>(raw + first + j * kTile);
        }
        QUIRE_UNROLL
        for (int j = 0; j < kLoads; ++j) {
            QUIRE_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int id = first + j * kTile + i;
                if (id >= end) continue;
                // Ids ascend, so the lowest of equals is met first; NaN is never larger.
                const float l = in[j].v[i] > kLargest ? kLargest : in[j].v[i];
                if (l > best) best = l, best_id = id;
            }
        }
    }
    return ranked(best, best_id);
}

/// Ids begin..end with all that changes them, from `raw` to `out`; their largest.
QUIRE_DEVICE Ranked adjust_part(const QuireLogitsParams& p, const QuireSlotSampling& slot, const Adjustment& a,
                                bool holds, const float* raw, float* out, int begin, int end) {
    QUIRE_SHARED(special, SpecialIds);
    const bool has_special = holds || slot.bias_count > 0;
    if (has_special) {
        for (int i = int(threadIdx.x); i < QUIRE_LOGITS_PART / 32; i += QUIRE_LOGITS_THREADS) special.words[i] = 0;
        __syncthreads();
        mark_special(special, p.bias_ids + slot.bias_begin, slot.bias_count, begin, end);
        if (holds) mark_special(special, p.stop_ids + slot.stop_begin, slot.stop_count, begin, end);
        __syncthreads();
    }
    Ranked best = 0;
    for (int id = begin + int(threadIdx.x) * 4; id < end; id += QUIRE_LOGITS_THREADS * 4) {
        const auto in = load<Vec<float, 4>>(raw + id);
        Vec<float, 4> adjusted;
        QUIRE_UNROLL
        for (int i = 0; i < 4; ++i) {
            adjusted.v[i] = minus_infinity();
            if (id + i >= end) continue;
            adjusted.v[i] = adjust(a, id + i, sanitize(in.v[i]), 0.0f);
            const int bit = id + i - begin;
            if (has_special && (special.words[bit / 32] >> (bit % 32) & 1)) continue;
            best = max(best, ranked(adjusted.v[i], id + i));
        }
        store(out + id, adjusted);
    }
    if (!has_special) return best;
    __syncthreads();
    return max(best, adjust_special(p, slot, a, holds, raw, out, begin, end));
}

QUIRE_DEVICE void logits_process(const QuireLogitsParams& p) {
    griddep_launch();
    griddep_wait();
    const int row = int(blockIdx.x), begin = int(blockIdx.y) * QUIRE_LOGITS_PART;
    if (row >= *p.num_rows) return;
    const int end = min(begin + QUIRE_LOGITS_PART, p.vocab);
    const QuireLogitRow at = p.rows[row];
    const QuireSlotSampling slot = p.slots[at.slot];
    const uint32_t* const mask = mask_of(p.masks, p.mask_rows, p.mask_words, row);
    const float* const raw = p.logits + int64_t(row) * p.stride;

    const bool adjusts = at.target < 0 && is_adjusted(slot, at.position, mask != nullptr);
    // The raw maximum serves log-probabilities, and rows that nothing changes.
    Ranked best_raw = 0, best = 0;
    if (!adjusts || at.num_logprobs >= 0) best_raw = block_best(best_of_part(raw, begin, end));
    if (adjusts) {
        const Adjustment a = {mask,
                              p.mask_words,
                              slot.counts >= 0 ? p.counts + int64_t(slot.counts) * p.vocab : nullptr,
                              slot.repetition_penalty,
                              slot.presence_penalty,
                              slot.frequency_penalty};
        float* const out = p.adjusted + int64_t(row) * p.stride;
        best = block_best(adjust_part(p, slot, a, holds_stops(slot, at.position), raw, out, begin, end));
    }
    if (threadIdx.x == 0) {
        uint64_t* const to = p.best + (int64_t(row) * gridDim.y + blockIdx.y) * 2;
        to[0] = adjusts ? best : best_raw;
        to[1] = best_raw;
    }
}

QUIRE_DEVICE void count_tokens(const QuireCountTokensParams& p) {
    griddep_launch();
    griddep_wait();
    for (int id = int(threadIdx.x); id < p.vocab; id += int(blockDim.x)) p.counts[id] = 0;
    __syncthreads();
    for (int i = int(threadIdx.x); i < p.num_tokens; i += int(blockDim.x)) {
        const int id = p.tokens[i];
        if (id < 0 || id >= p.vocab) continue;
        if (i < p.num_prompt) {
            atomicOr(&p.counts[id], 0x80000000u);
        } else {
            atomicAdd(&p.counts[id], 1u);
        }
    }
}

}  // namespace quire
