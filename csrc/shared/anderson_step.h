// One step of Anderson mixing; pydeq/ops/anderson_step.py defines it.
#pragma once

#include "shared/step_args.h"

namespace pydeq {

struct AndersonStepArgs {
  StepArgs step;
  void* residuals;  // [B, S, D]
  void* values;     // [B, S, D]
  double* gram;     // [B, S, S]
  int64_t slots;    // S
  int64_t memory;   // columns mixed, at most S
  double damping, ridge;
};

}  // namespace pydeq
