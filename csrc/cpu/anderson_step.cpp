#include "cpu/isa.h"
#include "shared/anderson_step_bind.h"

PYDEQ_DECLARE_KERNEL(anderson_step, AndersonStepArgs)

namespace pydeq {
namespace {

void anderson_step_cpu(const Tensor& z, const Tensor& f, const Tensor& next, const Tensor& best,
                       const Tensor& residuals, const Tensor& values, const Tensor& gram, const Tensor& scalars,
                       const Tensor& counters, const Tensor& progress, int64_t step, double rtol, double atol,
                       double eps, bool freeze, bool stall, bool last, int64_t memory, double damping, double ridge) {
  const AndersonStepArgs args =
      anderson_step_args(z, f, next, best, residuals, values, gram, scalars, counters, progress, step, rtol, atol, eps,
                         freeze, stall, last, memory, damping, ridge);
  PYDEQ_CALL_KERNEL(anderson_step, args);
}

STABLE_TORCH_LIBRARY_IMPL(pydeq, CPU, m) { m.impl("anderson_step", TORCH_BOX(&anderson_step_cpu)); }

}  // namespace
}  // namespace pydeq
