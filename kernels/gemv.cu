// quire_gemv_<type of x>[_f32]: see gemv.cuh.
#include "gemv.cuh"

#define QUIRE_GEMV(name, Number, Output)                                              \
    QUIRE_KERNEL_BOUNDS(quire_gemv_##name, QuireGemvParams, QUIRE_GEMV_THREADS, 2) {  \
        quire::gemv<quire::Number, Output>(p);                                        \
    }

QUIRE_GEMV(bf16, bf16, quire::bf16)
QUIRE_GEMV(f16, f16, quire::f16)
QUIRE_GEMV(bf16_f32, bf16, float)
QUIRE_GEMV(f16_f32, f16, float)
