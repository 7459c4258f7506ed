// The arguments that the steps of all solvers share; plain data.
#pragma once

#include <cstdint>

#include "shared/dispatch.h"
#include "shared/parallel.h"
#include "shared/termination.h"

namespace pydeq {

struct StepArgs {
  int64_t batch, state;  // B, D
  Dtype dtype;
  void* z;            // [B, D]
  const void* f;      // [B, D]
  void* next;         // [B, D] in: the previous iterates, out: the next ones
  void* best;         // [2, B, D]
  double* scalars;    // [B, SCALAR_SIZE]
  int32_t* counters;  // [B, COUNTER_SIZE]
  int64_t* progress;  // [PROGRESS_SIZE]
  int64_t step;
  Rules rules;
  Parallel parallel;
};

}  // namespace pydeq
