// Mean over probes of the sums of squares of rows; pydeq/ops/squared_norm.py defines it.
#pragma once

#include "shared/dispatch.h"
#include "shared/parallel.h"

namespace pydeq {

struct SquaredNormArgs {
  int64_t probes, batch, state;  // K, B, D
  Dtype dtype;
  const void* x;  // [K, B, D]
  void* y;        // [B], double for double, else float
  Parallel parallel;
};

}  // namespace pydeq
