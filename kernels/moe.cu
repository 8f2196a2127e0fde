// Mixtures of experts: see include/moe.cuh and include/moe_int.cuh, and include/moe_route.cuh for routing and the sum.
#include "moe.cuh"
#include "moe_int.cuh"
#include "moe_route.cuh"

QUIRE_KERNEL_BOUNDS(quire_moe_route, QuireMoeRouteParams, QUIRE_MOE_ROUTE_THREADS, 2) { quire::moe_route(p); }
QUIRE_KERNEL_BOUNDS(quire_moe_sort, QuireMoeSortParams, QUIRE_MOE_SORT_THREADS, 1) { quire::moe_sort(p); }

#define QUIRE_MOE_GEMM(suffix, T, W)                                                                   \
    QUIRE_KERNEL_BOUNDS(quire_moe_gate_up_##suffix, QuireMoeGemmParams, QUIRE_MOE_THREADS, 3) {        \
        quire::moe_gemm<T, W, true>(p);                                                               \
    }                                                                                                 \
    QUIRE_KERNEL_BOUNDS(quire_moe_down_##suffix, QuireMoeGemmParams, QUIRE_MOE_THREADS, 3) {           \
        quire::moe_gemm<T, W, false>(p);                                                              \
    }

QUIRE_MOE_GEMM(bf16, quire::bf16, quire::bf16)
QUIRE_MOE_GEMM(f16, quire::f16, quire::f16)
QUIRE_MOE_GEMM(fp8_bf16, quire::bf16, quire::e4m3)
QUIRE_MOE_GEMM(fp8_f16, quire::f16, quire::e4m3)

#define QUIRE_MOE_INT(bits, suffix, T)                                                                      \
    QUIRE_KERNEL_BOUNDS(quire_moe_gate_up_int##bits##_##suffix, QuireMoeIntParams, QUIRE_MOE_THREADS, 3) { \
        quire::moe_int<bits, T, true>(p);                                                                  \
    }                                                                                                      \
    QUIRE_KERNEL_BOUNDS(quire_moe_down_int##bits##_##suffix, QuireMoeIntParams, QUIRE_MOE_THREADS, 3) {    \
        quire::moe_int<bits, T, false>(p);                                                                 \
    }

QUIRE_MOE_INT(8, bf16, quire::bf16)
QUIRE_MOE_INT(8, f16, quire::f16)
QUIRE_MOE_INT(4, bf16, quire::bf16)
QUIRE_MOE_INT(4, f16, quire::f16)

QUIRE_KERNEL_BOUNDS(quire_moe_combine_bf16, QuireMoeCombineParams, QUIRE_MOE_COMBINE_THREADS, 4) {
    quire::moe_combine<quire::bf16>(p);
}
QUIRE_KERNEL_BOUNDS(quire_moe_combine_f16, QuireMoeCombineParams, QUIRE_MOE_COMBINE_THREADS, 4) {
    quire::moe_combine<quire::f16>(p);
}
