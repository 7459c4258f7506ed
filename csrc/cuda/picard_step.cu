#include "cuda/launch_step.h"
#include "cuda/picard_step.cuh"
#include "cuda/step_kernels.h"

namespace pydeq {

PYDEQ_KERNELS_APART(PicardStep)

namespace {

void picard_step_cuda(const Tensor& z, const Tensor& f, const Tensor& next, const Tensor& best, const Tensor& scalars,
                      const Tensor& counters, const Tensor& progress, int64_t step, double rtol, double atol,
                      double eps, bool freeze, bool stall, bool last, double damping, int64_t look_back) {
  const Launch launch("picard_step", z, "z");
  const PicardStepArgs args{
      step_args(z, f, next, best, scalars, counters, progress, step, rtol, atol, eps, freeze, stall, last, look_back),
      damping};
  PYDEQ_DISPATCH(args.step.dtype, T, launch_step<PicardStep<T>>(launch, z, args));
}

STABLE_TORCH_LIBRARY_IMPL(pydeq, CUDA, m) { m.impl("picard_step", TORCH_BOX(&picard_step_cuda)); }

}  // namespace
}  // namespace pydeq
