// The checked arguments of one step of damped fixed-point iteration, from tensors on any device.
#pragma once

#include "shared/bind_step.h"
#include "shared/picard_step.h"

namespace pydeq {

inline PicardStepArgs picard_step_args(const SharedArguments& shared, double damping, int64_t look_back) {
  PicardStepArgs args{shared.step, damping};
  args.step.rules.look_back = look_back;
  return args;
}

}  // namespace pydeq
