// Between the qkv product and attention: bias, per-head RMSNorm of q and k (Qwen3), rotary embedding (RoFormer, arXiv
// 2104.09864, half-split layout) and the write of k and v to their pages.
//
// Floor: reads a row of qkv, writes q back and k, v to the cache: 4 bytes an element; T = 8192, 32 + 2 * 8 heads of 128:
// 201 MB, 47 us at 4.3 TB/s; T = 64: 1.6 MB, launch-bound. A head belongs to head_dim / 16 neighbouring threads; each
// loads 16 bytes of its lower and 16 of its upper half, so pairs meet in one thread and the norm's sum is a few
// shuffles. Five blocks of 256 threads keep 40 KB in flight. The table of sines is read once a token and shared by its
// heads through the first-level cache.
#pragma once

#include "params.h"
#include "quire.cuh"

namespace quire {

/// Which of a token's heads this is, and where it goes.
struct RopeHead {
    bool is_q;
    bool is_v;
    /// Within k or v.
    int kv_head;
};

QUIRE_DEVICE RopeHead rope_head(const QuireRopeCacheParams& p, int head) {
    const int kv = head - p.num_heads;
    const bool is_v = kv >= p.num_kv_heads;
    return {kv < 0, is_v, is_v ? kv - p.num_kv_heads : kv};
}

/// Row of the cache, counted in heads of one token, and of kv_scales.
QUIRE_DEVICE int64_t kv_index(const QuireRopeCacheParams& p, const RopeHead& head, int slot) {
    const int page = slot / p.page_tokens, offset = slot % p.page_tokens;
    return ((int64_t(page) * 2 + head.is_v) * p.num_kv_heads + head.kv_head) * p.page_tokens + offset;
}

/// The power of two that brings `largest` to at most 448, e4m3's largest.
QUIRE_DEVICE float e4m3_scale(float largest) {
    const uint32_t bits = __float_as_uint(largest * (1.0f / 448.0f));
    uint32_t exponent = (bits >> 23) + ((bits & 0x7fffffu) != 0);
    // Kept far from the ends, where a scale or its inverse would be denormal.
    exponent = exponent < 27 ? 127 : exponent > 227 ? 227 : exponent;
    return __uint_as_float(exponent << 23);
}

/// 1 / scale of a power of two.
QUIRE_DEVICE float inverse_of_power(float scale) { return __uint_as_float((254u << 23) - __float_as_uint(scale)); }

template <typename T>
QUIRE_DEVICE void unpack8(const Vec<uint32_t, 4>& packed, float* x) {
    QUIRE_UNROLL
    for (int i = 0; i < 4; ++i) {
        const float2 two = unpack2<T>(packed.v[i]);
        x[2 * i] = two.x, x[2 * i + 1] = two.y;
    }
}

template <typename T>
QUIRE_DEVICE Vec<uint32_t, 4> pack8(const float* x) {
    Vec<uint32_t, 4> packed;
    QUIRE_UNROLL
    for (int i = 0; i < 4; ++i) packed.v[i] = pack2<T>(x[2 * i], x[2 * i + 1]);
    return packed;
}

QUIRE_DEVICE void add8(float* x, const float* from) {
    const auto lo = load<Vec<float, 4>>(from), hi = load<Vec<float, 4>>(from + 4);
    QUIRE_UNROLL
    for (int i = 0; i < 4; ++i) x[i] += lo.v[i], x[i + 4] += hi.v[i];
}

QUIRE_DEVICE void scale8(float* x, float scale, const float* weight) {
    const auto lo = load<Vec<float, 4>>(weight), hi = load<Vec<float, 4>>(weight + 4);
    QUIRE_UNROLL
    for (int i = 0; i < 4; ++i) x[i] *= scale * lo.v[i], x[i + 4] *= scale * hi.v[i];
}

/// Sum over the `lanes` neighbouring lanes that share a head.
QUIRE_DEVICE float lanes_sum(float x, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset >>= 1) x += __shfl_xor_sync(kFullMask, x, offset);
    return x;
}
QUIRE_DEVICE float lanes_max(float x, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, offset));
    return x;
}

