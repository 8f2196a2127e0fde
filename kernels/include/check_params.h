// Arguments of the kernels that hold the instructions of mma.cuh against their definition, on the host and on a GPU.
#ifndef QUIRE_CHECK_PARAMS_H
#define QUIRE_CHECK_PARAMS_H

#include <stdint.h>

/// quire_check_mma_{bf16,f16}: c [16, 8] f32 += a [16, 16] * b [8, 16]^T, operands read by ldmatrix.
/// quire_check_mma_trans_{bf16,f16}: the same with b [16, 8], read by ldmatrix.trans.
/// quire_check_mma_int8: c [16, 8] i32 += a [16, 32] * b [8, 32]^T.
/// quire_check_copy: c (bytes) = the first `bytes` of a, then zeros, by cp.async; b is not read. One warp each.
typedef struct QuireCheckParams {
    const void* a;
    const void* b;
    void* c;
    int32_t bytes;
    int32_t reserved;
} QuireCheckParams;

#endif
