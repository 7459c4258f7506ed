#include "cuda/anderson_step.cuh"
#include "cuda/launch_step.h"
#include "cuda/step_kernels.h"
#include "shared/anderson_step_bind.h"

namespace pydeq {

PYDEQ_KERNELS_APART(AndersonStep)

namespace {

void anderson_step_cuda(const Tensor& z, const Tensor& f, const Tensor& next, const Tensor& best,
                        const Tensor& residuals, const Tensor& values, const Tensor& gram, const Tensor& scalars,
                        const Tensor& counters, const Tensor& progress, int64_t step, double rtol, double atol,
                        double eps, bool freeze, bool stall, bool last, int64_t memory, double damping, double ridge) {
  const Launch launch("anderson_step", z, "z");
  const AndersonStepArgs args =
      anderson_step_args(z, f, next, best, residuals, values, gram, scalars, counters, progress, step, rtol, atol, eps,
                         freeze, stall, last, memory, damping, ridge);
  PYDEQ_DISPATCH(args.step.dtype, T, launch_step<AndersonStep<T>>(launch, z, args));
}

STABLE_TORCH_LIBRARY_IMPL(pydeq, CUDA, m) { m.impl("anderson_step", TORCH_BOX(&anderson_step_cuda)); }

}  // namespace
}  // namespace pydeq
