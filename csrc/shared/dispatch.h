// The dtypes of states, and the dispatch from a run-time dtype to a compile-time type. This is the only list of them.
#pragma once

#include <cstdint>

namespace pydeq {

enum class Dtype { float64, float32, float16, bfloat16 };

// Storage of the half types: bits only. Arithmetic happens in float.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type of computations with a storage type.
template <class T>
struct ComputeOf {
  using Type = float;
};
template <>
struct ComputeOf<double> {
  using Type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::Type;

template <class T>
constexpr bool is_half = sizeof(T) == 2;

// The distance from 1 to the next larger number.
template <class T>
constexpr double epsilon = __DBL_EPSILON__;
template <>
constexpr double epsilon<float> = __FLT_EPSILON__;
template <>
constexpr double epsilon<Float16> = 0x1p-10;
template <>
constexpr double epsilon<BFloat16> = 0x1p-7;

}  // namespace pydeq

// Runs the statement with `T` standing for the type of `dtype`.
#define PYDEQ_DISPATCH(dtype, T, ...) \
  switch (dtype) {                    \
    case ::pydeq::Dtype::float64: {   \
      using T = double;               \
      __VA_ARGS__;                    \
      break;                          \
    }                                 \
    case ::pydeq::Dtype::float32: {   \
      using T = float;                \
      __VA_ARGS__;                    \
      break;                          \
    }                                 \
    case ::pydeq::Dtype::float16: {   \
      using T = ::pydeq::Float16;     \
      __VA_ARGS__;                    \
      break;                          \
    }                                 \
    case ::pydeq::Dtype::bfloat16: {  \
      using T = ::pydeq::BFloat16;    \
      __VA_ARGS__;                    \
      break;                          \
    }                                 \
  }
