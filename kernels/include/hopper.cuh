// What sm_90a adds: copies of boxes by the tensor memory accelerator, barriers in shared memory that count their bytes,
// and matrix products of a warpgroup (128 threads). Device only: nothing here has a host twin. See the PTX ISA, "Asynchronous
// Warpgroup Level Matrix Instructions" and "Data Movement and Conversion: cp.async.bulk.tensor".
#pragma once

#include "mma.cuh"

namespace quire {

// ---- Barriers in shared memory -------------------------------------------------------------------------------------

QUIRE_DEVICE void mbarrier_init(SharedAddress barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
/// Makes barriers that were initialised visible to the copy engine.
QUIRE_DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
QUIRE_DEVICE void mbarrier_arrive(SharedAddress barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/// Arrives, and announces bytes that copies will bring.
QUIRE_DEVICE void mbarrier_expect(SharedAddress barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
/// Waits until the phase of this parity is over.
QUIRE_DEVICE void mbarrier_wait(SharedAddress barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// ---- Copies of boxes -----------------------------------------------------------------------------------------------

/// Starts copying the box at element `x` of row `y`. What lies outside the tensor becomes zeros, and counts as bytes too.
QUIRE_DEVICE void copy_box(SharedAddress to, const void* map, int x, int y, SharedAddress barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            to),
        "l"(map), "r"(x), "r"(y), "r"(barrier)
        : "memory");
}

// ---- Registers -----------------------------------------------------------------------------------------------------

/// Every warp of a warpgroup calls one of these: registers go from those that copy to those that compute.
template <int Count>
QUIRE_DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
QUIRE_DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}

// ---- Products of a warpgroup ---------------------------------------------------------------------------------------

/// A matrix of 64 16-bit columns in shared memory as the copy engine leaves it with a swizzle of 128 bytes: rows of 128
/// bytes, eight of which are an atom of 1024 bytes, at which the tile begins. The same numbers describe it where the
/// product runs along the rows (keys) and where it runs across them (values): atoms follow each other every 1024 bytes.
QUIRE_DEVICE uint64_t matrix_descriptor(SharedAddress address) {
    constexpr uint64_t kLeading = 1, kStride = 1024 >> 4, kSwizzle128 = 1;
    return uint64_t((address & 0x3ffff) >> 4) | kLeading << 16 | kStride << 32 | kSwizzle128 << 62;
}

/// Before the first product that uses registers written since.
QUIRE_DEVICE void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
/// Waits for all products of the warpgroup.
QUIRE_DEVICE void product_wait() {
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}

/// c = (accumulate ? c : 0) + a * b, c [64, 64] in eight groups of columns, a [64, 16] in registers as for mma, b [16, 64]
/// in shared memory. `Across`: b's 16 are rows of shared memory and its 64 are columns; else the other way round.
template <typename Number, bool Across>
QUIRE_DEVICE void product_m64n64k16(float (*c)[4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
#define QUIRE_PRODUCT(type)                                                                                          \
    asm volatile(                                                                                                    \
        "{\n"                                                                                                        \
        ".reg .pred accumulate;\n"                                                                                   \
        "setp.ne.b32 accumulate, %37, 0;\n"                                                                          \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                                  \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
        "%23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, accumulate, 1, 1, %38;\n"           \
        "}"                                                                                                          \
        : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]),   \
          "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]),   \
          "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]),   \
          "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]),   \
          "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])                                                 \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(Across ? 1 : 0))
    if constexpr (is_bf16<Number>) QUIRE_PRODUCT("bf16");
    else QUIRE_PRODUCT("f16");
#undef QUIRE_PRODUCT
}

}  // namespace quire
