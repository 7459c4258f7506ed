#include "cuda/launch_step.h"
#include "cuda/squared_norm.cuh"

namespace pydeq {
namespace {

Tensor squared_norm_cuda(const Tensor& x) {
  const Launch launch("squared_norm", x, "x");
  STD_TORCH_CHECK(x.dim() == 3, "x must be of shape (probes, batch, state), got ", describe(x));
  const int64_t probes = x.size(0), batch = x.size(1), state = x.size(2);
  STD_TORCH_CHECK(probes > 0, "x must have at least one probe, got ", describe(x));
  const Dtype dtype = state_dtype(x, "x");
  expect(x, "x", x.scalar_type(), {probes, batch, state}, &x);
  Tensor y = torch::stable::new_empty(x, {batch}, compute_dtype(x.scalar_type()));
  if (batch == 0) return y;
  const SquaredNormArgs args{probes, batch, state, dtype, x.data_ptr(), y.data_ptr(), torch_parallel()};
  const SquaredNormShape shape = squared_norm_shape(args, step_limits(launch));
  const Scratch scratch(launch, x, shape.scratch_bytes);
  if (shape.scratch_bytes > 0) {
    launch.check(cudaMemsetAsync(scratch.bytes() + shape.partial_bytes, 0, shape.scratch_bytes - shape.partial_bytes,
                                 launch.stream()));
  }
  const dim3 grid(static_cast<unsigned>(shape.blocks)), block(static_cast<unsigned>(shape.threads));
  PYDEQ_DISPATCH(
      dtype, T,
      (squared_norm_kernel<T><<<grid, block, shape.shared_bytes, launch.stream()>>>(args, shape, scratch.bytes())));
  launch.check();
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(pydeq, CUDA, m) { m.impl("squared_norm", TORCH_BOX(&squared_norm_cuda)); }

}  // namespace
}  // namespace pydeq
