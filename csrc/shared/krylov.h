// The least-squares problem of one sample's GMRES cycle, by coordinates in its basis, in double. cpu/krylov.h and
// cuda/krylov.cuh extend it by a measured residual.
#pragma once

#include <cstdint>

#include "shared/termination.h"

namespace pydeq {
namespace {

// A cycle with n basis vectors. Rows of matrices are `stride` apart; all but gram is in units of the cycle's first
// residual. pydeq/ops/gmres_step.py is the reference and names the quantities.
struct Cycle {
  int64_t n, stride;
  double* gram;        // [n, n] G
  double* images;      // [n - 1, n] e_i
  double* directions;  // [n - 1, n] p_i
  double* x;           // [n]
  double* rho;         // [n]
  double* point;       // [n] what was evaluated
};

// The result of adding a measured residual g to the cycle.
struct Extension {
  double remainder;   // ||g - V h|| / ||g||; 0 if there is no new direction
  double known;       // ||r||
  double gain;        // ||d|| / ||M d||
  bool usable;        // whether M d was a new image; if not, x and r are unchanged
  bool sound;         // whether all numbers are finite
  double* h;          // [n] coordinates of g / ||g||
  double* image;      // [n + 1] e_{n-1}
  double* direction;  // [n] p_{n-1}
  double* x;          // [n]
  double* rho;        // [n + 1]
};

// The size of an extension's rows, and of two rows of work, in doubles.
PYDEQ_HOST_DEVICE constexpr int64_t extension_size(int64_t n) { return 7 * (n + 1); }

// A cycle is closed if its known residual is at most this.
PYDEQ_HOST_DEVICE inline double closing_residual(const double* scalars, const Rules& rules, double eps) {
  using namespace constants;
  const double norm = scalars[SCALAR_NORM], contracted = CONTRACTION * scalars[SCALAR_FIRST];
  double tolerance = rules.atol + rules.rtol * norm;
  if (contracted < tolerance) tolerance = contracted;
  const double target = MARGIN * tolerance;
  return eps * norm > target ? eps * norm : target;
}

// The coordinate of a direction along the newest basis vector, from r's coordinate there and from ||r||.
PYDEQ_HOST_DEVICE inline double newest_share(double coordinate, double known) {
  const double least = constants::NEWEST_SHARE * known;
  return __builtin_fabs(coordinate) < least ? __builtin_copysign(least, coordinate) : coordinate;
}

}  // namespace
}  // namespace pydeq
