// The checked arguments of one step of Anderson mixing, from tensors on any device.
#pragma once

#include "shared/anderson_step.h"
#include "shared/bind.h"

namespace pydeq {

inline AndersonStepArgs anderson_step_args(const Tensor& z, const Tensor& f, const Tensor& next, const Tensor& best,
                                           const Tensor& residuals, const Tensor& values, const Tensor& gram,
                                           const Tensor& scalars, const Tensor& counters, const Tensor& progress,
                                           int64_t step, double rtol, double atol, double eps, bool freeze, bool stall,
                                           bool last, int64_t memory, double damping, double ridge) {
  const StepArgs shared =
      step_args(z, f, next, best, scalars, counters, progress, step, rtol, atol, eps, freeze, stall, last);
  STD_TORCH_CHECK(values.dim() == 3, "values must be of shape (batch, slots, state), got ", describe(values));
  const int64_t slots = values.size(1);
  STD_TORCH_CHECK(memory >= 1 && slots >= memory && slots >= 2,
                  "values must have at least max(memory, 2) slots, got memory ", memory, " and ", slots, " slots");
  expect(values, "values", z.scalar_type(), {shared.batch, slots, shared.state}, &z);
  expect(residuals, "residuals", z.scalar_type(), {shared.batch, slots, shared.state}, &z);
  expect(gram, "gram", ScalarType::Double, {shared.batch, slots, slots}, &z);
  return {
      shared, residuals.data_ptr(), values.data_ptr(), static_cast<double*>(gram.data_ptr()), slots, memory, damping,
      ridge};
}

}  // namespace pydeq
