#include "cuda/gmres_step.cuh"
#include "run_step.h"

namespace pydeq {

void run_gmres_step(const Case& test) {
  Listing<GmresStepArgs> args{};
  static_cast<GmresStepArgs&>(args) = {test.step_args(),
                                       test.pointer("iterate"),
                                       test.pointer("start"),
                                       nullptr,
                                       test.integer("stored"),
                                       static_cast<double*>(test.pointer("gram")),
                                       static_cast<double*>(test.pointer("images")),
                                       static_cast<double*>(test.pointer("directions")),
                                       static_cast<double*>(test.pointer("coordinates")),
                                       static_cast<double*>(test.pointer("lengths")),
                                       test.integer("capacity"),
                                       test.integer("restart"),
                                       test.integer("penultimate") != 0};
  for (int64_t j = 0; j < args.stored; ++j) args.rows[j] = test.pointer("basis" + std::to_string(j));
  PYDEQ_EMULATE(test.dtype(), T, run_step<GmresStep<T>>(test, args));
}

}  // namespace pydeq
