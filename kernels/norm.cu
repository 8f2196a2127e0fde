// Residual addition and RMSNorm: see include/norm.cuh.
#include "norm.cuh"

#define QUIRE_NORMS(name, post, blocks, suffix, T)                                     \
    QUIRE_KERNEL_BOUNDS(quire_##name##_##suffix, QuireAddNormParams, 1024, blocks) {   \
        quire::add_norm<T, 1, post>(p);                                                \
    }                                                                                  \
    QUIRE_KERNEL_BOUNDS(quire_##name##_##suffix##_wide, QuireAddNormParams, 1024, 1) { \
        quire::add_norm<T, 4, post>(p);                                                \
    }                                                                                  \
    QUIRE_KERNEL_BOUNDS(quire_##name##_##suffix##_any, QuireAddNormParams, 256, 8) {   \
        quire::add_norm_any<T, post>(p);                                               \
    }

QUIRE_NORMS(add_norm, false, 2, bf16, quire::bf16)
QUIRE_NORMS(add_norm, false, 2, f16, quire::f16)
QUIRE_NORMS(post_norm, true, 1, bf16, quire::bf16)
QUIRE_NORMS(post_norm, true, 1, f16, quire::f16)
