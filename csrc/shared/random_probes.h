// Random probes; pydeq/ops/random_probes.py defines them.
#pragma once

#include "pydeq_constants.h"
#include "shared/dispatch.h"
#include "shared/parallel.h"

namespace pydeq {

struct RandomProbesArgs {
  int64_t probes, batch, state;  // K, B, D
  Dtype dtype;
  uint64_t seed;
  int distribution;  // constants::DISTRIBUTION_*
  void* out;         // [K, B, D]
  Parallel parallel;
};

}  // namespace pydeq