/// `a` holds eight columns of the lower half of the rotated part, `b` their partners.
QUIRE_DEVICE void rotate8(float* a, float* b, const float* cos_sin) {
    QUIRE_UNROLL
    for (int i = 0; i < 8; i += 2) {
        const auto t = load<Vec<float, 4>>(cos_sin + 2 * i);
        QUIRE_UNROLL
        for (int j = 0; j < 2; ++j) {
            const float c = t.v[2 * j], s = t.v[2 * j + 1], x = a[i + j], y = b[i + j];
            a[i + j] = x * c - y * s;
            b[i + j] = y * c + x * s;
        }
    }
}

template <typename T, bool kKv8>
QUIRE_DEVICE void rope_cache(const QuireRopeCacheParams& p) {
    griddep_launch();
    griddep_wait();
    const int row = int(blockIdx.x);
    if (row >= *p.num_rows) return;
    const int lanes = QUIRE_ROPE_LANES(p.head_dim), heads = p.num_heads + 2 * p.num_kv_heads;
    const int unit = int(blockIdx.y) * QUIRE_ROPE_THREADS + int(threadIdx.x);
    const int head = unit / lanes, lane = unit % lanes, half = p.rotary_dim / 2;
    // All lanes stay for the shuffles; those without columns of a head bring zeros and store nothing.
    const bool active = head < heads && lane * 16 < p.head_dim;
    const RopeHead at = rope_head(p, head);
    const bool rotated = !at.is_v && lane * 8 < half;
    const int rest = p.rotary_dim + (lane * 8 - half) * 2;
    // q and k pair columns half a rotation apart; what is not rotated is taken in order, v in the layout of the others.
    const int col_a = lane * 8 < half ? lane * 8 : rest, col_b = lane * 8 < half ? half + lane * 8 : rest + 8;

    T* const from = static_cast<T*>(p.qkv) + (int64_t(row) * heads + head) * p.head_dim;
    float a[8] = {}, b[8] = {};
    if (active) {
        const auto raw_a = load<Vec<uint32_t, 4>>(from + col_a), raw_b = load<Vec<uint32_t, 4>>(from + col_b);
        unpack8<T>(raw_a, a);
        unpack8<T>(raw_b, b);
        if (p.bias) {
            add8(a, p.bias + int64_t(head) * p.head_dim + col_a);
            add8(b, p.bias + int64_t(head) * p.head_dim + col_b);
        }
    }
    if (p.q_norm) {
        float sum = 0.0f;
        QUIRE_UNROLL
        for (int i = 0; i < 8; ++i) sum += a[i] * a[i] + b[i] * b[i];
        sum = lanes_sum(sum, lanes);
        if (active && !at.is_v) {
            const float scale = rsqrtf(sum / float(p.head_dim) + p.eps);
            const float* const weight = at.is_q ? p.q_norm : p.k_norm;
            scale8(a, scale, weight + col_a);
            scale8(b, scale, weight + col_b);
        }
    }
    if (active && rotated) rotate8(a, b, p.rope + (int64_t(p.positions[row]) * half + lane * 8) * 2);

    if (active && (at.is_q || p.write_back)) {
        store(from + col_a, pack8<T>(a));
        store(from + col_b, pack8<T>(b));
    }
    const int slot = p.slot_mapping[row];
    if (kKv8) {
        float largest = 0.0f;
        QUIRE_UNROLL
        for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fmaxf(fabsf(a[i]), fabsf(b[i])));
        largest = lanes_max(largest, lanes);
        if (!active || at.is_q || slot < 0) return;
        const float scale = e4m3_scale(largest), inverse = inverse_of_power(scale);
        Vec<e4m3, 8> bytes_a, bytes_b;
        QUIRE_UNROLL
        for (int i = 0; i < 8; ++i) {
            bytes_a.v[i] = from_f32<e4m3>(a[i] * inverse);
            bytes_b.v[i] = from_f32<e4m3>(b[i] * inverse);
        }
        const int64_t index = kv_index(p, at, slot);
        e4m3* const to = static_cast<e4m3*>(p.kv) + index * p.head_dim;
        store(to + col_a, bytes_a);
        store(to + col_b, bytes_b);
        if (lane == 0) p.kv_scales[index] = scale;
    } else {
        if (!active || at.is_q || slot < 0) return;
        T* const to = static_cast<T*>(p.kv) + kv_index(p, at, slot) * p.head_dim;
        store(to + col_a, pack8<T>(a));
        store(to + col_b, pack8<T>(b));
    }
}

