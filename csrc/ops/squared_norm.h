// Sums of squares of rows; pydeq/ops/squared_norm.py says what it means.
#pragma once

#include "common/dispatch.h"
#include "common/parallel.h"

namespace pydeq {

struct SquaredNormArgs {
  int64_t batch, state;  // B, D
  Dtype dtype;
  const void* x;  // [B, D]
  void* y;        // [B], double for double, else float
  Parallel parallel;
};

}  // namespace pydeq
