#include "cuda/anderson_step.cuh"
#include "run_step.h"

namespace pydeq {

void run_anderson_step(const Case& test) {
  const AndersonStepArgs args{test.step_args(),       test.pointer("residuals"),
                              test.pointer("values"), static_cast<double*>(test.pointer("gram")),
                              test.integer("slots"),  test.integer("memory"),
                              test.number("damping"), test.number("ridge")};
  PYDEQ_EMULATE(test.dtype(), T, run_step<AndersonStep<T>>(test, args));
}

}  // namespace pydeq
