#include <algorithm>

#include "cuda/gmres_step.cuh"
#include "cuda/launch_step.h"
#include "cuda/step_kernels.h"
#include "shared/gmres_step_bind.h"

namespace pydeq {

PYDEQ_KERNELS_APART(GmresStep)

namespace {

void gmres_step_cuda(const Tensor& z, const Tensor& f, const Tensor& next, const Tensor& best, const Tensor& iterate,
                     const Tensor& start, const std::vector<Tensor>& basis, const Tensor& gram, const Tensor& images,
                     const Tensor& directions, const Tensor& coordinates, const Tensor& lengths, const Tensor& scalars,
                     const Tensor& counters, const Tensor& progress, int64_t step, double rtol, double atol, double eps,
                     bool freeze, bool stall, bool last, bool penultimate, int64_t restart) {
  const Launch launch("gmres_step", z, "z");
  std::vector<void*> pointers;
  Listing<GmresStepArgs> args{
      gmres_step_args(z, f, next, best, iterate, start, basis, gram, images, directions, coordinates, lengths, scalars,
                      counters, progress, step, rtol, atol, eps, freeze, stall, last, penultimate, restart, pointers),
      {}};
  STD_TORCH_CHECK(args.stored <= kMaxListed, "on a GPU restart must be at most ", kMaxListed, ", got ", restart,
                  " with ", args.stored, " basis vectors stored");
  std::copy(pointers.begin(), pointers.end(), args.rows);
  PYDEQ_DISPATCH(args.step.dtype, T, launch_step<GmresStep<T>>(launch, z, args));
}

STABLE_TORCH_LIBRARY_IMPL(pydeq, CUDA, m) { m.impl("gmres_step", TORCH_BOX(&gmres_step_cuda)); }

}  // namespace
}  // namespace pydeq
