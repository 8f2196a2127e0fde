// Bias, QK-norm, rotary embedding and KV write: see include/rope.cuh.
#include "rope.cuh"

#define QUIRE_ROPE_CACHE(act, suffix, kv8)                                                     \
    QUIRE_KERNEL_BOUNDS(quire_rope_cache_##act##suffix, QuireRopeCacheParams, 256, kv8 ? 4 : 5) { \
        quire::rope_cache<quire::act, kv8>(p);                                                 \
    }                                                                                          \
    QUIRE_KERNEL_BOUNDS(quire_rope_cache_##act##_any##suffix, QuireRopeCacheParams, 256, 5) {       \
        quire::rope_cache_any<quire::act, kv8>(p);                                             \
    }

QUIRE_ROPE_CACHE(bf16, , false)
QUIRE_ROPE_CACHE(bf16, _kv8, true)
QUIRE_ROPE_CACHE(f16, , false)
QUIRE_ROPE_CACHE(f16, _kv8, true)
