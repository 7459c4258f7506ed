#include "cuda/broyden_step.cuh"
#include "run_step.h"

namespace pydeq {

void run_broyden_step(const Case& test) {
  Listing<BroydenStepArgs> args{};
  static_cast<BroydenStepArgs&>(args) = {test.step_args(),
                                         test.pointer("iterate"),
                                         nullptr,
                                         test.integer("stored"),
                                         test.pointer("restart"),
                                         static_cast<double*>(test.pointer("gram")),
                                         static_cast<double*>(test.pointer("thetas")),
                                         test.integer("capacity"),
                                         test.integer("memory")};
  for (int64_t j = 0; j < args.stored; ++j) args.rows[j] = test.pointer("steps" + std::to_string(j));
  PYDEQ_EMULATE(test.dtype(), T, run_step<BroydenStep<T>>(test, args));
}

}  // namespace pydeq
