// Paged decode attention: quire_attention_decode_<type>[_fp8]_<head_dim>, where the cache has the type of the queries or
// is fp8. A head_dim in between takes the next larger kernel.
#include "attention_decode.cuh"

// Three blocks on a multiprocessor (168 registers), two where queries of 256 take more.
#define QUIRE_DECODE(name, Number, fp8, dim)                                                           \
    QUIRE_KERNEL_BOUNDS(quire_attention_decode_##name, QuireAttentionParams, QUIRE_DECODE_THREADS,     \
                        dim > 128 ? 2 : 3) {                                                           \
        quire::attention_decode<quire::Number, fp8, dim>(p);                                           \
    }

QUIRE_DECODE(bf16_64, bf16, false, 64)
QUIRE_DECODE(bf16_128, bf16, false, 128)
QUIRE_DECODE(bf16_256, bf16, false, 256)
QUIRE_DECODE(bf16_fp8_64, bf16, true, 64)
QUIRE_DECODE(bf16_fp8_128, bf16, true, 128)
QUIRE_DECODE(bf16_fp8_256, bf16, true, 256)
QUIRE_DECODE(f16_64, f16, false, 64)
QUIRE_DECODE(f16_128, f16, false, 128)
QUIRE_DECODE(f16_256, f16, false, 256)
QUIRE_DECODE(f16_fp8_64, f16, true, 64)
QUIRE_DECODE(f16_fp8_128, f16, true, 128)
QUIRE_DECODE(f16_fp8_256, f16, true, 256)
