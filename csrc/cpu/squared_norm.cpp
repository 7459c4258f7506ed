#include "shared/squared_norm.h"

#include "cpu/isa.h"
#include "shared/bind.h"

PYDEQ_DECLARE_KERNEL(squared_norm, SquaredNormArgs)

namespace pydeq {
namespace {

Tensor squared_norm_cpu(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be of shape (probes, batch, state), got ", describe(x));
  const int64_t probes = x.size(0), batch = x.size(1), state = x.size(2);
  STD_TORCH_CHECK(probes > 0, "x must have at least one probe, got ", describe(x));
  const Dtype dtype = state_dtype(x, "x");
  expect(x, "x", x.scalar_type(), {probes, batch, state});
  Tensor y = torch::stable::new_empty(x, {batch}, compute_dtype(x.scalar_type()));
  const SquaredNormArgs args{probes, batch, state, dtype, x.data_ptr(), y.data_ptr(), torch_parallel()};
  PYDEQ_CALL_KERNEL(squared_norm, args);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(pydeq, CPU, m) { m.impl("squared_norm", TORCH_BOX(&squared_norm_cpu)); }

}  // namespace
}  // namespace pydeq
