// The checked arguments of one step of GMRES, from tensors on any device.
#pragma once

#include <vector>

#include "shared/bind.h"
#include "shared/gmres_step.h"

namespace pydeq {

// `pointers` takes the list that the arguments point to, and must live as long as they do.
inline GmresStepArgs gmres_step_args(const Tensor& z, const Tensor& f, const Tensor& next, const Tensor& best,
                                     const Tensor& iterate, const Tensor& start, const std::vector<Tensor>& basis,
                                     const Tensor& gram, const Tensor& images, const Tensor& directions,
                                     const Tensor& coordinates, const Tensor& lengths, const Tensor& scalars,
                                     const Tensor& counters, const Tensor& progress, int64_t step, double rtol,
                                     double atol, double eps, bool freeze, bool stall, bool last, bool penultimate,
                                     int64_t restart, std::vector<void*>& pointers) {
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
  pointers.clear();
  for (const Tensor& v : basis) {
    expect(v, "basis", wide, {batch, state}, &z);
    pointers.push_back(v.data_ptr());
  }
  expect(start, "start", wide, {batch, state}, &z);
  expect(gram, "gram", ScalarType::Double, {batch, capacity, capacity}, &z);
  expect(images, "images", ScalarType::Double, {batch, capacity, capacity}, &z);
  expect(directions, "directions", ScalarType::Double, {batch, capacity, capacity}, &z);
  expect(coordinates, "coordinates", ScalarType::Double, {batch, constants::COORDINATE_SIZE, capacity}, &z);
  expect(lengths, "lengths", ScalarType::Double, {batch}, &z);
  const bool half = wide != z.scalar_type();
  if (half) expect(iterate, "iterate", wide, {batch, state}, &z);
  return {shared,
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
}

}  // namespace pydeq
