// Warp-wide matrix instructions and asynchronous copies: PTX on the device, the same function of the same registers on
// the host. Fragment layouts are those of the PTX ISA ("Matrix fragments for mma.m16n8k16" and ".m16n8k32").
//
// With lane = 4 * r + q (r in 0..8, q in 0..4), for mma of A [16, K] and B [K, 8] into C [16, 8]:
//   C: c[0], c[1] at row r, columns 2q, 2q+1; c[2], c[3] at row r + 8
//   A (16 bit, K = 16): a[0] row r, k = 2q, 2q+1; a[1] row r + 8; a[2], a[3] the same at k + 8
//   B (16 bit, K = 16): b0 k = 2q, 2q+1 of column r; b1 at k + 8
//   A, B (8 bit, K = 32): the same with four k's a register: k = 4q .. 4q+3, and + 16
// So two C fragments side by side, rounded to 16 bits, are one A fragment: no shuffle between the two products of
// attention.
#pragma once

#include "quire.cuh"

namespace quire {

template <typename T>
constexpr bool is_bf16 = false;
template <>
constexpr bool is_bf16<bf16> = true;

/// Two pairs of 16-bit numbers out of four e4m3 bytes: bytes 0 and 2, bytes 1 and 3. By moving the bits into place and
/// multiplying by the difference of the exponents' biases, which is exact, also for subnormals.
template <typename Number>
QUIRE_DEVICE void widen_e4m3(uint32_t bytes, uint32_t& even, uint32_t& odd) {
    const uint32_t even_sign = (bytes << 8) & 0x80008000u, odd_sign = bytes & 0x80008000u;
#if defined(__CUDACC__)
    if constexpr (is_bf16<Number>) {
        even = even_sign | ((bytes << 4) & 0x07f007f0u);
        odd = odd_sign | ((bytes >> 4) & 0x07f007f0u);
        asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(even) : "r"(0x7b807b80u), "r"(0x80008000u));  // 2^120
        asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(odd) : "r"(0x7b807b80u), "r"(0x80008000u));
    } else {
        even = even_sign | ((bytes << 7) & 0x3f803f80u);
        odd = odd_sign | ((bytes >> 1) & 0x3f803f80u);
        asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(even) : "r"(0x5c005c00u));  // 2^8
        asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(odd) : "r"(0x5c005c00u));
    }
#else
    (void)even_sign, (void)odd_sign;
    const auto value = [&](int i) { return to_f32(e4m3{uint8_t(bytes >> (8 * i))}); };
    even = pack2<Number>(value(0), value(2));
    odd = pack2<Number>(value(1), value(3));
#endif
}

/// An address in shared memory, for the instructions that take 32-bit ones.
#ifdef __CUDACC__
using SharedAddress = uint32_t;
QUIRE_DEVICE SharedAddress shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#else
using SharedAddress = char*;
inline SharedAddress shared_address(const void* p) { return static_cast<char*>(const_cast<void*>(p)); }
#endif

#ifndef __CUDACC__
namespace emulated {

inline uint16_t half_word(uint32_t word, int i) { return uint16_t(word >> (16 * i)); }
inline int8_t byte(uint32_t word, int i) { return int8_t(word >> (8 * i)); }

struct Matrices {
    SharedAddress row;
    uint32_t* out;
    int count;
    bool transposed;
};

/// Lane 8 * m + i brought the address of row i of matrix m.
inline void load_matrices(void* const* lanes, uint32_t) {
    for (int lane = 0; lane < 32; ++lane) {
        auto* mine = static_cast<Matrices*>(lanes[lane]);
        for (int m = 0; m < mine->count; ++m) {
            uint32_t word = 0;
            for (int i = 0; i < 2; ++i) {
                int row = lane / 4, column = 2 * (lane % 4) + i;
                if (mine->transposed) std::swap(row, column);
                const SharedAddress from = static_cast<Matrices*>(lanes[8 * m + row])->row;
                if (reinterpret_cast<uintptr_t>(from) % 16) quire_emu::fail("ldmatrix of an unaligned row");
                uint16_t value;
                std::memcpy(&value, from + 2 * column, 2);
                word |= uint32_t(value) << (16 * i);
            }
            mine->out[m] = word;
        }
    }
}

struct Product {
    const uint32_t* a;
    uint32_t b0, b1;
    void* c;
};

template <typename T>
float element(uint32_t word, int i) {
    const uint16_t bits = half_word(word, i);
    T value;
    std::memcpy(static_cast<void*>(&value), &bits, 2);
    return to_f32(value);
}

/// Added up in f32 from the first k to the last, C first.
template <typename T>
void multiply_16(void* const* lanes, uint32_t) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto* mine = static_cast<const Product*>(lanes[lane]);
        const int r = lane / 4, q = lane % 4;
        for (int i = 0; i < 2; ++i) {
            const int k = 2 * q + i;
            a[r][k] = element<T>(mine->a[0], i);
            a[r + 8][k] = element<T>(mine->a[1], i);
            a[r][k + 8] = element<T>(mine->a[2], i);
            a[r + 8][k + 8] = element<T>(mine->a[3], i);
            b[k][r] = element<T>(mine->b0, i);
            b[k + 8][r] = element<T>(mine->b1, i);
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        auto* c = static_cast<float*>(static_cast<Product*>(lanes[lane])->c);
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
            float sum = c[i];
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
            c[i] = sum;
        }
    }
}

