// Kernels that try the emulation itself: what it must compute, and what it must refuse. See crates/cuda/tests/emulator.rs.
#include "quire.cuh"

using namespace quire;

struct EmulatorParams {
    uint32_t* out;
    const uint32_t* in;
};

QUIRE_KERNEL_BOUNDS(quire_test_places, EmulatorParams, 1024, 1) {
    const uint32_t block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const uint32_t thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    atomicAdd(&p.out[block * (blockDim.x * blockDim.y * blockDim.z) + thread], block * 10000 + thread);
}

// One warp: a word a lane and case.
QUIRE_KERNEL_BOUNDS(quire_test_warp, EmulatorParams, 32, 1) {
    const uint32_t lane = threadIdx.x, value = lane * lane + 7;
    uint32_t* out = p.out + lane;
    *out = __shfl_sync(kFullMask, value, 5), out += 32;
    *out = __shfl_sync(kFullMask, value, int(lane) + 1, 8), out += 32;
    *out = __shfl_up_sync(kFullMask, value, 3), out += 32;
    *out = __shfl_down_sync(kFullMask, value, 3, 16), out += 32;
    *out = __shfl_xor_sync(kFullMask, value, 4), out += 32;
    *out = __ballot_sync(kFullMask, lane % 3 == 0), out += 32;
    *out = __reduce_add_sync(kFullMask, value), out += 32;
    *out = __reduce_max_sync(kFullMask, value), out += 32;
    *out = __match_any_sync(kFullMask, lane % 5), out += 32;
    *out = uint32_t(__all_sync(kFullMask, lane < 32) + 2 * __any_sync(kFullMask, lane == 40)), out += 32;
    // Halves of a warp meet apart.
    *out = __shfl_xor_sync(lane < 16 ? 0xffffu : 0xffff0000u, value, 1);
}

// Barriers, counts, named barriers, static and dynamic shared memory over 96 threads.
QUIRE_KERNEL_BOUNDS(quire_test_block, EmulatorParams, 96, 1) {
    QUIRE_SHARED(values, uint32_t[96]);
    QUIRE_DYNAMIC_SHARED(memory);
    uint32_t* const dynamic = reinterpret_cast<uint32_t*>(memory);
    const uint32_t t = threadIdx.x;
    const bool poisoned = values[t] == ~0u && dynamic[t] == ~0u;
    // Each first reads its own word, then writes it, so that all see poison.
    values[t] = t * 3;
    dynamic[t] = t * 5;
    __syncthreads();
    uint32_t sum = values[95 - t] + dynamic[(t + 1) % 96];
    sum += uint32_t(__syncthreads_count(t % 4 == 0)) * 1000;
    if (t >= 32) {
        values[t] = sum;
        named_barrier(1, 64);
        sum = values[32 + (t + 7) % 64];
    }
    p.out[t] = poisoned ? sum : 0;
}

// Threads that return early leave the barrier to the others.
QUIRE_KERNEL_BOUNDS(quire_test_early_return, EmulatorParams, 64, 1) {
    if (threadIdx.x >= 40) return;
    __syncthreads();
    p.out[threadIdx.x] = 1;
}

QUIRE_KERNEL_BOUNDS(quire_test_missing_barrier, EmulatorParams, 64, 1) {
    QUIRE_SHARED(values, uint32_t[64]);
    values[threadIdx.x] = threadIdx.x;
    p.out[threadIdx.x] = values[63 - threadIdx.x];
}

QUIRE_KERNEL_BOUNDS(quire_test_divergent_barrier, EmulatorParams, 64, 1) {
    if (threadIdx.x < 40) {
        __syncthreads();
    } else {
        __syncwarp();
    }
}

QUIRE_KERNEL_BOUNDS(quire_test_divergent_shuffle, EmulatorParams, 32, 1) {
    if (threadIdx.x == 3) return;
    p.out[threadIdx.x] = __shfl_xor_sync(kFullMask, threadIdx.x, 1);
}

QUIRE_KERNEL_BOUNDS(quire_test_foreign_mask, EmulatorParams, 32, 1) { __syncwarp(0x0000ffffu); }

#if !defined(__CUDACC__)
// cp.async as the emulation has it: nothing arrives before the wait.
QUIRE_KERNEL_BOUNDS(quire_test_async, EmulatorParams, 1, 1) {
    QUIRE_SHARED(values, uint4[3]);
    for (int i = 0; i < 3; ++i) {
        ::quire_emu::async_copy(&values[i], p.in + 4 * i, 16, i == 2 ? 8 : 16);
        ::quire_emu::async_commit();
    }
    p.out[0] = values[0].x;
    ::quire_emu::async_wait(2);
    p.out[1] = values[0].x;
    p.out[2] = values[1].x;
    ::quire_emu::async_wait(0);
    p.out[3] = values[1].x;
    p.out[4] = values[2].y;
    p.out[5] = values[2].z;
}
#endif
