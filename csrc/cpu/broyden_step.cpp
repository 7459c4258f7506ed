#include "cpu/isa.h"
#include "shared/broyden_step_bind.h"

PYDEQ_DECLARE_KERNEL(broyden_step, BroydenStepArgs)

namespace pydeq {
namespace {

void broyden_step_cpu(const Tensor& z, const Tensor& f, const Tensor& next, const Tensor& best, const Tensor& iterate,
                      const std::vector<Tensor>& steps, const Tensor& restart, const Tensor& gram, const Tensor& thetas,
                      const Tensor& scalars, const Tensor& counters, const Tensor& progress, int64_t step, double rtol,
                      double atol, double eps, bool freeze, bool stall, bool last, int64_t memory) {
  std::vector<void*> pointers;
  const BroydenStepArgs args =
      broyden_step_args(z, f, next, best, iterate, steps, restart, gram, thetas, scalars, counters, progress, step,
                        rtol, atol, eps, freeze, stall, last, memory, pointers);
  PYDEQ_CALL_KERNEL(broyden_step, args);
}

STABLE_TORCH_LIBRARY_IMPL(pydeq, CPU, m) { m.impl("broyden_step", TORCH_BOX(&broyden_step_cpu)); }

}  // namespace
}  // namespace pydeq
