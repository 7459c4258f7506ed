// The checked arguments of one step of Broyden's method, from tensors on any device.
#pragma once

#include <vector>

#include "shared/bind.h"
#include "shared/broyden_step.h"

namespace pydeq {

// `pointers` takes the list that the arguments point to, and must live as long as they do.
inline BroydenStepArgs broyden_step_args(const Tensor& z, const Tensor& f, const Tensor& next, const Tensor& best,
                                         const Tensor& iterate, const std::vector<Tensor>& steps, const Tensor& restart,
                                         const Tensor& gram, const Tensor& thetas, const Tensor& scalars,
                                         const Tensor& counters, const Tensor& progress, int64_t step, double rtol,
                                         double atol, double eps, bool freeze, bool stall, bool last, int64_t memory,
                                         std::vector<void*>& pointers) {
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
  pointers.clear();
  for (const Tensor& s : steps) {
    expect(s, "steps", wide, {batch, state}, &z);
    pointers.push_back(s.data_ptr());
  }
  expect(gram, "gram", ScalarType::Double, {batch, capacity, capacity}, &z);
  expect(thetas, "thetas", ScalarType::Double, {batch, capacity}, &z);
  const bool half = wide != z.scalar_type(), restarts = restart.numel() > 0;
  if (half) expect(iterate, "iterate", wide, {batch, state}, &z);
  if (restarts) expect(restart, "restart", wide, {batch, state}, &z);
  return {shared,
          half ? iterate.data_ptr() : nullptr,
          pointers.data(),
          stored,
          restarts ? restart.data_ptr() : nullptr,
          static_cast<double*>(gram.data_ptr()),
          static_cast<double*>(thetas.data_ptr()),
          capacity,
          memory};
}

}  // namespace pydeq
