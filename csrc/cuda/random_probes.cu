#include "cuda/launch_step.h"
#include "cuda/random_probes.cuh"

namespace pydeq {
namespace {

Tensor random_probes_cuda(const Tensor& like, const Tensor& seed, int64_t probes, int64_t distribution) {
  const Launch launch("random_probes", like, "like");
  STD_TORCH_CHECK(like.dim() == 2, "like must be of shape (batch, state), got ", describe(like));
  const Dtype dtype = state_dtype(like, "like");
  expect(seed, "seed", ScalarType::Long, {}, &like);
  STD_TORCH_CHECK(probes >= 0, "probes must not be negative, got ", probes);
  STD_TORCH_CHECK(distribution >= 0 && distribution < constants::DISTRIBUTION_SIZE,
                  "distribution must be one of pydeq.ops.constants.Distribution, got ", distribution);
  const int64_t batch = like.size(0), state = like.size(1);
  Tensor out = torch::stable::new_empty(like, {probes, batch, state});
  if (probes == 0 || batch == 0 || state == 0) return out;
  // The kernel reads the seed in device memory, so the host does not wait for it.
  const RandomProbesArgs args{probes,         batch,           state, dtype, 0, static_cast<int>(distribution),
                              out.data_ptr(), torch_parallel()};
  const RandomProbesShape shape = random_probes_shape(args, step_limits(launch));
  const int64_t* seed_at = static_cast<const int64_t*>(seed.data_ptr());
  const dim3 grid(static_cast<unsigned>(shape.blocks)), block(static_cast<unsigned>(shape.threads));
  PYDEQ_DISPATCH(dtype, T, (random_probes_kernel<T><<<grid, block, 0, launch.stream()>>>(args, shape, seed_at)));
  launch.check();
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(pydeq, CUDA, m) { m.impl("random_probes", TORCH_BOX(&random_probes_cuda)); }

}  // namespace
}  // namespace pydeq
