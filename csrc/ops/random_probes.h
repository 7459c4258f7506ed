// Random probes; pydeq/ops/random_probes.py says what it means.
#pragma once

#include "common/dispatch.h"
#include "common/parallel.h"

namespace pydeq {

struct RandomProbesArgs {
  int64_t probes, batch, state;  // K, B, D
  Dtype dtype;
  uint64_t seed;
  int distribution;  // protocol::DISTRIBUTION_*
  void* out;         // [K, B, D]
  Parallel parallel;
};

}  // namespace pydeq
