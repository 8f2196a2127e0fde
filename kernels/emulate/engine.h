// The host stand-in for a GPU: runs one kernel launch block by block, with a fiber for every thread of the block.
//
// Fibers run in a random order drawn from a seed and change only where CUDA threads may wait for each other: barriers
// and warp collectives. A missing barrier therefore shows as a wrong result under some seeds, and a barrier that part of
// a block never reaches ends the launch with an error that names the kernel. Shared memory is poisoned (all bits set:
// NaN, -1) before every block.
//
// What it cannot show: races inside a stretch without waits, memory ordering between blocks (they run one after
// another), and timing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.h"

/// One kernel of the library, as `quire_kernels` lists it.
struct QuireKernel {
    const char* name;
    /// sizeof of the one argument struct.
    unsigned long long params_size;
    /// Runs one thread of it; for `quire_emulate` alone.
    void (*entry)(const void* params);
};

extern "C" {
/// All kernels linked in; `*count` receives how many.
const QuireKernel* quire_kernels(int* count);
/// Runs one launch to its end. 0, or not 0 and the reason in `quire_emulate_error`. May be called from several threads
/// at once: each has fibers of its own.
int quire_emulate(const char* name, uint3 grid, uint3 block, unsigned dynamic_smem, const void* params,
                  unsigned long long seed);
/// Why the last launch of this thread failed.
const char* quire_emulate_error();
}

namespace quire_emu {

/// Adds a kernel to the list, from a static constructor. `max_threads`: threads in a block at most.
struct Registration {
    Registration(const char* name, uint32_t params_size, uint32_t max_threads, void (*entry)(const void*));
};

/// What a running kernel can see of its place in the launch.
struct Place {
    uint3 thread_idx;
    uint3 block_idx;
    dim3 block_dim;
    dim3 grid_dim;
    /// Index of the thread in its warp.
    uint32_t lane;
};

extern __thread Place* place __attribute__((tls_model("initial-exec")));

/// Ends the launch with an error; does not return.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

/// Waits for `count` threads (0: all of the block) at barrier `id`.
void barrier(uint32_t id, uint32_t count);

/// `__syncthreads_count` and its kin: how many of the block's threads brought a true predicate.
int barrier_count(bool predicate);

/// Meets the other lanes of `mask`. The last to arrive runs `combine` over what each lane brought (indexed by lane);
/// then all go on. Every lane must bring the same `combine` and the same mask, and be in it.
void collective(uint32_t mask, void (*combine)(void* const* lanes, uint32_t mask), void* payload);

/// Memory that the block shares, found by `key` (an address unique to the declaration); poisoned at first use in a block.
void* shared(const void* key, size_t bytes, size_t align);

/// The launch's dynamic shared memory.
void* dynamic_shared();
/// Its size in bytes.
uint32_t dynamic_shared_size();

/// `cp.async`: nothing is copied before the thread waits for the group, so that reading too early shows. The first
/// `src_bytes` come from `src`, the rest up to `bytes` is zero.
void async_copy(void* dst, const void* src, uint32_t bytes, uint32_t src_bytes);
/// Closes the current group of copies.
void async_commit();
/// Completes all but the last `pending` groups.
void async_wait(uint32_t pending);

}  // namespace quire_emu
