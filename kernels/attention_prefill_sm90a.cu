// Paged prefill attention on Hopper: quire_attention_prefill_sm90a_<type>_128. Compiled for sm_90a alone, and not for the
// host: see docs/cuda.md.
#ifdef __CUDACC__
#include "attention_prefill_sm90a.cuh"

#define QUIRE_PREFILL_SM90A(name, Number)                                                                          \
    QUIRE_KERNEL_BOUNDS(quire_attention_prefill_sm90a_##name, QuireAttentionSm90aParams, QUIRE_SM90A_THREADS, 1) { \
        quire::attention_prefill_sm90a<quire::Number>(p);                                                          \
    }

QUIRE_PREFILL_SM90A(bf16_128, bf16)
QUIRE_PREFILL_SM90A(f16_128, f16)
#endif
