// Small dense systems in a trust region, one sample at a time, in double; pydeq/ops/trust_region_search.py is the
// reference. Matrices are of n rows and columns, n <= TRUST_ENTRIES, by rows unless they say otherwise.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "pydeq_constants.h"

namespace pydeq {
namespace {

using constants::TRUST_ENTRIES;

// The larger one; NaN if there is one.
inline double larger(double a, double b) { return a >= b || a != a ? a : b; }

// ||x||, which overflows and vanishes no earlier than the entries.
inline double vector_norm(const double* x, int64_t n) {
  double largest = 0.0;
  for (int64_t i = 0; i < n; ++i) largest = larger(largest, std::fabs(x[i]));
  if (!(largest > 0.0)) return largest;
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += (x[i] / largest) * (x[i] / largest);
  return largest * std::sqrt(sum);
}

// y = g - A x
inline void subtract_product(const double* g, const double* matrix, const double* x, int64_t n, double* y) {
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0.0;
    for (int64_t j = 0; j < n; ++j) sum += matrix[i * n + j] * x[j];
    y[i] = g[i] - sum;
  }
}

// A y = g by elimination with row pivots. False if A is singular.
inline bool solve(const double* matrix, const double* g, int64_t n, double* y) {
  double rows[TRUST_ENTRIES * TRUST_ENTRIES];
  std::copy(matrix, matrix + n * n, rows);
  std::copy(g, g + n, y);
  for (int64_t k = 0; k < n; ++k) {
    int64_t pivot = k;
    for (int64_t i = k + 1; i < n; ++i) {
      if (std::fabs(rows[i * n + k]) > std::fabs(rows[pivot * n + k])) pivot = i;
    }
    if (rows[pivot * n + k] == 0.0) return false;
    if (pivot != k) {
      std::swap_ranges(rows + k * n + k, rows + (k + 1) * n, rows + pivot * n + k);
      std::swap(y[k], y[pivot]);
    }
    for (int64_t i = k + 1; i < n; ++i) {
      const double factor = rows[i * n + k] / rows[k * n + k];
      for (int64_t j = k + 1; j < n; ++j) rows[i * n + j] -= factor * rows[k * n + j];
      y[i] -= factor * y[k];
    }
  }
  for (int64_t k = n - 1; k >= 0; --k) {
    for (int64_t j = k + 1; j < n; ++j) y[k] -= rows[k * n + j] * y[j];
    y[k] /= rows[k * n + k];
  }
  return true;
}

// W = A V with orthogonal columns, by one-sided Jacobi rotations (Hestenes 1958). W, on entry A, and V are by columns.
inline void orthogonalize(int64_t n, double* w, double* v) {
  constexpr int64_t most = 40;  // sweeps; about eight are usual
  const double small = std::sqrt(static_cast<double>(n)) * DBL_EPSILON;
  std::fill(v, v + n * n, 0.0);
  for (int64_t j = 0; j < n; ++j) v[j * n + j] = 1.0;
  bool rotated = true;
  for (int64_t sweep = 0; rotated && sweep < most; ++sweep) {
    rotated = false;
    for (int64_t p = 0; p < n; ++p) {
      for (int64_t q = p + 1; q < n; ++q) {
        double *a = w + p * n, *b = w + q * n, *x = v + p * n, *y = v + q * n;
        double aa = 0.0, bb = 0.0, ab = 0.0;
        for (int64_t i = 0; i < n; ++i) {
          aa += a[i] * a[i];
          bb += b[i] * b[i];
          ab += a[i] * b[i];
        }
        if (!(std::fabs(ab) > small * std::sqrt(aa) * std::sqrt(bb))) continue;
        const double ratio = (bb - aa) / (2.0 * ab);
        const double t = (ratio < 0.0 ? -1.0 : 1.0) / (std::fabs(ratio) + std::sqrt(1.0 + ratio * ratio));
        if (std::fabs(t) < DBL_MIN || aa == 0.0 || bb == 0.0) continue;  // columns of which one counts as 0
        rotated = true;
        const double c = 1.0 / std::sqrt(1.0 + t * t), s = c * t;
        for (int64_t i = 0; i < n; ++i) {
          const double ai = a[i], xi = x[i];
          a[i] = c * ai - s * b[i];
          b[i] = s * ai + c * b[i];
          x[i] = c * xi - s * y[i];
          y[i] = s * xi + c * y[i];
        }
      }
    }
  }
}

// s a / (s^2 + mu), 0 where s is 0 up to rounding.
inline void filter(const double* values, const double* along, double mu, int64_t n, double* y) {
  for (int64_t i = 0; i < n; ++i) {
    y[i] = values[i] > constants::TRUST_RANK ? along[i] / (values[i] + mu / values[i]) : 0.0;
  }
}

// y = s a / (s^2 + mu) with the mu >= 0 for which it is as long as the radius up to a tenth.
inline void filter_to_radius(const double* values, const double* along, double radius, int64_t n, double* y) {
  double mu = 0.0;
  for (int64_t k = 0; k <= constants::TRUST_SECULAR_STEPS; ++k) {
    filter(values, along, mu, n, y);
    const double length = vector_norm(y, n);
    if (k == constants::TRUST_SECULAR_STEPS || !(length > (1.0 + constants::TRUST_SLACK) * radius)) return;
    if (k == 0) {
      for (int64_t i = 0; i < n; ++i) mu = std::max(mu, values[i] * (std::fabs(along[i]) / radius - values[i]));
      continue;
    }
    double share = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      if (y[i] != 0.0) share += (y[i] / length) * (y[i] / length) / (values[i] * values[i] + mu);
    }
    mu += (length - radius) / (radius * share);
  }
}

// y = argmin ||g - A y|| over ||y|| <= r, up to a tenth of r.
inline void restricted_solve(const double* matrix, const double* g, double radius, int64_t n, double* y) {
  double w[TRUST_ENTRIES * TRUST_ENTRIES], v[TRUST_ENTRIES * TRUST_ENTRIES];
  double values[TRUST_ENTRIES], along[TRUST_ENTRIES], step[TRUST_ENTRIES];
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) w[j * n + i] = matrix[i * n + j];
  }
  orthogonalize(n, w, v);
  double largest = 0.0;
  for (int64_t j = 0; j < n; ++j) {
    values[j] = vector_norm(w + j * n, n);
    largest = std::max(largest, values[j]);
  }
  for (int64_t j = 0; j < n; ++j) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) sum += w[j * n + i] * g[i];
    along[j] = values[j] > 0.0 ? sum / values[j] : 0.0;
    values[j] /= largest;
  }
  filter_to_radius(values, along, radius * largest, n, step);
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0.0;
    for (int64_t j = 0; j < n; ++j) sum += v[j * n + i] * step[j];
    y[i] = sum / largest;
  }
}

}  // namespace
}  // namespace pydeq
