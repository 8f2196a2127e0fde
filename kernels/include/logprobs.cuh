// Log-probabilities of raw logits: of one token, with its rank, and of the most likely few.
//
// Floor: one read of the logits, two if the most likely are asked for. One block a row, as in sample.cuh; rows that ask
// for nothing leave at once.
#pragma once

#include "select.cuh"

namespace quire {

/// The `n` most likely tokens into candidates 0..n, in order; how many there are.
QUIRE_DEVICE int most_likely(SelectMemory& m, const LogitsRow& row, int n) {
    n = min(n, row.vocab);
    find_bin(m, [&](Mass) { return Mass(n); });
    if (m.found >= 0 && gather_candidates(m, row, uint32_t(m.found)) <= kCandidates) return n;
    // Too many as likely as each other, or too few within sight of the largest: one pass each.
    Ranked last = ~Ranked(0);
    for (int i = 0; i < n; ++i) {
        Ranked best = 0;
        for_each_logit(row, [&](int id, float l) {
            const Ranked r = ranked(l, id);
            if (r < last) best = max(best, r);
        });
        last = block_best(best);
        __syncthreads();
        if (threadIdx.x == 0) m.candidates[i] = last;
    }
    __syncthreads();
    return n;
}

QUIRE_DEVICE void logprobs(const QuireLogprobsParams& p) {
    QUIRE_SHARED(memory, SelectMemory);
    griddep_launch();
    griddep_wait();
    const int index = int(blockIdx.x);
    if (index >= *p.num_rows) return;
    const QuireLogitRow at = p.rows[index];
    if (at.num_logprobs < 0) return;
    const LogitsRow row = logits_row(p.logits + int64_t(index) * p.stride, p.vocab, 1.0f,
                                     best_of_parts(p.best, p.splits, index, 1));
    const int token = p.sampled[index], num_top = min(at.num_logprobs, p.max_top);
    const bool is_known = token >= 0 && token < p.vocab;
    const float mine = is_known ? sanitize(row.logits[token]) : minus_infinity();
    const Ranked own = ranked(mine, token);

    SelectMemory& m = memory;
    m.histogram.clear();
    __syncthreads();
    Mass mass = 0, more_likely = 0, total_mass, total_more;
    for_each_logit(row, [&](int id, float l) {
        const uint32_t bin = row.bin_of(l);
        more_likely += ranked(l, id) > own;
        if (bin == kFar) return;
        mass += row.mass(l);
        if (num_top > 0) m.histogram.add(bin, 1);
    });
    block_scan(m, mass, total_mass);
    block_scan(m, more_likely, total_more);
    const double log_sum = log(double(total_mass) / 17592186044416.0);  // 2^44
    const auto logprob = [&](float l) {
        return l == minus_infinity() ? l : float(double(l) - double(row.max) - log_sum);
    };
    if (threadIdx.x == 0) {
        p.logprob[index] = logprob(mine);
        p.rank[index] = is_known ? int(total_more) + 1 : 0;
    }
    const int found = num_top > 0 ? most_likely(m, row, num_top) : 0;
    for (int i = int(threadIdx.x); i < p.max_top; i += QUIRE_SAMPLE_THREADS) {
        p.top_ids[int64_t(index) * p.max_top + i] = i < found ? id_of(m.candidates[i]) : -1;
        p.top_logprobs[int64_t(index) * p.max_top + i] =
            i < found ? logprob(value_of(m.candidates[i])) : minus_infinity();
    }
}

}  // namespace quire