inline void multiply_int8(void* const* lanes, uint32_t) {
    int32_t a[16][32], b[32][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto* mine = static_cast<const Product*>(lanes[lane]);
        const int r = lane / 4, q = lane % 4;
        for (int i = 0; i < 4; ++i) {
            const int k = 4 * q + i;
            a[r][k] = byte(mine->a[0], i);
            a[r + 8][k] = byte(mine->a[1], i);
            a[r][k + 16] = byte(mine->a[2], i);
            a[r + 8][k + 16] = byte(mine->a[3], i);
            b[k][r] = byte(mine->b0, i);
            b[k + 16][r] = byte(mine->b1, i);
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        auto* c = static_cast<int32_t*>(static_cast<Product*>(lanes[lane])->c);
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
            for (int k = 0; k < 32; ++k) c[i] += a[row][k] * b[k][column];
        }
    }
}

}  // namespace emulated
#endif

/// Four 8x8 matrices of 16-bit elements; lane 8 * m + i gives the address of row i of matrix m (16 bytes, aligned).
/// Register m of lane 4 * r + q receives elements 2q, 2q+1 of row r of matrix m.
QUIRE_DEVICE void ldmatrix_x4(uint32_t (&out)[4], SharedAddress row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row)
                 : "memory");
#else
    emulated::Matrices payload{row, out, 4, false};
    quire_emu::collective(0xffffffffu, &emulated::load_matrices, &payload);
#endif
}

/// [`ldmatrix_x4`] of the transposed matrices: lane 4 * r + q receives elements 2q, 2q+1 of *column* r.
QUIRE_DEVICE void ldmatrix_x4_trans(uint32_t (&out)[4], SharedAddress row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row)
                 : "memory");
#else
    emulated::Matrices payload{row, out, 4, true};
    quire_emu::collective(0xffffffffu, &emulated::load_matrices, &payload);
#endif
}

/// Two matrices: lanes 0..16 give the addresses.
QUIRE_DEVICE void ldmatrix_x2(uint32_t (&out)[2], SharedAddress row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(row)
                 : "memory");
#else
    emulated::Matrices payload{row, out, 2, false};
    quire_emu::collective(0xffffffffu, &emulated::load_matrices, &payload);
#endif
}

/// One matrix: lanes 0..8 give the addresses.
QUIRE_DEVICE void ldmatrix_x1(uint32_t (&out)[1], SharedAddress row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(out[0]) : "r"(row) : "memory");
#else
    emulated::Matrices payload{row, out, 1, false};
    quire_emu::collective(0xffffffffu, &emulated::load_matrices, &payload);
#endif
}

/// c += a * b with 16-bit elements T, sums in f32.
template <typename T>
QUIRE_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
    if constexpr (is_bf16<T>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
#else
    emulated::Product payload{a, b0, b1, c};
    quire_emu::collective(0xffffffffu, &emulated::multiply_16<T>, &payload);
#endif
}

/// c += a * b with signed bytes, sums in 32-bit integers: exact.
QUIRE_DEVICE void mma_m16n8k32_int8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    emulated::Product payload{a, b0, b1, c};
    quire_emu::collective(0xffffffffu, &emulated::multiply_int8, &payload);
#endif
}

/// Starts copying 16 aligned bytes from global to shared memory past L1, or writes zeros where `valid` is false (then
/// `from` is not read).
QUIRE_DEVICE void cp_async_16(SharedAddress to, const void* from, bool valid) {
#ifdef __CUDACC__
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
#else
    quire_emu::async_copy(to, from, 16, valid ? 16 : 0);
#endif
}

/// [`cp_async_16`] for 4 bytes.
QUIRE_DEVICE void cp_async_4(SharedAddress to, const void* from, bool valid) {
#ifdef __CUDACC__
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
#else
    quire_emu::async_copy(to, from, 4, valid ? 4 : 0);
#endif
}

/// Closes the thread's current group of copies, which may be empty.
QUIRE_DEVICE void cp_async_commit() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    quire_emu::async_commit();
#endif
}

/// Waits until at most `PENDING` of the thread's groups are not done. A barrier then shows their data to other threads.
template <int PENDING>
QUIRE_DEVICE void cp_async_wait() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#else
    quire_emu::async_wait(PENDING);
#endif
}

}  // namespace quire
