// One step of good Broyden, stored as steps only; pydeq/ops/broyden_step.py defines it.
#pragma once

#include "shared/step_args.h"
#include "shared/termination.h"

namespace pydeq {

// Steps, the iterate and the restart vector are of the compute type: float for half states.
struct BroydenStepArgs {
  StepArgs step;
  void* iterate;       // [B, D] of which z is the rounding; null unless states are halves
  void* const* steps;  // `stored` pointers to [B, D]
  int64_t stored;
  void* restart;     // [B, D] u_0 or, before a restart, the previous residual; null where no restart can come
  double* gram;      // [B, K, K]
  double* thetas;    // [B, K]
  int64_t capacity;  // K
  int64_t memory;    // pairs kept
};

namespace {

// Keeps the denominator 1 - theta + theta d of a Broyden update at DENOMINATOR_LIMIT or more (More and Trangenstein
// 1976).
PYDEQ_HOST_DEVICE inline double denominator_damping(double d) {
  if (__builtin_fabs(d) >= constants::DENOMINATOR_LIMIT) return 1.0;
  return (1.0 - (d < 0.0 ? -constants::DENOMINATOR_LIMIT : constants::DENOMINATOR_LIMIT)) / (1.0 - d);
}

}  // namespace
}  // namespace pydeq
