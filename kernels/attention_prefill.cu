// Paged prefill attention: quire_attention_prefill_<type>[_fp8]_<head_dim>, named as the decode kernels.
#include "attention_prefill.cuh"

#define QUIRE_PREFILL(name, Number, fp8, dim)                                                           \
    QUIRE_KERNEL_BOUNDS(quire_attention_prefill_##name, QuireAttentionParams, QUIRE_PREFILL_THREADS, 1) { \
        quire::attention_prefill<quire::Number, fp8, dim>(p);                                           \
    }

QUIRE_PREFILL(bf16_64, bf16, false, 64)
QUIRE_PREFILL(bf16_128, bf16, false, 128)
QUIRE_PREFILL(bf16_256, bf16, false, 256)
QUIRE_PREFILL(bf16_fp8_64, bf16, true, 64)
QUIRE_PREFILL(bf16_fp8_128, bf16, true, 128)
QUIRE_PREFILL(bf16_fp8_256, bf16, true, 256)
QUIRE_PREFILL(f16_64, f16, false, 64)
QUIRE_PREFILL(f16_128, f16, false, 128)
QUIRE_PREFILL(f16_256, f16, false, 256)
QUIRE_PREFILL(f16_fp8_64, f16, true, 64)
QUIRE_PREFILL(f16_fp8_128, f16, true, 128)
QUIRE_PREFILL(f16_fp8_256, f16, true, 256)
