// The instructions of mma.cuh, one at a time: see check_params.h. Tests run them on the host, where they check the
// emulation, and on a GPU, where they check that both mean the same.
#include "check_params.h"
#include "mma.cuh"

namespace quire {

/// Rows of 16 bytes, as ldmatrix takes them.
struct CheckTiles {
    alignas(16) uint16_t a[16][16], b[16][16];
};

template <typename Number, bool Transposed>
QUIRE_DEVICE void check_mma(const QuireCheckParams& p) {
    QUIRE_SHARED(tiles, CheckTiles);
    const int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) tiles.a[i / 16][i % 16] = static_cast<const uint16_t*>(p.a)[i];
    for (int i = lane; i < 128; i += 32) {
        const uint16_t value = static_cast<const uint16_t*>(p.b)[i];
        if (Transposed) tiles.b[i / 8][i % 8] = value;
        else tiles.b[i / 16][i % 16] = value;
    }
    __syncwarp();
    uint32_t a[4], b[4];
    ldmatrix_x4(a, shared_address(&tiles.a[lane % 16][8 * (lane / 16)]));
    if (Transposed) {
        ldmatrix_x4_trans(b, shared_address(&tiles.b[lane % 16][0]));
    } else {
        uint32_t both[2], first[1];
        ldmatrix_x2(both, shared_address(&tiles.b[lane % 8][8 * (lane / 8 % 2)]));
        ldmatrix_x1(first, shared_address(&tiles.b[lane % 8][0]));
        // A wrong x1 shows as a wrong product.
        b[0] = first[0], b[1] = both[1];
        if (first[0] != both[0]) b[0] = ~0u;
    }
    float c[4];
    auto* out = static_cast<float*>(p.c);
    const int r = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; ++i) c[i] = out[(r + 8 * (i / 2)) * 8 + 2 * q + i % 2];
    mma_m16n8k16<Number>(c, a, b[0], b[1]);
    for (int i = 0; i < 4; ++i) out[(r + 8 * (i / 2)) * 8 + 2 * q + i % 2] = c[i];
}

QUIRE_DEVICE void check_mma_int8(const QuireCheckParams& p) {
    const int r = threadIdx.x / 4, q = threadIdx.x % 4;
    const auto* a = static_cast<const uint32_t*>(p.a);
    const auto* b = static_cast<const uint32_t*>(p.b) + 8 * r + q;
    const uint32_t fragment[4] = {a[8 * r + q], a[8 * (r + 8) + q], a[8 * r + q + 4], a[8 * (r + 8) + q + 4]};
    int32_t c[4];
    auto* out = static_cast<int32_t*>(p.c);
    for (int i = 0; i < 4; ++i) c[i] = out[(r + 8 * (i / 2)) * 8 + 2 * q + i % 2];
    mma_m16n8k32_int8(c, fragment, b[0], b[4]);
    for (int i = 0; i < 4; ++i) out[(r + 8 * (i / 2)) * 8 + 2 * q + i % 2] = c[i];
}

/// 512 bytes by 16, then 128 bytes by 4: whole pieces below `bytes`, zeros beyond; two groups, waited for in turn.
QUIRE_DEVICE void check_copy(const QuireCheckParams& p) {
    QUIRE_SHARED(memory, uint4[40]);
    auto* bytes = reinterpret_cast<unsigned char*>(memory);
    const auto* from = static_cast<const unsigned char*>(p.a);
    const int lane = threadIdx.x, wide = 16 * lane, narrow = 512 + 4 * lane;
    cp_async_16(shared_address(bytes + wide), from + wide, wide + 16 <= p.bytes);
    cp_async_commit();
    cp_async_4(shared_address(bytes + narrow), from + narrow, narrow + 4 <= p.bytes);
    cp_async_commit();
    cp_async_wait<1>();
    auto* out = static_cast<unsigned char*>(p.c);
    for (int i = 0; i < 16; ++i) out[wide + i] = bytes[wide + i];
    cp_async_wait<0>();
    for (int i = 0; i < 4; ++i) out[narrow + i] = bytes[narrow + i];
}

}  // namespace quire

QUIRE_KERNEL_BOUNDS(quire_check_mma_bf16, QuireCheckParams, 32, 1) { quire::check_mma<quire::bf16, false>(p); }
QUIRE_KERNEL_BOUNDS(quire_check_mma_f16, QuireCheckParams, 32, 1) { quire::check_mma<quire::f16, false>(p); }
QUIRE_KERNEL_BOUNDS(quire_check_mma_trans_bf16, QuireCheckParams, 32, 1) { quire::check_mma<quire::bf16, true>(p); }
QUIRE_KERNEL_BOUNDS(quire_check_mma_trans_f16, QuireCheckParams, 32, 1) { quire::check_mma<quire::f16, true>(p); }
QUIRE_KERNEL_BOUNDS(quire_check_mma_int8, QuireCheckParams, 32, 1) { quire::check_mma_int8(p); }
QUIRE_KERNEL_BOUNDS(quire_check_copy, QuireCheckParams, 32, 1) { quire::check_copy(p); }
