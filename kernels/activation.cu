// Activations: see include/activation.cuh.
#include "activation.cuh"

QUIRE_KERNEL_BOUNDS(quire_act_bf16, QuireActParams, 256, 6) { quire::act<quire::bf16, false>(p); }
QUIRE_KERNEL_BOUNDS(quire_act_f16, QuireActParams, 256, 6) { quire::act<quire::f16, false>(p); }
QUIRE_KERNEL_BOUNDS(quire_act_bf16_any, QuireActParams, 256, 6) { quire::act<quire::bf16, true>(p); }
QUIRE_KERNEL_BOUNDS(quire_act_f16_any, QuireActParams, 256, 6) { quire::act<quire::f16, true>(p); }
QUIRE_KERNEL_BOUNDS(quire_soft_cap, QuireSoftCapParams, 256, 6) { quire::soft_cap(p); }
