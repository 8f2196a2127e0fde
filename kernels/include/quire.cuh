// The one header that every kernel includes: the launch macro, number types, vector accesses and reductions.
//
// The same sources compile for the GPU (nvcc) and for the host (any C++17 compiler, ../emulate). Rules that keep it so:
// shared memory by QUIRE_SHARED and QUIRE_DYNAMIC_SHARED; PTX only behind functions that have a host twin; numbers of
// 16 and 8 bits by the types below; fixed-width integers in argument structs.
//
// Same bytes on every run and in every batch: reductions here add in a fixed order that depends on the block size only.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define QUIRE_DEVICE __device__ __forceinline__
#define QUIRE_UNROLL _Pragma("unroll")
#else
#include "../emulate/emulate.h"
#define QUIRE_DEVICE inline
#define QUIRE_UNROLL
#endif

// ---- Kernels and shared memory -------------------------------------------------------------------------------------

/// Defines `extern "C" __global__ void name(const __grid_constant__ Params p)`: exactly one argument, by value.
/// `threads` is the largest block it is launched with, `blocks` the blocks per multiprocessor that registers must allow.
#if defined(__CUDACC__)
#define QUIRE_KERNEL_BOUNDS(name, Params, threads, blocks) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Params p)
#define QUIRE_SHARED(name, ...) __shared__ typename ::quire::Identity<__VA_ARGS__>::type name
#define QUIRE_DYNAMIC_SHARED(name)                                                \
    extern __shared__ __align__(128) unsigned char quire_dynamic_shared_memory[]; \
    unsigned char* const name = quire_dynamic_shared_memory
#else
#define QUIRE_KERNEL_BOUNDS(name, Params, threads, blocks)                                            \
    static void name##_body(const Params& p);                                                         \
    static void name##_entry(const void* p) { name##_body(*static_cast<const Params*>(p)); }          \
    static const ::quire_emu::Registration name##_registration(#name, sizeof(Params), threads, &name##_entry); \
    static void name##_body([[maybe_unused]] const Params& p)
/// `QUIRE_SHARED(partials, float[32]);` declares memory that the block shares; not initialised.
#define QUIRE_SHARED(name, ...)                                                                         \
    static char name##_key;                                                                   \
    auto& name = *static_cast<typename ::quire::Identity<__VA_ARGS__>::type*>(                          \
        ::quire_emu::shared(&name##_key, sizeof(typename ::quire::Identity<__VA_ARGS__>::type),         \
                            alignof(typename ::quire::Identity<__VA_ARGS__>::type)))
/// `QUIRE_DYNAMIC_SHARED(smem);` names the launch's dynamic shared memory, `unsigned char*` aligned to 128 bytes.
#define QUIRE_DYNAMIC_SHARED(name) \
    unsigned char* const name = static_cast<unsigned char*>(::quire_emu::dynamic_shared())
#endif
#define QUIRE_KERNEL(name, Params) QUIRE_KERNEL_BOUNDS(name, Params, 1024, 1)

