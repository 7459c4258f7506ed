// The small dense system of Anderson mixing, one per sample, in double. cuda/small_solve.cuh solves it by a warp.
#pragma once

#include <cstdint>

#include "shared/termination.h"

namespace pydeq {
namespace {

// Coefficients a with (Gram + ridge diag(Gram)) a = 1, normalized to sum 1, of the newest `count` columns, or of fewer
// if older columns make the system ill-conditioned. Returns their number. pydeq/ops/anderson_step.py is the reference.
//
// Columns are by age, newest first, so a Cholesky factor's leading block is the factor of fewer columns.
// gram(i, j): <g_i, g_j>. work: [count * count + 3 * count]. a: [count].
template <class Gram>
inline int64_t mixing_coefficients(Gram gram, int64_t count, double ridge, double* work, double* a) {
  double* factor = work;                   // [count, count], lower triangle; the diagonal inverted
  double* inverse = work + count * count;  // [count] 1 / ||g_i||
  double* right = inverse + count;         // [count] the right side, in units of the newest column
  double* forward = right + count;         // [count] factor^-1 right
  int64_t sound = 0;                       // columns that the factorization got through
  for (int64_t i = 0; i < count; ++i) inverse[i] = 1.0 / __builtin_sqrt(gram(i, i));
  const double newest = __builtin_sqrt(gram(0, 0));
  for (int64_t i = 0; i < count; ++i, ++sound) {
    // Correlations: the diagonal is 1 at any scale of the residuals.
    for (int64_t j = 0; j < i; ++j) {
      double s = gram(i, j) * inverse[i] * inverse[j];
      for (int64_t k = 0; k < j; ++k) s -= factor[i * count + k] * factor[j * count + k];
      factor[i * count + j] = s * factor[j * count + j];
    }
    double pivot = 1.0 + ridge;
    for (int64_t k = 0; k < i; ++k) pivot -= factor[i * count + k] * factor[i * count + k];
    right[i] = newest * inverse[i];
    double s = right[i];
    for (int64_t k = 0; k < i; ++k) s -= factor[i * count + k] * forward[k];
    factor[i * count + i] = 1.0 / __builtin_sqrt(pivot);
    forward[i] = s * factor[i * count + i];
    if (!(pivot > 0.0) || !finite(forward[i])) break;
  }
  for (int64_t columns = sound; columns > 1; --columns) {
    double total = 0.0, magnitude = 0.0;
    for (int64_t i = columns - 1; i >= 0; --i) {
      double s = forward[i];
      for (int64_t k = i + 1; k < columns; ++k) s -= factor[k * count + i] * a[k];
      a[i] = s * factor[i * count + i];
    }
    for (int64_t i = 0; i < columns; ++i) {
      a[i] *= right[i];
      total += a[i];
    }
    for (int64_t i = 0; i < columns; ++i) {
      a[i] /= total;
      magnitude += __builtin_fabs(a[i]);
    }
    if (magnitude <= constants::COEFFICIENT_LIMIT) return columns;  // a NaN fails this, too
  }
  a[0] = 1.0;
  return 1;
}

}  // namespace
}  // namespace pydeq
