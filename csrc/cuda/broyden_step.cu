#include <algorithm>

#include "cuda/broyden_step.cuh"
#include "cuda/launch_step.h"
#include "cuda/step_kernels.h"
#include "shared/broyden_step_bind.h"

namespace pydeq {

PYDEQ_KERNELS_APART(BroydenStep)

namespace {

void broyden_step_cuda(const Tensor& z, const Tensor& f, const Tensor& next, const Tensor& best, const Tensor& iterate,
                       const std::vector<Tensor>& steps, const Tensor& restart, const Tensor& gram,
                       const Tensor& thetas, const Tensor& scalars, const Tensor& counters, const Tensor& progress,
                       int64_t step, double rtol, double atol, double eps, bool freeze, bool stall, bool last,
                       int64_t memory) {
  const Launch launch("broyden_step", z, "z");
  std::vector<void*> pointers;
  Listing<BroydenStepArgs> args{
      broyden_step_args(z, f, next, best, iterate, steps, restart, gram, thetas, scalars, counters, progress, step,
                        rtol, atol, eps, freeze, stall, last, memory, pointers),
      {}};
  STD_TORCH_CHECK(args.stored <= kMaxListed, "on a GPU memory must be at most ", kMaxListed - 1, ", got ", memory,
                  " with ", args.stored, " steps stored");
  std::copy(pointers.begin(), pointers.end(), args.rows);
  PYDEQ_DISPATCH(args.step.dtype, T, launch_step<BroydenStep<T>>(launch, z, args));
}

STABLE_TORCH_LIBRARY_IMPL(pydeq, CUDA, m) { m.impl("broyden_step", TORCH_BOX(&broyden_step_cuda)); }

}  // namespace
}  // namespace pydeq