namespace quire {

template <typename T>
struct Identity {
    using type = T;
};

constexpr uint32_t kFullMask = 0xffffffffu;

/// Programmatic dependent launch. Every kernel calls `griddep_wait` before it touches what an earlier kernel wrote (or
/// still reads), and `griddep_launch` as soon as the next kernel may begin to be placed. No-ops below sm_90.
QUIRE_DEVICE void griddep_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
QUIRE_DEVICE void griddep_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Barrier `id` (1 to 15) among `threads` threads, a multiple of 32: for warps with different roles.
QUIRE_DEVICE void named_barrier(uint32_t id, uint32_t threads) {
#if defined(__CUDA_ARCH__)
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#elif !defined(__CUDACC__)
    ::quire_emu::barrier(id, threads);
#endif
}

// ---- Numbers -------------------------------------------------------------------------------------------------------

/// bfloat16: the upper half of an f32.
struct alignas(2) bf16 {
    uint16_t bits;
};
/// IEEE half precision.
struct alignas(2) f16 {
    uint16_t bits;
};
/// 8-bit float, 4 exponent and 3 mantissa bits, no infinities; largest 448.
struct e4m3 {
    uint8_t bits;
};

namespace soft {

// Conversions by bits, for the host and for architectures without the instruction.

QUIRE_DEVICE uint16_t bf16_bits(float x) {
    const uint32_t u = __float_as_uint(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return uint16_t((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}

QUIRE_DEVICE uint16_t f16_bits(float x) {
    const uint32_t u = __float_as_uint(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fff;
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and more round to infinity
    if (magnitude < 0x38800000u) {
        // Subnormal: adding 0.5 leaves the wanted bits, rounded to nearest even, at the mantissa's end.
        const float shifted = __uint_as_float(magnitude) + 0.5f;
        return uint16_t(sign | (__float_as_uint(shifted) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1);
    return uint16_t(sign | rounded >> 13);
}

QUIRE_DEVICE float f16_value(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    const float value = __uint_as_float(magnitude << 13) * 5.192296858534828e33f;  // 2^112
    return __uint_as_float(sign | __float_as_uint(value));
}

QUIRE_DEVICE uint8_t e4m3_bits(float x) {
    const uint32_t u = __float_as_uint(x), sign = u >> 24 & 0x80u, magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7f;
    if (magnitude >= 0x43e00000u) return uint8_t(sign | 0x7eu);  // 448 and more: the largest
    if (magnitude < 0x3c800000u) {
        // Below 2^-6: multiples of 2^-9, rounded to nearest even by adding 2^14, whose last bit is 2^-9.
        const float shifted = __uint_as_float(magnitude) + 16384.0f;
        return uint8_t(sign | (__float_as_uint(shifted) & 0xfu));
    }
    const uint32_t rounded = magnitude - 0x3c000000u + 0x7ffffu + (magnitude >> 20 & 1);
    const uint32_t bits = rounded >> 20;
    return uint8_t(sign | (bits > 0x7eu ? 0x7eu : bits));
}

QUIRE_DEVICE float e4m3_value(uint8_t bits) {
    const uint32_t sign = uint32_t(bits & 0x80u) << 24, magnitude = bits & 0x7fu;
    if (magnitude == 0x7fu) return __uint_as_float(0x7fffffffu);
    const float value = __uint_as_float(magnitude << 20) * 1.329227995784916e36f;  // 2^120
    return __uint_as_float(sign | __float_as_uint(value));
}

}  // namespace soft

QUIRE_DEVICE float to_f32(float x) { return x; }
QUIRE_DEVICE float to_f32(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
QUIRE_DEVICE float to_f32(f16 x) {
#if defined(__CUDA_ARCH__)
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
    return out;
#else
    return soft::f16_value(x.bits);
#endif
}
QUIRE_DEVICE float to_f32(e4m3 x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(uint16_t(x.bits)));
    return to_f32(f16{uint16_t(halves)});
#else
    return soft::e4m3_value(x.bits);
#endif
}

/// Rounds to nearest even; e4m3 saturates at its largest value.
template <typename T>
QUIRE_DEVICE T from_f32(float x);
template <>
QUIRE_DEVICE float from_f32<float>(float x) {
    return x;
}
template <>
QUIRE_DEVICE bf16 from_f32<bf16>(float x) {
#if defined(__CUDA_ARCH__)
    bf16 out;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
    return out;
#else
    return bf16{soft::bf16_bits(x)};
#endif
}
template <>
QUIRE_DEVICE f16 from_f32<f16>(float x) {
#if defined(__CUDA_ARCH__)
    f16 out;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
    return out;
#else
    return f16{soft::f16_bits(x)};
#endif
}
template <>
QUIRE_DEVICE e4m3 from_f32<e4m3>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint16_t both;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(0.0f), "f"(x));
    return e4m3{uint8_t(both)};
#else
    return e4m3{soft::e4m3_bits(x)};
#endif
}

/// Two 16-bit numbers in a register, `lo` in the lower half: what `mma` fragments are made of.
template <typename T>
QUIRE_DEVICE uint32_t pack2(float lo, float hi) {
    static_assert(sizeof(T) == 2, "16-bit numbers");
    return uint32_t(from_f32<T>(lo).bits) | uint32_t(from_f32<T>(hi).bits) << 16;
}
#if defined(__CUDA_ARCH__)
template <>
__device__ __forceinline__ uint32_t pack2<bf16>(float lo, float hi) {
    uint32_t out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(hi), "f"(lo));
    return out;
}
template <>
__device__ __forceinline__ uint32_t pack2<f16>(float lo, float hi) {
    uint32_t out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(hi), "f"(lo));
    return out;
}
#endif
template <typename T>
QUIRE_DEVICE float2 unpack2(uint32_t both) {
    static_assert(sizeof(T) == 2, "16-bit numbers");
    return make_float2(to_f32(T{uint16_t(both)}), to_f32(T{uint16_t(both >> 16)}));
}

// ---- Memory --------------------------------------------------------------------------------------------------------

/// N numbers moved by one access (16 bytes at most).
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
    T v[N];
    static constexpr int size = N;
};
/// As many as 16 bytes hold.
template <typename T>
using Vec16 = Vec<T, int(16 / sizeof(T))>;

template <typename V, typename T>
QUIRE_DEVICE V load(const T* p) {
    return *reinterpret_cast<const V*>(p);
}
template <typename V, typename T>
QUIRE_DEVICE void store(T* p, const V& v) {
    *reinterpret_cast<V*>(p) = v;
}

/// 16 bytes that are read once: they leave the caches first.
template <typename V, typename T>
QUIRE_DEVICE V load_once(const T* p) {
    static_assert(sizeof(V) == 16, "16 bytes");
    const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(p));
    return reinterpret_cast<const V&>(raw);
}

// ---- Reductions ----------------------------------------------------------------------------------------------------

QUIRE_DEVICE float warp_sum(float x) {
    QUIRE_UNROLL
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(kFullMask, x, offset);
    return x;
}
QUIRE_DEVICE float warp_max(float x) {
    QUIRE_UNROLL
    for (int offset = 16; offset > 0; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, offset));
    return x;
}

/// The lane, as a value that the compiler does not know to be the same each time: what is derived from it is computed
/// anew where it is needed, and takes no registers in between.
QUIRE_DEVICE int fresh_lane() {
    int lane = int(threadIdx.x % 32);
#if defined(__CUDACC__)
    asm volatile("" : "+r"(lane));
#endif
    return lane;
}

/// Sum over the block, the same in every thread. `blockDim.x` a multiple of 32, at most 1024. Ends with all threads past
/// a barrier; two calls in a row need none between them because the second has its own first.
QUIRE_DEVICE float block_sum(float x) {
    QUIRE_SHARED(partials, float[32]);
    const uint32_t warps = blockDim.x / 32;
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) partials[threadIdx.x / 32] = x;
    __syncthreads();
    // Every warp adds the partial sums in the same way, which saves a second broadcast.
    x = threadIdx.x % 32 < warps ? partials[threadIdx.x % 32] : 0.0f;
    return warp_sum(x);
}

}  // namespace quire
