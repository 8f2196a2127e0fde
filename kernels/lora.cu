// quire_lora_{shrink,expand}_{bf16,f16}[_8]: see include/lora.cuh.
#include "lora.cuh"

#define QUIRE_LORA(name, Number, rows)                                                      \
    QUIRE_KERNEL_BOUNDS(quire_lora_shrink_##name, QuireLoraShrinkParams, QUIRE_LORA_THREADS, 4) { \
        quire::lora_shrink<quire::Number, rows>(p);                                         \
    }                                                                                       \
    QUIRE_KERNEL_BOUNDS(quire_lora_expand_##name, QuireLoraExpandParams, QUIRE_LORA_THREADS, 3) { \
        quire::lora_expand<quire::Number, rows>(p);                                         \
    }

QUIRE_LORA(bf16, bf16, 1)
QUIRE_LORA(f16, f16, 1)
QUIRE_LORA(bf16_8, bf16, QUIRE_LORA_ROWS)
QUIRE_LORA(f16_8, f16, QUIRE_LORA_ROWS)
