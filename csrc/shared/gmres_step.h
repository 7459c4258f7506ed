// One step of restarted GMRES; pydeq/ops/gmres_step.py defines it.
#pragma once

#include "shared/step_args.h"

namespace pydeq {

// The start, the basis and the iterate are of the compute type: float for half states.
struct GmresStepArgs {
  StepArgs step;
  void* iterate;       // [B, D] of which z is the rounding; null unless states are halves
  void* start;         // [B, D]
  void* const* basis;  // `stored` pointers to [B, D]
  int64_t stored;
  double* gram;         // [B, K, K]
  double* images;       // [B, K, K]
  double* directions;   // [B, K, K]
  double* coordinates;  // [B, COORDINATE_SIZE, K]
  double* lengths;      // [B]
  int64_t capacity;     // K
  int64_t restart;
  bool penultimate;  // exactly one evaluation follows
};

}  // namespace pydeq
