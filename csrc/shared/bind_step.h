// Registration of all solvers' steps with torch: from a call with the arguments of the schema to a launch.
#pragma once

#include <vector>

#include "shared/bind.h"
#include "shared/step_args.h"

namespace pydeq {

// The shared arguments, which a solver's own are checked against and added to.
struct SharedArguments {
  const Tensor& z;
  StepArgs step;
  std::vector<void*>& addresses;  // of a list of tensors; valid until the step is launched
};

// The arguments that all steps share; checked. All are on z's device except progress, which is on the host.
inline StepArgs step_args(const Tensor& z, const Tensor& f, const Tensor& next, const Tensor& best,
                          const Tensor& scalars, const Tensor& counters, const Tensor& progress, int64_t step,
                          const Rules& rules) {
  STD_TORCH_CHECK(z.dim() == 2, "z must be of shape (batch, state), got ", describe(z));
  const int64_t batch = z.size(0), state = z.size(1);
  const ScalarType dtype = z.scalar_type();
  const Dtype kind = state_dtype(z, "z");
  expect(z, "z", dtype, {batch, state}, &z);
  expect(f, "f", dtype, {batch, state}, &z);
  expect(next, "next", dtype, {batch, state}, &z);
  expect(best, "best", dtype, {2, batch, state}, &z);
  expect(scalars, "scalars", ScalarType::Double, {batch, constants::SCALAR_SIZE}, &z);
  expect(counters, "counters", ScalarType::Int, {batch, constants::COUNTER_SIZE}, &z);
  expect(progress, "progress", ScalarType::Long, {constants::PROGRESS_SIZE});
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
          rules,
          torch_parallel()};
}

// torch calls `call` for a step, with the arguments of the schema: the shared ones, then the solver's own.
//
//   make    Args make(const SharedArguments&, own...), in csrc/shared/<op>_bind.h: checks the solver's own arguments
//   Device  Device::run(z, arguments, addresses) launches the step; arguments() checks all arguments and returns Args
template <auto make, class Device, class = decltype(make)>
struct StepBinding;

template <auto make, class Device, class Args, class... Own>
struct StepBinding<make, Device, Args (*)(const SharedArguments&, Own...)> {
  static void call(const Tensor& z, const Tensor& f, const Tensor& next, const Tensor& best, const Tensor& scalars,
                   const Tensor& counters, const Tensor& progress, int64_t step, double rtol, double atol, double eps,
                   bool freeze, bool stall, bool last, Own... own) {
    std::vector<void*> addresses;
    const auto arguments = [&] {
      const Rules rules{rtol, atol, eps, freeze, stall, last, 0};
      return make({z, step_args(z, f, next, best, scalars, counters, progress, step, rules), addresses}, own...);
    };
    Device::run(z, arguments, addresses);
  }
};

}  // namespace pydeq