/// Whatever even head_dim up to 512: one warp a head, which it keeps in shared memory.
template <typename T, bool kKv8>
QUIRE_DEVICE void rope_cache_any(const QuireRopeCacheParams& p) {
    QUIRE_SHARED(rows, float[QUIRE_ROPE_THREADS / 32][512]);
    griddep_launch();
    griddep_wait();
    const int row = int(blockIdx.x), lane = int(threadIdx.x) % 32, heads = p.num_heads + 2 * p.num_kv_heads;
    const int head = (int(blockIdx.y) * QUIRE_ROPE_THREADS + int(threadIdx.x)) / 32;
    if (row >= *p.num_rows || head >= heads) return;
    const RopeHead at = rope_head(p, head);
    const int half = p.rotary_dim / 2, slot = p.slot_mapping[row];
    T* const from = static_cast<T*>(p.qkv) + (int64_t(row) * heads + head) * p.head_dim;
    float* const x = rows[threadIdx.x / 32];

    float sum = 0.0f;
    for (int i = lane; i < p.head_dim; i += 32) {
        x[i] = to_f32(from[i]) + (p.bias ? p.bias[int64_t(head) * p.head_dim + i] : 0.0f);
        sum += x[i] * x[i];
    }
    if (p.q_norm && !at.is_v) {
        const float scale = rsqrtf(warp_sum(sum) / float(p.head_dim) + p.eps);
        const float* const weight = at.is_q ? p.q_norm : p.k_norm;
        for (int i = lane; i < p.head_dim; i += 32) x[i] *= scale * weight[i];
    }
    __syncwarp();
    if (!at.is_v) {
        const float* const cos_sin = p.rope + int64_t(p.positions[row]) * half * 2;
        for (int i = lane; i < half; i += 32) {
            const float c = cos_sin[2 * i], s = cos_sin[2 * i + 1], a = x[i], b = x[i + half];
            x[i] = a * c - b * s;
            x[i + half] = b * c + a * s;
        }
        __syncwarp();
    }
    const bool cached = !at.is_q && slot >= 0;
    const int64_t index = cached ? kv_index(p, at, slot) : 0;
    float scale = 1.0f;
    if (kKv8) {
        float largest = 0.0f;
        for (int i = lane; i < p.head_dim; i += 32) largest = fmaxf(largest, fabsf(x[i]));
        scale = e4m3_scale(warp_max(largest));
        if (cached && lane == 0) p.kv_scales[index] = scale;
    }
    const float inverse = inverse_of_power(scale);
    for (int i = lane; i < p.head_dim; i += 32) {
        if (at.is_q || p.write_back) from[i] = from_f32<T>(x[i]);
        if (!cached) continue;
        if (kKv8) {
            static_cast<e4m3*>(p.kv)[index * p.head_dim + i] = from_f32<e4m3>(x[i] * inverse);
        } else {
            static_cast<T*>(p.kv)[index * p.head_dim + i] = from_f32<T>(x[i]);
        }
    }
}

}  // namespace quire
