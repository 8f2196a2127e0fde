// quire_quantize_<type>, quire_embed_int{8,4} and quire_int{8,4}_gemm_{m8,m32,wide}_<type of out>: see int_gemm.cuh.
#include "int_gemm.cuh"

QUIRE_KERNEL_BOUNDS(quire_quantize_bf16, QuireQuantizeParams, QUIRE_INT_THREADS, 4) {
    quire::quantize_activations<quire::bf16>(p);
}
QUIRE_KERNEL_BOUNDS(quire_quantize_f16, QuireQuantizeParams, QUIRE_INT_THREADS, 4) {
    quire::quantize_activations<quire::f16>(p);
}

QUIRE_KERNEL_BOUNDS(quire_embed_int8, QuireIntEmbedParams, QUIRE_INT_THREADS, 4) { quire::int_embed<8>(p); }
QUIRE_KERNEL_BOUNDS(quire_embed_int4, QuireIntEmbedParams, QUIRE_INT_THREADS, 4) { quire::int_embed<4>(p); }

#define QUIRE_INT_STREAM(name, bits, panels, row_groups, Output, blocks)                     \
    QUIRE_KERNEL_BOUNDS(quire_##name, QuireIntGemmParams, QUIRE_INT_THREADS, blocks) {       \
        using Stream = quire::IntStream<bits, panels, row_groups, Output>;                   \
        QUIRE_DYNAMIC_SHARED(memory);                                                        \
        Stream::run(p, *reinterpret_cast<typename Stream::Parts*>(memory));                  \
    }
#define QUIRE_INT_WIDE(name, bits, Output)                                                   \
    QUIRE_KERNEL_BOUNDS(quire_##name, QuireIntGemmParams, QUIRE_INT_THREADS, 1) {            \
        quire::int_wide<bits, Output>(p);                                                    \
    }
#define QUIRE_INT_GEMM(bits, suffix, Output)                                    \
    QUIRE_INT_STREAM(int##bits##_gemm_m8_##suffix, bits, 1, 1, Output, 3)       \
    QUIRE_INT_STREAM(int##bits##_gemm_m32_##suffix, bits, 2, 4, Output, 1)      \
    QUIRE_INT_WIDE(int##bits##_gemm_wide_##suffix, bits, Output)

QUIRE_INT_GEMM(8, bf16, quire::bf16)
QUIRE_INT_GEMM(8, f16, quire::f16)
QUIRE_INT_GEMM(8, f32, float)
QUIRE_INT_GEMM(4, bf16, quire::bf16)
QUIRE_INT_GEMM(4, f16, quire::f16)
QUIRE_INT_GEMM(4, f32, float)
