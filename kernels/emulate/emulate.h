// Included in place of CUDA's own headers when a .cu file is compiled for the host.
//
// Reading order: engine.h (fibers, barriers), warp.h (shuffles, votes, reductions), intrinsics.h (bits, rounding,
// atomics). build.sh makes the library.
#pragma once

#include <cmath>
#include <cstring>

#include "engine.h"
#include "intrinsics.h"
#include "types.h"
#include "warp.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
// Declared as reserved in CUDA; host headers use the name as an attribute, so it is left alone there.
#ifndef __restrict__
#define __restrict__ __restrict
#endif
// `__shared__` itself is not defined: use QUIRE_SHARED and QUIRE_DYNAMIC_SHARED, which poison.

#define threadIdx (::quire_emu::place->thread_idx)
#define blockIdx (::quire_emu::place->block_idx)
#define blockDim (::quire_emu::place->block_dim)
#define gridDim (::quire_emu::place->grid_dim)
constexpr int warpSize = 32;
