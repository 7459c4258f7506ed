// One step of damped fixed-point iteration; pydeq/ops/picard_step.py defines it.
#pragma once

#include "shared/step_args.h"

namespace pydeq {

struct PicardStepArgs {
  StepArgs step;
  double damping;
};

}  // namespace pydeq
