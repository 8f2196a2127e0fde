// The step's plan: see include/plan.cuh.
#include "plan.cuh"

QUIRE_KERNEL_BOUNDS(quire_step_plan, QuireStepPlanParams, 256, 8) { quire::step_plan(p); }
QUIRE_KERNEL_BOUNDS(quire_update_tables, QuireUpdateTablesParams, 256, 8) { quire::update_tables(p); }
