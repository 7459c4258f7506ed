// The checked arguments of one step of GMRES, from tensors on any device.
#pragma once

#include <vector>

#include "shared/bind_step.h"
#include "shared/gmres_step.h"

namespace pydeq {

inline GmresStepArgs gmres_step_args(const SharedArguments& shared, const Tensor& iterate, const Tensor& start,
                                     const std::vector<Tensor>& basis, const Tensor& gram, const Tensor& images,
                                     const Tensor& directions, const Tensor& coordinates, const Tensor& lengths,
                                     bool penultimate, int64_t restart) {
  const Tensor& z = shared.z;
  const int64_t batch = shared.step.batch, state = shared.step.state, step = shared.step.step;
  const int64_t stored = static_cast<int64_t>(basis.size());
  const ScalarType wide = compute_dtype(z.scalar_type());
  STD_TORCH_CHECK(restart >= 1, "restart must be at least 1, got ", restart);
  STD_TORCH_CHECK(gram.dim() == 3, "gram must be of shape (batch, vectors, vectors), got ", describe(gram));
  const int64_t capacity = gram.size(2);
  const int64_t needed = step < restart ? step + 1 : restart;
  STD_TORCH_CHECK(stored <= capacity && (shared.step.rules.last || stored >= needed), "basis must hold ", needed,
                  " to ", capacity, " tensors at step ", step, ", got ", stored);
  STD_TORCH_CHECK(z.is_cpu() || stored <= constants::CUDA_VECTORS, "on a GPU restart must be at most ",
                  constants::CUDA_VECTORS, ", got ", restart, " with ", stored, " basis vectors stored");
  for (const Tensor& v : basis) {
    expect(v, "basis", wide, {batch, state}, &z);
    shared.addresses.push_back(v.data_ptr());
  }
  expect(start, "start", wide, {batch, state}, &z);
  expect(gram, "gram", ScalarType::Double, {batch, capacity, capacity}, &z);
  expect(images, "images", ScalarType::Double, {batch, capacity, capacity}, &z);
  expect(directions, "directions", ScalarType::Double, {batch, capacity, capacity}, &z);
  expect(coordinates, "coordinates", ScalarType::Double, {batch, constants::COORDINATE_SIZE, capacity}, &z);
  expect(lengths, "lengths", ScalarType::Double, {batch}, &z);
  const bool half = wide != z.scalar_type();
  if (half) expect(iterate, "iterate", wide, {batch, state}, &z);
  return {shared.step,
          half ? iterate.data_ptr() : nullptr,
          start.data_ptr(),
          shared.addresses.data(),
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
