#include "shared/random_probes.h"

#include "cpu/isa.h"
#include "shared/bind.h"

PYDEQ_DECLARE_KERNEL(random_probes, RandomProbesArgs)

namespace pydeq {
namespace {

Tensor random_probes_cpu(const Tensor& like, const Tensor& seed, int64_t probes, int64_t distribution) {
  STD_TORCH_CHECK(like.dim() == 2, "like must be of shape (batch, state), got ", describe(like));
  const Dtype dtype = state_dtype(like, "like");
  expect(seed, "seed", ScalarType::Long, {});
  STD_TORCH_CHECK(probes >= 0, "probes must not be negative, got ", probes);
  STD_TORCH_CHECK(distribution >= 0 && distribution < constants::DISTRIBUTION_SIZE,
                  "distribution must be one of pydeq.ops.constants.Distribution, got ", distribution);
  const int64_t batch = like.size(0), state = like.size(1);
  Tensor out = torch::stable::new_empty(like, {probes, batch, state});
  const RandomProbesArgs args{probes,
                              batch,
                              state,
                              dtype,
                              static_cast<uint64_t>(*static_cast<const int64_t*>(seed.data_ptr())),
                              static_cast<int>(distribution),
                              out.data_ptr(),
                              torch_parallel()};
  PYDEQ_CALL_KERNEL(random_probes, args);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(pydeq, CPU, m) { m.impl("random_probes", TORCH_BOX(&random_probes_cpu)); }

}  // namespace
}  // namespace pydeq
