// Barriers, shuffles, votes and warp reductions over the engine's one primitive, `collective`.
#pragma once

#include <cstring>
#include <type_traits>

#include "engine.h"

inline void __syncthreads() { quire_emu::barrier(0, 0); }
inline int __syncthreads_count(int predicate) { return quire_emu::barrier_count(predicate != 0); }
inline int __syncthreads_or(int predicate) { return quire_emu::barrier_count(predicate != 0) > 0; }
inline int __syncthreads_and(int predicate) { return quire_emu::barrier_count(predicate == 0) == 0; }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

namespace quire_emu {

inline void no_combine(void* const*, uint32_t) {}

template <typename T>
struct Shuffle {
    T value;
    /// Lane to read from; the lane itself where CUDA returns the lane's own value.
    int source;
    T result;
};

template <typename T>
void combine_shuffle(void* const* lanes, uint32_t mask) {
    for (int lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        auto* mine = static_cast<Shuffle<T>*>(lanes[lane]);
        if (!(mask >> mine->source & 1)) {
            fail("lane %d shuffles from lane %d, which is not in mask %08x", lane, mine->source, mask);
        }
        mine->result = static_cast<Shuffle<T>*>(lanes[mine->source])->value;
    }
}

template <typename T>
T shuffle(uint32_t mask, T value, int source) {
    static_assert(std::is_trivially_copyable<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "4 or 8 bytes");
    Shuffle<T> payload{value, source, value};
    collective(mask, &combine_shuffle<T>, &payload);
    return payload.result;
}

struct Vote {
    bool predicate;
    uint32_t ballot;
};

inline void combine_vote(void* const* lanes, uint32_t mask) {
    uint32_t ballot = 0;
    for (int lane = 0; lane < 32; ++lane) {
        if (mask >> lane & 1) ballot |= uint32_t(static_cast<Vote*>(lanes[lane])->predicate) << lane;
    }
    for (int lane = 0; lane < 32; ++lane) {
        if (mask >> lane & 1) static_cast<Vote*>(lanes[lane])->ballot = ballot;
    }
}

inline uint32_t vote(uint32_t mask, bool predicate) {
    Vote payload{predicate, 0};
    collective(mask, &combine_vote, &payload);
    return payload.ballot;
}

template <typename T>
struct Matched {
    T value;
    uint32_t same;
};

template <typename T>
void combine_match(void* const* lanes, uint32_t mask) {
    for (int a = 0; a < 32; ++a) {
        if (!(mask >> a & 1)) continue;
        auto* mine = static_cast<Matched<T>*>(lanes[a]);
        mine->same = 0;
        for (int b = 0; b < 32; ++b) {
            if ((mask >> b & 1) && static_cast<Matched<T>*>(lanes[b])->value == mine->value) mine->same |= 1u << b;
        }
    }
}

struct Add { template <typename T> static T of(T a, T b) { return a + b; } };
struct Min { template <typename T> static T of(T a, T b) { return a < b ? a : b; } };
struct Max { template <typename T> static T of(T a, T b) { return a > b ? a : b; } };
struct And { template <typename T> static T of(T a, T b) { return a & b; } };
struct Or { template <typename T> static T of(T a, T b) { return a | b; } };
struct Xor { template <typename T> static T of(T a, T b) { return a ^ b; } };

template <typename T, typename Op>
void combine_reduce(void* const* lanes, uint32_t mask) {
    bool any = false;
    T total{};
    for (int lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        const T value = *static_cast<T*>(lanes[lane]);
        total = any ? Op::template of<T>(total, value) : value;
        any = true;
    }
    for (int lane = 0; lane < 32; ++lane) {
        if (mask >> lane & 1) *static_cast<T*>(lanes[lane]) = total;
    }
}

template <typename Op, typename T>
T reduce(uint32_t mask, T value) {
    collective(mask, &combine_reduce<T, Op>, &value);
    return value;
}

}  // namespace quire_emu

inline void __syncwarp(unsigned mask = 0xffffffffu) {
    quire_emu::collective(mask, &quire_emu::no_combine, nullptr);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const int lane = int(quire_emu::place->lane);
    return quire_emu::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const int lane = int(quire_emu::place->lane), from = lane - int(delta);
    return quire_emu::shuffle(mask, value, from < (lane & ~(width - 1)) ? lane : from);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const int lane = int(quire_emu::place->lane), from = lane + int(delta);
    return quire_emu::shuffle(mask, value, from > (lane | (width - 1)) ? lane : from);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
    const int lane = int(quire_emu::place->lane), from = lane ^ lane_mask;
    return quire_emu::shuffle(mask, value, from > (lane | (width - 1)) ? lane : from);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) { return quire_emu::vote(mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return quire_emu::vote(mask, predicate != 0) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return quire_emu::vote(mask, predicate != 0) == mask; }
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
    quire_emu::Matched<T> payload{value, 0};
    quire_emu::collective(mask, &quire_emu::combine_match<T>, &payload);
    return payload.same;
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned v) { return quire_emu::reduce<quire_emu::Add>(mask, v); }
inline int __reduce_add_sync(unsigned mask, int v) { return int(quire_emu::reduce<quire_emu::Add>(mask, unsigned(v))); }
inline unsigned __reduce_min_sync(unsigned mask, unsigned v) { return quire_emu::reduce<quire_emu::Min>(mask, v); }
inline int __reduce_min_sync(unsigned mask, int v) { return quire_emu::reduce<quire_emu::Min>(mask, v); }
inline unsigned __reduce_max_sync(unsigned mask, unsigned v) { return quire_emu::reduce<quire_emu::Max>(mask, v); }
inline int __reduce_max_sync(unsigned mask, int v) { return quire_emu::reduce<quire_emu::Max>(mask, v); }
inline unsigned __reduce_and_sync(unsigned mask, unsigned v) { return quire_emu::reduce<quire_emu::And>(mask, v); }
inline unsigned __reduce_or_sync(unsigned mask, unsigned v) { return quire_emu::reduce<quire_emu::Or>(mask, v); }
inline unsigned __reduce_xor_sync(unsigned mask, unsigned v) { return quire_emu::reduce<quire_emu::Xor>(mask, v); }
