// Residual addition and RMSNorm: see include/norm.cuh.
#include "norm.cuh"

QUIRE_KERNEL_BOUNDS(quire_add_norm_bf16, QuireAddNormParams, 1024, 2) { quire::add_norm<quire::bf16, 1>(p); }
QUIRE_KERNEL_BOUNDS(quire_add_norm_f16, QuireAddNormParams, 1024, 2) { quire::add_norm<quire::f16, 1>(p); }
QUIRE_KERNEL_BOUNDS(quire_add_norm_bf16_wide, QuireAddNormParams, 1024, 1) { quire::add_norm<quire::bf16, 4>(p); }
QUIRE_KERNEL_BOUNDS(quire_add_norm_f16_wide, QuireAddNormParams, 1024, 1) { quire::add_norm<quire::f16, 4>(p); }
QUIRE_KERNEL_BOUNDS(quire_add_norm_bf16_any, QuireAddNormParams, 256, 8) { quire::add_norm_any<quire::bf16>(p); }
QUIRE_KERNEL_BOUNDS(quire_add_norm_f16_any, QuireAddNormParams, 256, 8) { quire::add_norm_any<quire::f16>(p); }
