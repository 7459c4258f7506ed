// From torch's tensors to the plain arguments of kernels, with the checks that a kernel does not repeat.
#pragma once

#include <initializer_list>
#include <string>

#include "shared/dispatch.h"
#include "shared/stable.h"

namespace pydeq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string describe(const Tensor& t) {
  std::string text = torch::headeronly::toString(t.scalar_type());
  text += " (";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + (t.is_contiguous() ? ")" : "), not contiguous");
}

inline std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "CPU";
  if (!t.is_cuda()) return "other device's";
  return "cuda:" + std::to_string(t.get_device_index());
}

inline bool same_device(const Tensor& t, const Tensor& other) {
  return t.is_cpu() ? other.is_cpu()
                    : t.is_cuda() && other.is_cuda() && t.get_device_index() == other.get_device_index();
}

// Raises unless `t` is a contiguous tensor of this dtype and shape on the device of `like`, or on the CPU.
inline void expect(const Tensor& t, const char* name, ScalarType dtype, std::initializer_list<int64_t> shape,
                   const Tensor* like = nullptr) {
  bool fits = (like ? same_device(t, *like) : t.is_cpu()) && t.is_contiguous() && t.scalar_type() == dtype &&
              t.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (int64_t size : shape) fits = fits && t.size(i++) == size;
  if (fits) return;
  std::string expected = torch::headeronly::toString(dtype);
  expected += " (";
  i = 0;
  for (int64_t size : shape) expected += (i++ ? ", " : "") + std::to_string(size);
  const std::string device = like ? device_name(*like) : "CPU";
  STD_TORCH_CHECK(false, name, " must be a contiguous ", device, " tensor of ", expected, "), got ", describe(t),
                  device_name(t) == device ? "" : " on another device");
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

// The dtype of computations with states of this dtype.
inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace pydeq
