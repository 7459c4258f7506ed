#include "shared/picard_step.h"

#include "cpu/isa.h"
#include "shared/bind.h"

PYDEQ_DECLARE_KERNEL(picard_step, PicardStepArgs)

namespace pydeq {
namespace {

void picard_step_cpu(const Tensor& z, const Tensor& f, const Tensor& next, const Tensor& best, const Tensor& scalars,
                     const Tensor& counters, const Tensor& progress, int64_t step, double rtol, double atol, double eps,
                     bool freeze, bool stall, bool last, double damping, int64_t look_back) {
  const PicardStepArgs args{
      step_args(z, f, next, best, scalars, counters, progress, step, rtol, atol, eps, freeze, stall, last, look_back),
      damping};
  PYDEQ_CALL_KERNEL(picard_step, args);
}

STABLE_TORCH_LIBRARY_IMPL(pydeq, CPU, m) { m.impl("picard_step", TORCH_BOX(&picard_step_cpu)); }

}  // namespace
}  // namespace pydeq
