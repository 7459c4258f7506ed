// The least-squares problem of one sample's GMRES cycle, by coordinates in its basis, in double.
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

constexpr int64_t extension_size(int64_t n) { return 6 * (n + 1); }

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

// out = G u, G with a last row and column of the identity where size is n + 1.
PYDEQ_HOST_DEVICE inline void apply_gram(const Cycle& cycle, int64_t size, const double* u, double* out) {
  for (int64_t i = 0; i < cycle.n; ++i) {
    double total = 0.0;
    for (int64_t j = 0; j < cycle.n; ++j) total += cycle.gram[i * cycle.stride + j] * u[j];
    out[i] = total;
  }
  if (size > cycle.n) out[cycle.n] = u[cycle.n];
}

PYDEQ_HOST_DEVICE inline double plain_dot(const double* u, const double* v, int64_t n) {
  double total = 0.0;
  for (int64_t i = 0; i < n; ++i) total += u[i] * v[i];
  return total;
}

// ||u|| in G's inner product; work: [size].
PYDEQ_HOST_DEVICE inline double gram_norm(const Cycle& cycle, int64_t size, const double* u, double* work) {
  apply_gram(cycle, size, u, work);
  const double squared = plain_dot(u, work, size);
  return __builtin_sqrt(squared < 0.0 ? 0.0 : squared);
}

// products: V^T g / ||g||, [n]. ratio: ||g|| over the cycle's first residual. eps: of the dtype that products are
// computed in. work: [extension_size(n)], which the result points into.
PYDEQ_HOST_DEVICE inline Extension extend(const Cycle& cycle, const double* products, double ratio, double eps,
                                          double* work) {
  const int64_t n = cycle.n, s = cycle.stride;
  const double negligible = static_cast<double>(constants::BREAKDOWN_EPSILONS) * eps;
  Extension out;
  out.h = work;
  out.image = work + (n + 1);
  out.direction = work + 2 * (n + 1);
  out.x = work + 3 * (n + 1);
  out.rho = work + 4 * (n + 1);
  double* product = work + 5 * (n + 1);

  for (int64_t i = 0; i < n; ++i) out.h[i] = products[i] / cycle.gram[i * s + i];
  for (int pass = 0; pass < 2; ++pass) {  // G is nearly the identity: the error is squared, then cubed
    apply_gram(cycle, n, out.h, product);
    for (int64_t i = 0; i < n; ++i) out.h[i] += (products[i] - product[i]) / cycle.gram[i * s + i];
  }
  const double left = 1.0 - plain_dot(out.h, products, n);
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
  const double scale = gram_norm(cycle, n, cycle.rho, product) + ratio;
  out.gain = gram_norm(cycle, n, p, product);
  out.gain /= gram_norm(cycle, n + 1, e, product);
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t i = 0; i < n - 1; ++i) {
      apply_gram(cycle, n, e, product);
      const double c = plain_dot(cycle.images + i * s, product, n);
      for (int64_t j = 0; j < n; ++j) e[j] -= c * cycle.images[i * s + j];
      for (int64_t j = 0; j < n; ++j) p[j] -= c * cycle.directions[i * s + j];
    }
  }
  const double length = gram_norm(cycle, n + 1, e, product);
  out.usable = length > negligible * scale;
  if (out.usable) {
    for (int64_t i = 0; i <= n; ++i) e[i] /= length;
    for (int64_t i = 0; i < n; ++i) p[i] /= length;
    for (int64_t i = 0; i < n; ++i) {
      const bool newest = i == n - 1;
      const double *image = newest ? e : cycle.images + i * s, *way = newest ? p : cycle.directions + i * s;
      apply_gram(cycle, n + 1, out.rho, product);
      const double c = plain_dot(image, product, newest ? n + 1 : n);
      for (int64_t j = 0; j < (newest ? n + 1 : n); ++j) out.rho[j] -= c * image[j];
      for (int64_t j = 0; j < n; ++j) out.x[j] += c * way[j];
    }
  }
  out.known = gram_norm(cycle, n + 1, out.rho, product);
  out.sound = true;
  for (int64_t i = 0; i < n; ++i) out.sound = out.sound && finite(out.h[i]) && finite(out.x[i]) && finite(out.rho[i]);
  out.sound = out.sound && finite(out.rho[n]);
  return out;
}

}  // namespace
}  // namespace pydeq
