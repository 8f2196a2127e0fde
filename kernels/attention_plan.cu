// quire_attention_plan: grid (1, 1, 1), block (QUIRE_ATTENTION_PLAN_THREADS, 1, 1). A few microseconds once a step.
#include "attention_plan.cuh"

QUIRE_KERNEL_BOUNDS(quire_attention_plan, QuireAttentionPlanParams, QUIRE_ATTENTION_PLAN_THREADS, 1) {
    quire::griddep_wait();
    quire::griddep_launch();
    quire::plan_list(p, false);
    quire::plan_list(p, true);
}
