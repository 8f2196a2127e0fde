// Bits, rounding, approximate maths and atomics under CUDA's names.
//
// Approximate functions (`__expf`, `rsqrtf`, ...) are exact to f32 here, so results on a GPU may differ in the last bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace quire_emu {
template <typename To, typename From>
To bits_of(From value) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To out;
    std::memcpy(&out, &value, sizeof out);
    return out;
}
}  // namespace quire_emu

inline unsigned __float_as_uint(float v) { return quire_emu::bits_of<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return quire_emu::bits_of<float>(v); }
inline int __float_as_int(float v) { return quire_emu::bits_of<int>(v); }
inline float __int_as_float(int v) { return quire_emu::bits_of<float>(v); }
inline long long __double_as_longlong(double v) { return quire_emu::bits_of<long long>(v); }
inline double __longlong_as_double(long long v) { return quire_emu::bits_of<double>(v); }

inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline int __mulhi(int a, int b) { return int((int64_t(a) * b) >> 32); }
__extension__ typedef unsigned __int128 quire_u128;
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((quire_u128(a) * b) >> 64);
}
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll((unsigned long long)v) : 64; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline unsigned __brev(unsigned v) {
    unsigned out = 0;
    for (int i = 0; i < 32; ++i) out |= (v >> i & 1) << (31 - i);
    return out;
}
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned n) {
    return unsigned((((uint64_t(hi) << 32) | lo) << (n & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned n) {
    return unsigned(((uint64_t(hi) << 32) | lo) >> (n & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = (uint64_t(b) << 32) | a;
    unsigned out = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned nibble = selector >> (4 * i) & 0xf;
        unsigned byte = unsigned(bytes >> (8 * (nibble & 7))) & 0xff;
        if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
        out |= byte << (8 * i);
    }
    return out;
}

// Rounding to nearest even, one operation each: never contracted into a fused multiply-add.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __frsqrt_rn(float a) { return float(1.0 / std::sqrt(double(a))); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }

inline float rsqrtf(float a) { return float(1.0 / std::sqrt(double(a))); }
inline float __expf(float a) { return std::exp(a); }
inline float __exp2f(float a) { return std::exp2(a); }
inline float __logf(float a) { return std::log(a); }
inline float __log2f(float a) { return std::log2(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float a) { return a > 0.0f ? std::min(a, 1.0f) : 0.0f; }
inline float __tanhf(float a) { return std::tanh(a); }
inline int __float2int_rn(float a) { return int(std::nearbyint(a)); }
inline int __float2int_rz(float a) { return int(a); }
inline float __int2float_rn(int a) { return float(a); }
inline float __uint2float_rn(unsigned a) { return float(a); }

template <typename T> T __ldg(const T* p) { return *p; }
template <typename T> T __ldcs(const T* p) { return *p; }
template <typename T> T __ldcg(const T* p) { return *p; }
template <typename T> void __stcs(T* p, T v) { *p = v; }
template <typename T> void __stcg(T* p, T v) { *p = v; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline unsigned long long min(unsigned long long a, unsigned long long b) { return a < b ? a : b; }
inline unsigned long long max(unsigned long long a, unsigned long long b) { return a > b ? a : b; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

// Not deduced, so that literals convert.
template <typename T> using QuireSame = typename std::common_type<T>::type;

// Fibers never change inside one of these, so plain operations are atomic.
template <typename T> T atomicAdd(T* p, QuireSame<T> v) { T old = *p; *p = old + v; return old; }
template <typename T> T atomicSub(T* p, QuireSame<T> v) { T old = *p; *p = old - v; return old; }
template <typename T> T atomicMin(T* p, QuireSame<T> v) { T old = *p; *p = v < old ? v : old; return old; }
template <typename T> T atomicMax(T* p, QuireSame<T> v) { T old = *p; *p = v > old ? v : old; return old; }
template <typename T> T atomicAnd(T* p, QuireSame<T> v) { T old = *p; *p = old & v; return old; }
template <typename T> T atomicOr(T* p, QuireSame<T> v) { T old = *p; *p = old | v; return old; }
template <typename T> T atomicXor(T* p, QuireSame<T> v) { T old = *p; *p = old ^ v; return old; }
template <typename T> T atomicExch(T* p, QuireSame<T> v) { T old = *p; *p = v; return old; }
template <typename T> T atomicCAS(T* p, QuireSame<T> expected, QuireSame<T> v) { T old = *p; if (old == expected) *p = v; return old; }
inline unsigned atomicInc(unsigned* p, unsigned limit) { unsigned old = *p; *p = old >= limit ? 0 : old + 1; return old; }
