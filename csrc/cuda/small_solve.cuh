// The computations of cpu/small_solve.h, by a warp: its lanes share the rows of the system.
#pragma once

#include "cuda/simt.cuh"
#include "shared/termination.h"

namespace pydeq {

// mixing_coefficients of cpu/small_solve.h, called by a whole warp. Its lanes share all memory.
// gram: [count, count], lower triangle, newest column first. work: [count * count + 3 * count]. a: [count].
PYDEQ_DEVICE int warp_mixing_coefficients(const double* gram, int count, double ridge, double* work, double* a) {
  double* factor = work;                   // [count, count], lower triangle; the diagonal inverted
  double* inverse = work + count * count;  // [count] 1 / ||g_i||
  double* right = inverse + count;         // [count] the right side, in units of the newest column
  double* forward = right + count;         // [count] factor^-1 right
  const int lane = lane_index();
  const double newest = sqrt(gram[0]);
  PYDEQ_ROLL_LOOP for (int i = lane; i < count; i += kWarp) {
    inverse[i] = 1.0 / sqrt(gram[i * count + i]);
    right[i] = newest * inverse[i];
  }
  warp_sync();
  int sound = 0;  // columns that the factorization got through
  for (int j = 0; j < count; ++j, ++sound) {
    PYDEQ_ROLL_LOOP for (int i = j + lane; i < count; i += kWarp) {
      double s = i == j ? 1.0 + ridge : gram[i * count + j] * inverse[i] * inverse[j];
      for (int k = 0; k < j; ++k) s -= factor[i * count + k] * factor[j * count + k];
      factor[i * count + j] = s;
    }
    warp_sync();
    const double pivot = factor[j * count + j], inverted = 1.0 / sqrt(pivot);
    double s = right[j];
    for (int k = 0; k < j; ++k) s -= factor[j * count + k] * forward[k];
    s *= inverted;
    warp_sync();  // all have read the pivot
    PYDEQ_ROLL_LOOP for (int i = j + lane; i < count; i += kWarp) {
      factor[i * count + j] = i == j ? inverted : factor[i * count + j] * inverted;
    }
    if (lane == 0) forward[j] = s;
    warp_sync();
    if (!(pivot > 0.0) || !finite(s)) break;
  }
  for (int columns = sound; columns > 1; --columns) {
    PYDEQ_ROLL_LOOP for (int i = lane; i < columns; i += kWarp) a[i] = forward[i];
    warp_sync();
    for (int i = columns - 1; i >= 0; --i) {
      const double solved = a[i] * factor[i * count + i];
      warp_sync();  // all have read a[i]
      PYDEQ_ROLL_LOOP for (int k = lane; k < i; k += kWarp) a[k] -= factor[i * count + k] * solved;
      if (lane == 0) a[i] = solved;
      warp_sync();
    }
    double sums[2] = {0.0, 0.0};
    PYDEQ_ROLL_LOOP for (int i = lane; i < columns; i += kWarp) {
      const double scaled = a[i] * right[i];
      a[i] = scaled;
      sums[0] += scaled;
      sums[1] += fabs(scaled);
    }
    warp_sum(sums);
    PYDEQ_ROLL_LOOP for (int i = lane; i < columns; i += kWarp) a[i] /= sums[0];
    warp_sync();
    if (sums[1] / fabs(sums[0]) <= constants::COEFFICIENT_LIMIT) return columns;  // a NaN fails this, too
  }
  if (lane == 0) a[0] = 1.0;
  warp_sync();
  return 1;
}

}  // namespace pydeq
