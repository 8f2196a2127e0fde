// The arithmetic of sampling, in integers wherever a sum is taken and in IEEE operations elsewhere: the same ids on every
// GPU, in every batch, whatever the order of additions, and in the host build too.
//
// A probability relative to the most likely token, exp(l - max), is a multiple of 2^-44 (`Mass`), right to about 2^-23
// relative. Sums of up to 2^19 of them fit 64 bits, are exact, and need no order.
#pragma once

#include "quire.cuh"
#include "sampling_params.h"

namespace quire {

using Mass = unsigned long long;

/// The largest finite number.
constexpr float kLargest = 3.4028234663852886e38f;
constexpr uint32_t kMinusInfinityKey = 0x007fffffu;

QUIRE_DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }

/// NaN becomes -inf, +inf the largest finite number.
QUIRE_DEVICE float sanitize(float l) { return l != l ? minus_infinity() : fminf(l, kLargest); }

/// Orders floats as unsigned integers; -0 equals +0.
QUIRE_DEVICE uint32_t key_of(float l) {
    const uint32_t bits = __float_as_uint(l + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
QUIRE_DEVICE float value_of_key(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

/// Orders tokens of a row: larger is more likely, or as likely with a lower id.
using Ranked = unsigned long long;
QUIRE_DEVICE Ranked ranked(float l, int id) { return Ranked(key_of(l)) << 32 | uint32_t(~id); }
QUIRE_DEVICE int id_of(Ranked r) { return int(~uint32_t(r)); }
QUIRE_DEVICE float value_of(Ranked r) { return value_of_key(uint32_t(r >> 32)); }

/// Where a mass is zero: 2^44 exp(-31) is less than one.
constexpr float kMaxDistance = 31.0f;

/// 2^44 exp(-distance), cut off to an integer; 0 from kMaxDistance on, and for NaN.
///
/// Two to the power of a number in -1/2..1/2 by a polynomial in fused steps, each rounded as IEEE says: to 2^-23, and the
/// same bits on every device. The result's mantissa is shifted into place.
QUIRE_DEVICE Mass mass_of(float distance) {
    if (!(distance < kMaxDistance)) return 0;
    // Adding 1.5 * 2^23 rounds to an integer, which the lowest bits hold.
    constexpr float kRound = 12582912.0f;
    const float shifted = __fmaf_rn(distance, 1.442695022e+00f, kRound);
    float r = __fmaf_rn(distance, 1.442695022e+00f, -__fsub_rn(shifted, kRound));
    r = __fmaf_rn(distance, 1.925963034e-08f, r);
    float power = 1.545326231e-04f;
    power = __fmaf_rn(r, power, -1.339097857e-03f);
    power = __fmaf_rn(r, power, 9.618082084e-03f);
    power = __fmaf_rn(r, power, -5.550356954e-02f);
    power = __fmaf_rn(r, power, 2.402265072e-01f);
    power = __fmaf_rn(r, power, -6.931471825e-01f);
    power = __fmaf_rn(r, power, 1.0f);
    // The power is in 0.7..1.42, and at most 1 where the integer is 0: so the shift is never negative.
    const uint32_t bits = __float_as_uint(power), integer = __float_as_uint(shifted) & 63u;
    return (Mass((bits & 0x7fffffu) | 0x800000u) << 21) >> (integer + 127u - (bits >> 23));
}

/// The first word of Philox4x32-10 (Salmon et al., SC 2011) under (seed, position), as a number in (0, 1).
QUIRE_DEVICE double uniform(unsigned long long seed, uint32_t position) {
    uint32_t c0 = position, c1 = 0, c2 = 0, c3 = 0, k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint32_t a_hi = __umulhi(0xD2511F53u, c0), a_lo = 0xD2511F53u * c0;
        const uint32_t b_hi = __umulhi(0xCD9E8D57u, c2), b_lo = 0xCD9E8D57u * c2;
        c0 = b_hi ^ c1 ^ k0, c1 = b_lo, c2 = a_hi ^ c3 ^ k1, c3 = a_lo;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return (double(c0) + 0.5) / 4294967296.0;
}

/// The bitmask of logit row `row`, or null.
QUIRE_DEVICE const uint32_t* mask_of(const uint32_t* masks, const int32_t* mask_rows, int mask_words, int row) {
    if (!masks || !mask_rows || mask_rows[row] < 0) return nullptr;
    return masks + int64_t(mask_rows[row]) * mask_words;
}

/// Whether fewer than `min_tokens` tokens were generated before `position`.
QUIRE_DEVICE bool holds_stops(const QuireSlotSampling& slot, uint32_t position) {
    const uint32_t generated = position > slot.prompt_len ? position - slot.prompt_len : 0;
    return slot.stop_count > 0 && generated < slot.min_tokens;
}

/// Whether quire_logits_process writes the row to `adjusted`.
QUIRE_DEVICE bool is_adjusted(const QuireSlotSampling& slot, uint32_t position, bool has_mask) {
    return has_mask || slot.counts >= 0 || slot.bias_count > 0 || holds_stops(slot, position);
}

/// The larger over the warp, in every lane.
QUIRE_DEVICE Ranked warp_best(Ranked best) {
    QUIRE_UNROLL
    for (int offset = 16; offset > 0; offset >>= 1) best = max(best, __shfl_xor_sync(kFullMask, best, offset));
    return best;
}

/// The larger over the block, in every thread.
QUIRE_DEVICE Ranked block_best(Ranked best) {
    QUIRE_SHARED(partials, Ranked[32]);
    best = warp_best(best);
    __syncthreads();
    if (threadIdx.x % 32 == 0) partials[threadIdx.x / 32] = best;
    __syncthreads();
    return warp_best(threadIdx.x % 32 < blockDim.x / 32 ? partials[threadIdx.x % 32] : 0);
}

/// The row's largest of the parts' (`which` 0: adjusted, 1: raw), in every thread of the calling warp.
QUIRE_DEVICE Ranked best_of_parts(const uint64_t* best, int splits, int row, int which) {
    Ranked most = 0;
    for (int i = int(threadIdx.x % 32); i < splits; i += 32) {
        most = max(most, Ranked(best[(int64_t(row) * splits + i) * 2 + which]));
    }
    return warp_best(most);
}

}  // namespace quire
