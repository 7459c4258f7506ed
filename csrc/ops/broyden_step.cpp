#include "ops/broyden_step.h"

#include <vector>

#include "common/bind.h"
#include "common/isa.h"

PYDEQ_DECLARE_KERNEL(broyden_step, BroydenStepArgs)

namespace pydeq {
namespace {

void broyden_step_cpu(const Tensor& z, const Tensor& f, const Tensor& next, const Tensor& best, const Tensor& iterate,
                      const std::vector<Tensor>& steps, const Tensor& restart, const Tensor& gram, const Tensor& thetas,
                      const Tensor& scalars, const Tensor& counters, const Tensor& progress, int64_t step, double rtol,
                      double atol, double eps, bool freeze, bool stall, bool last, int64_t memory) {
  const StepArgs shared =
      step_args(z, f, next, best, scalars, counters, progress, step, rtol, atol, eps, freeze, stall, last);
  const int64_t batch = shared.batch, state = shared.state, stored = static_cast<int64_t>(steps.size());
  const ScalarType wide = compute_dtype(z.scalar_type());
  STD_TORCH_CHECK(memory >= 1, "memory must be at least 1, got ", memory);
  STD_TORCH_CHECK(thetas.dim() == 2, "thetas must be of shape (batch, steps), got ", describe(thetas));
  const int64_t capacity = thetas.size(1);
  const int64_t needed = step < memory ? step + 1 : memory + 1;
  STD_TORCH_CHECK(stored <= capacity && (last || stored >= needed), "steps must hold ", needed, " to ", capacity,
                  " tensors at step ", step, ", got ", stored);
  std::vector<void*> pointers;
  for (const Tensor& s : steps) {
    expect(s, "steps", wide, {batch, state});
    pointers.push_back(s.data_ptr());
  }
  expect(gram, "gram", ScalarType::Double, {batch, capacity, capacity});
  expect(thetas, "thetas", ScalarType::Double, {batch, capacity});
  const bool half = wide != z.scalar_type(), restarts = restart.numel() > 0;
  if (half) expect(iterate, "iterate", wide, {batch, state});
  if (restarts) expect(restart, "restart", wide, {batch, state});
  const BroydenStepArgs args{shared,
                             half ? iterate.data_ptr() : nullptr,
                             pointers.data(),
                             stored,
                             restarts ? restart.data_ptr() : nullptr,
                             static_cast<double*>(gram.data_ptr()),
                             static_cast<double*>(thetas.data_ptr()),
                             capacity,
                             memory};
  PYDEQ_CALL_KERNEL(broyden_step, args);
}

STABLE_TORCH_LIBRARY_IMPL(pydeq, CPU, m) { m.impl("broyden_step", TORCH_BOX(&broyden_step_cpu)); }

}  // namespace
}  // namespace pydeq
