// The checked arguments of one step of Broyden's method, from tensors on any device.
#pragma once

#include <vector>

#include "shared/bind_step.h"
#include "shared/broyden_step.h"

namespace pydeq {

inline BroydenStepArgs broyden_step_args(const SharedArguments& shared, const Tensor& iterate,
                                         const std::vector<Tensor>& steps, const Tensor& restart, const Tensor& gram,
                                         const Tensor& thetas, int64_t memory) {
  const Tensor& z = shared.z;
  const int64_t batch = shared.step.batch, state = shared.step.state, step = shared.step.step;
  const int64_t stored = static_cast<int64_t>(steps.size());
  const ScalarType wide = compute_dtype(z.scalar_type());
  STD_TORCH_CHECK(memory >= 1, "memory must be at least 1, got ", memory);
  STD_TORCH_CHECK(thetas.dim() == 2, "thetas must be of shape (batch, steps), got ", describe(thetas));
  const int64_t capacity = thetas.size(1);
  const int64_t needed = step < memory ? step + 1 : memory + 1;
  STD_TORCH_CHECK(stored <= capacity && (shared.step.rules.last || stored >= needed), "steps must hold ", needed,
                  " to ", capacity, " tensors at step ", step, ", got ", stored);
  STD_TORCH_CHECK(z.is_cpu() || stored <= constants::CUDA_VECTORS, "on a GPU memory must be at most ",
                  constants::CUDA_VECTORS - 1, ", got ", memory, " with ", stored, " steps stored");
  for (const Tensor& s : steps) {
    expect(s, "steps", wide, {batch, state}, &z);
    shared.addresses.push_back(s.data_ptr());
  }
  expect(gram, "gram", ScalarType::Double, {batch, capacity, capacity}, &z);
  expect(thetas, "thetas", ScalarType::Double, {batch, capacity}, &z);
  const bool half = wide != z.scalar_type(), restarts = restart.numel() > 0;
  if (half) expect(iterate, "iterate", wide, {batch, state}, &z);
  if (restarts) expect(restart, "restart", wide, {batch, state}, &z);
  return {shared.step,
          half ? iterate.data_ptr() : nullptr,
          shared.addresses.data(),
          stored,
          restarts ? restart.data_ptr() : nullptr,
          static_cast<double*>(gram.data_ptr()),
          static_cast<double*>(thetas.data_ptr()),
          capacity,
          memory};
}

}  // namespace pydeq
