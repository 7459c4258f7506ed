#include "cuda/picard_step.cuh"
#include "run_step.h"

namespace pydeq {

void run_picard_step(const Case& test) {
  const PicardStepArgs args{test.step_args(), test.number("damping")};
  PYDEQ_EMULATE(test.dtype(), T, run_step<PicardStep<T>>(test, args));
}

}  // namespace pydeq
