// Extends the least-squares problem of a GMRES cycle (shared/krylov.h) by one thread: O(n^2) operations for n vectors.
#pragma once

#include "shared/krylov.h"

namespace pydeq {
namespace {

// sum u[i] v[i], in an order that no instruction set changes.
inline double coordinate_dot(const double* u, const double* v, int64_t n) {
  constexpr int64_t kParts = 8;
  double part[kParts] = {};
  int64_t i = 0;
  for (; i + kParts <= n; i += kParts) {
    for (int64_t k = 0; k < kParts; ++k) part[k] += u[i + k] * v[i + k];
  }
  for (int64_t k = 0; i + k < n; ++k) part[k] += u[i + k] * v[i + k];
  return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

// u += sign sum_{i < count} c[i] rows[i], with rows of n entries.
inline void add_rows(const double* rows, int64_t stride, int64_t count, double sign, const double* c, double* u,
                     int64_t n) {
  for (int64_t i = 0; i < count; ++i) {
    const double by = sign * c[i];
    const double* row = rows + i * stride;
    for (int64_t j = 0; j < n; ++j) u[j] += by * row[j];
  }
}

// out = G u. G is symmetric to the last bit, so its rows are its columns.
inline void apply_gram(const Cycle& cycle, const double* u, double* out) {
  for (int64_t i = 0; i < cycle.n; ++i) out[i] = 0.0;
  add_rows(cycle.gram, cycle.stride, cycle.n, 1.0, u, out, cycle.n);
}

// ||u|| in G's inner product, u with one more entry along a unit vector if that is given; work: [n].
inline double gram_norm(const Cycle& cycle, const double* u, double along, double* work) {
  apply_gram(cycle, u, work);
  const double squared = coordinate_dot(u, work, cycle.n) + along * along;
  return __builtin_sqrt(squared < 0.0 ? 0.0 : squared);
}

// c[i] = <e_i, u> for i < count, where product = G u.
inline void image_products(const Cycle& cycle, int64_t count, const double* product, double* c) {
  for (int64_t i = 0; i < count; ++i) c[i] = coordinate_dot(cycle.images + i * cycle.stride, product, cycle.n);
}

// Adds a measured residual g to the cycle. products: V^T g / ||g||, [n]. ratio: ||g|| over the cycle's first residual.
// eps: of the dtype that products are computed in. work: [extension_size(n)], which the result points into.
// known_before receives the previous ||r|| of the cycle. The images are orthonormal up to rounding, so all of them are
// projected out at once, twice.
inline Extension extend(const Cycle& cycle, const double* products, double ratio, double eps, double* work,
                        double& known_before) {
  const int64_t n = cycle.n, s = cycle.stride, newest = n - 1;
  const double negligible = static_cast<double>(constants::BREAKDOWN_EPSILONS) * eps;
  Extension out;
  out.h = work;
  out.image = work + (n + 1);
  out.direction = work + 2 * (n + 1);
  out.x = work + 3 * (n + 1);
  out.rho = work + 4 * (n + 1);
  double *product = work + 5 * (n + 1), *c = work + 6 * (n + 1);

  for (int64_t i = 0; i < n; ++i) out.h[i] = products[i] / cycle.gram[i * s + i];
  for (int pass = 0; pass < 2; ++pass) {  // G is nearly the identity: the error is squared, then cubed
    apply_gram(cycle, out.h, product);
    for (int64_t i = 0; i < n; ++i) out.h[i] += (products[i] - product[i]) / cycle.gram[i * s + i];
  }
  const double left = 1.0 - coordinate_dot(out.h, products, n);
  out.remainder = left > negligible ? __builtin_sqrt(left) : 0.0;

  double *e = out.image, *p = out.direction;
  for (int64_t i = 0; i < n; ++i) {
    out.x[i] = cycle.x[i];
    out.rho[i] = cycle.rho[i];
    e[i] = cycle.rho[i] - ratio * out.h[i];
    p[i] = cycle.point[i] - cycle.x[i];
  }
  out.rho[n] = 0.0;
  e[n] = -(ratio * out.remainder);
  known_before = gram_norm(cycle, out.rho, 0.0, product);
  const double scale = known_before + ratio;
  out.gain = gram_norm(cycle, p, 0.0, product);
  out.gain /= gram_norm(cycle, e, e[n], product);
  for (int pass = 0; pass < 2; ++pass) {
    apply_gram(cycle, e, product);
    image_products(cycle, newest, product, c);
    add_rows(cycle.images, s, newest, -1.0, c, e, n);
    add_rows(cycle.directions, s, newest, -1.0, c, p, n);
  }
  const double length = gram_norm(cycle, e, e[n], product);
  out.usable = length > negligible * scale;
  if (out.usable) {
    for (int64_t i = 0; i <= n; ++i) e[i] /= length;
    for (int64_t i = 0; i < n; ++i) p[i] /= length;
    apply_gram(cycle, out.rho, product);
    image_products(cycle, newest, product, c);
    add_rows(cycle.images, s, newest, -1.0, c, out.rho, n);
    add_rows(cycle.directions, s, newest, 1.0, c, out.x, n);
    apply_gram(cycle, out.rho, product);
    const double along = coordinate_dot(e, product, n);
    for (int64_t i = 0; i < n; ++i) {
      out.rho[i] -= along * e[i];
      out.x[i] += along * p[i];
    }
    out.rho[n] -= along * e[n];
  }
  out.known = gram_norm(cycle, out.rho, out.rho[n], product);
  out.sound = finite(out.rho[n]);
  for (int64_t i = 0; i < n; ++i) out.sound = out.sound && finite(out.h[i]) && finite(out.x[i]) && finite(out.rho[i]);
  return out;
}

}  // namespace
}  // namespace pydeq
