#include "ops/gmres_step.h"

#include <vector>

#include "common/bind.h"
#include "common/isa.h"

PYDEQ_DECLARE_KERNEL(gmres_step, GmresStepArgs)

namespace pydeq {
namespace {

void gmres_step_cpu(const Tensor& z, const Tensor& f, const Tensor& next, const Tensor& best, const Tensor& iterate,
                    const Tensor& start, const std::vector<Tensor>& basis, const Tensor& gram, const Tensor& images,
                    const Tensor& directions, const Tensor& coordinates, const Tensor& lengths, const Tensor& scalars,
                    const Tensor& counters, const Tensor& progress, int64_t step, double rtol, double atol, double eps,
                    bool freeze, bool stall, bool last, bool penultimate, int64_t restart) {
  const StepArgs shared =
      step_args(z, f, next, best, scalars, counters, progress, step, rtol, atol, eps, freeze, stall, last);
  const int64_t batch = shared.batch, state = shared.state, stored = static_cast<int64_t>(basis.size());
  const ScalarType wide = compute_dtype(z.scalar_type());
  STD_TORCH_CHECK(restart >= 1, "restart must be at least 1, got ", restart);
  STD_TORCH_CHECK(gram.dim() == 3, "gram must be of shape (batch, vectors, vectors), got ", describe(gram));
  const int64_t capacity = gram.size(2);
  const int64_t needed = step < restart ? step + 1 : restart;
  STD_TORCH_CHECK(stored <= capacity && (last || stored >= needed), "basis must hold ", needed, " to ", capacity,
                  " tensors at step ", step, ", got ", stored);
  std::vector<void*> pointers;
  for (const Tensor& v : basis) {
    expect(v, "basis", wide, {batch, state});
    pointers.push_back(v.data_ptr());
  }
  expect(start, "start", wide, {batch, state});
  expect(gram, "gram", ScalarType::Double, {batch, capacity, capacity});
  expect(images, "images", ScalarType::Double, {batch, capacity, capacity});
  expect(directions, "directions", ScalarType::Double, {batch, capacity, capacity});
  expect(coordinates, "coordinates", ScalarType::Double, {batch, protocol::COORDINATE_SIZE, capacity});
  expect(lengths, "lengths", ScalarType::Double, {batch});
  const bool half = wide != z.scalar_type();
  if (half) expect(iterate, "iterate", wide, {batch, state});
  const GmresStepArgs args{shared,
                           half ? iterate.data_ptr() : nullptr,
                           start.data_ptr(),
                           pointers.data(),
                           stored,
                           static_cast<double*>(gram.data_ptr()),
                           static_cast<double*>(images.data_ptr()),
                           static_cast<double*>(directions.data_ptr()),
                           static_cast<double*>(coordinates.data_ptr()),
                           static_cast<double*>(lengths.data_ptr()),
                           capacity,
                           restart,
                           penultimate};
  PYDEQ_CALL_KERNEL(gmres_step, args);
}

STABLE_TORCH_LIBRARY_IMPL(pydeq, CPU, m) { m.impl("gmres_step", TORCH_BOX(&gmres_step_cpu)); }

}  // namespace
}  // namespace pydeq
