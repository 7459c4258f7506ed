// From torch's tensors to the plain arguments of kernels, with the checks that a kernel does not repeat.
#pragma once

#include <initializer_list>
#include <string>

#include "common/stable.h"
#include "common/step_args.h"

namespace pydeq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string describe(const Tensor& t) {
  std::string text = torch::headeronly::toString(t.scalar_type());
  text += " (";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + (t.is_contiguous() ? ")" : "), not contiguous");
}

// Raises unless `t` is a contiguous CPU tensor of this dtype and shape.
inline void expect(const Tensor& t, const char* name, ScalarType dtype, std::initializer_list<int64_t> shape) {
  bool fits =
      t.is_cpu() && t.is_contiguous() && t.scalar_type() == dtype && t.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (int64_t size : shape) fits = fits && t.size(i++) == size;
  if (fits) return;
  std::string expected = torch::headeronly::toString(dtype);
  expected += " (";
  i = 0;
  for (int64_t size : shape) expected += (i++ ? ", " : "") + std::to_string(size);
  STD_TORCH_CHECK(false, name, " must be a contiguous CPU tensor of ", expected, "), got ", describe(t),
                  t.is_cpu() ? "" : " on another device");
}

// The dtype of a state.
inline Dtype state_dtype(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float64, float32, float16 or bfloat16, got ", describe(t));
  }
}

// What states of this dtype are computed in.
inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The arguments that all steps share; checked.
inline StepArgs step_args(const Tensor& z, const Tensor& f, const Tensor& next, const Tensor& best,
                          const Tensor& scalars, const Tensor& counters, const Tensor& progress, int64_t step,
                          double rtol, double atol, double eps, bool freeze, bool stall, bool last) {
  STD_TORCH_CHECK(z.dim() == 2, "z must be of shape (batch, state), got ", describe(z));
  const int64_t batch = z.size(0), state = z.size(1);
  const ScalarType dtype = z.scalar_type();
  const Dtype kind = state_dtype(z, "z");
  expect(z, "z", dtype, {batch, state});
  expect(f, "f", dtype, {batch, state});
  expect(next, "next", dtype, {batch, state});
  expect(best, "best", dtype, {2, batch, state});
  expect(scalars, "scalars", ScalarType::Double, {batch, protocol::SCALAR_SIZE});
  expect(counters, "counters", ScalarType::Int, {batch, protocol::COUNTER_SIZE});
  expect(progress, "progress", ScalarType::Long, {protocol::PROGRESS_SIZE});
  return {batch,
          state,
          kind,
          z.data_ptr(),
          f.data_ptr(),
          next.data_ptr(),
          best.data_ptr(),
          static_cast<double*>(scalars.data_ptr()),
          static_cast<int32_t*>(counters.data_ptr()),
          static_cast<int64_t*>(progress.data_ptr()),
          step,
          {rtol, atol, eps, freeze, stall, last},
          torch_parallel()};
}

}  // namespace pydeq
