#include "ops/squared_norm.h"

#include "common/bind.h"
#include "common/isa.h"

PYDEQ_DECLARE_KERNEL(squared_norm, SquaredNormArgs)

namespace pydeq {
namespace {

Tensor squared_norm_cpu(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be of shape (batch, state), got ", describe(x));
  const int64_t batch = x.size(0), state = x.size(1);
  const Dtype dtype = state_dtype(x, "x");
  expect(x, "x", x.scalar_type(), {batch, state});
  Tensor y = torch::stable::new_empty(x, {batch}, compute_dtype(x.scalar_type()));
  const SquaredNormArgs args{batch, state, dtype, x.data_ptr(), y.data_ptr(), torch_parallel()};
  PYDEQ_CALL_KERNEL(squared_norm, args);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(pydeq, CPU, m) { m.impl("squared_norm", TORCH_BOX(&squared_norm_cpu)); }

}  // namespace
}  // namespace pydeq
