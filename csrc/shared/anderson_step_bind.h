// The checked arguments of one step of Anderson mixing, from tensors on any device.
#pragma once

#include "shared/anderson_step.h"
#include "shared/bind_step.h"

namespace pydeq {

inline AndersonStepArgs anderson_step_args(const SharedArguments& shared, const Tensor& residuals, const Tensor& values,
                                           const Tensor& gram, int64_t memory, double damping, double ridge) {
  const Tensor& z = shared.z;
  const int64_t batch = shared.step.batch, state = shared.step.state;
  STD_TORCH_CHECK(values.dim() == 3, "values must be of shape (batch, slots, state), got ", describe(values));
  const int64_t slots = values.size(1);
  STD_TORCH_CHECK(memory >= 1 && slots >= memory && slots >= 2,
                  "values must have at least max(memory, 2) slots, got memory ", memory, " and ", slots, " slots");
  expect(values, "values", z.scalar_type(), {batch, slots, state}, &z);
  expect(residuals, "residuals", z.scalar_type(), {batch, slots, state}, &z);
  expect(gram, "gram", ScalarType::Double, {batch, slots, slots}, &z);
  return {shared.step,
          residuals.data_ptr(),
          values.data_ptr(),
          static_cast<double*>(gram.data_ptr()),
          slots,
          memory,
          damping,
          ridge};
}

}  // namespace pydeq
