#include "cpu/isa.h"
#include "shared/gmres_step_bind.h"

PYDEQ_DECLARE_KERNEL(gmres_step, GmresStepArgs)

namespace pydeq {
namespace {

void gmres_step_cpu(const Tensor& z, const Tensor& f, const Tensor& next, const Tensor& best, const Tensor& iterate,
                    const Tensor& start, const std::vector<Tensor>& basis, const Tensor& gram, const Tensor& images,
                    const Tensor& directions, const Tensor& coordinates, const Tensor& lengths, const Tensor& scalars,
                    const Tensor& counters, const Tensor& progress, int64_t step, double rtol, double atol, double eps,
                    bool freeze, bool stall, bool last, bool penultimate, int64_t restart) {
  std::vector<void*> pointers;
  const GmresStepArgs args =
      gmres_step_args(z, f, next, best, iterate, start, basis, gram, images, directions, coordinates, lengths, scalars,
                      counters, progress, step, rtol, atol, eps, freeze, stall, last, penultimate, restart, pointers);
  PYDEQ_CALL_KERNEL(gmres_step, args);
}

STABLE_TORCH_LIBRARY_IMPL(pydeq, CPU, m) { m.impl("gmres_step", TORCH_BOX(&gmres_step_cpu)); }

}  // namespace
}  // namespace pydeq
