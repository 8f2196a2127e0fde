// quire_quantize_fp8_<type> and quire_embed_fp8: see fp8.cuh.
#include "fp8.cuh"

QUIRE_KERNEL_BOUNDS(quire_quantize_fp8_bf16, QuireFp8QuantizeParams, QUIRE_FP8_THREADS, 6) {
    quire::quantize_fp8<quire::bf16>(p);
}
QUIRE_KERNEL_BOUNDS(quire_quantize_fp8_f16, QuireFp8QuantizeParams, QUIRE_FP8_THREADS, 6) {
    quire::quantize_fp8<quire::f16>(p);
}
QUIRE_KERNEL_BOUNDS(quire_embed_fp8, QuireFp8EmbedParams, QUIRE_FP8_THREADS, 8) { quire::embed_fp8(p); }
