// Extends the least-squares problem of a GMRES cycle (shared/krylov.h) by a warp: lane j % 32 has entry j of every
// vector.
#pragma once

#include "cuda/simt.cuh"
#include "shared/krylov.h"

namespace pydeq {

// sum u[i] v[i]; each lane reads only its own entries.
PYDEQ_DEVICE double warp_dot(const double* u, const double* v, int64_t n) {
  double total[1] = {0.0};
  PYDEQ_ROLL_LOOP for (int64_t i = lane_index(); i < n; i += kWarp) total[0] += u[i] * v[i];
  warp_sum(total);
  return total[0];
}

// out = G u. G is symmetric to the last bit: neighbouring lanes read neighbouring entries of its rows.
PYDEQ_DEVICE void warp_apply_gram(const Cycle& cycle, const double* u, double* out) {
  warp_sync();  // u is written
  PYDEQ_ROLL_LOOP for (int64_t i = lane_index(); i < cycle.n; i += kWarp) {
    double total = 0.0;
    for (int64_t j = 0; j < cycle.n; ++j) total += cycle.gram[j * cycle.stride + i] * u[j];
    out[i] = total;
  }
  warp_sync();  // u may be written again
}

// ||u|| in G's inner product, u with one more entry along a unit vector if that is given; work: [n].
PYDEQ_DEVICE double warp_gram_norm(const Cycle& cycle, const double* u, double along, double* work) {
  warp_apply_gram(cycle, u, work);
  const double squared = warp_dot(u, work, cycle.n) + along * along;
  return sqrt(squared < 0.0 ? 0.0 : squared);
}

// c[i] = <e_i, u> for i < count, where product = G u; all may read c.
PYDEQ_DEVICE void warp_image_products(const Cycle& cycle, int64_t count, const double* product, double* c) {
  PYDEQ_ROLL_LOOP for (int64_t i = lane_index(); i < count; i += kWarp) {
    double total = 0.0;
    for (int64_t j = 0; j < cycle.n; ++j) total += cycle.images[i * cycle.stride + j] * product[j];
    c[i] = total;
  }
  warp_sync();
}

// u += sign sum_{i < count} c[i] rows[i]
PYDEQ_DEVICE void warp_combine(const Cycle& cycle, const double* rows, int64_t count, double sign, const double* c,
                               double* u) {
  PYDEQ_ROLL_LOOP for (int64_t j = lane_index(); j < cycle.n; j += kWarp) {
    double total = 0.0;
    for (int64_t i = 0; i < count; ++i) total += c[i] * rows[i * cycle.stride + j];
    u[j] += sign * total;
  }
}

// extend of cpu/krylov.h, called by a whole warp. All memory belongs to the warp; work: [extension_size(n)].
PYDEQ_DEVICE Extension warp_extend(const Cycle& cycle, const double* products, double ratio, double eps, double* work,
                                   double& known_before) {
  const int64_t n = cycle.n, s = cycle.stride, newest = n - 1;
  const int lane = lane_index();
  const double negligible = static_cast<double>(constants::BREAKDOWN_EPSILONS) * eps;
  Extension out;
  out.h = work;
  out.image = work + (n + 1);
  out.direction = work + 2 * (n + 1);
  out.x = work + 3 * (n + 1);
  out.rho = work + 4 * (n + 1);
  double *product = work + 5 * (n + 1), *c = work + 6 * (n + 1);

  PYDEQ_ROLL_LOOP for (int64_t i = lane; i < n; i += kWarp) out.h[i] = products[i] / cycle.gram[i * s + i];
  for (int pass = 0; pass < 2; ++pass) {
    warp_apply_gram(cycle, out.h, product);
    PYDEQ_ROLL_LOOP for (int64_t i = lane; i < n; i += kWarp) out.h[i] +=
        (products[i] - product[i]) / cycle.gram[i * s + i];
  }
  const double left = 1.0 - warp_dot(out.h, products, n);
  out.remainder = left > negligible ? sqrt(left) : 0.0;

  double *e = out.image, *p = out.direction;
  PYDEQ_ROLL_LOOP for (int64_t i = lane; i < n; i += kWarp) {
    out.x[i] = cycle.x[i];
    out.rho[i] = cycle.rho[i];
    e[i] = cycle.rho[i] - ratio * out.h[i];
    p[i] = cycle.point[i] - cycle.x[i];
  }
  double e_last = -(ratio * out.remainder), rho_last = 0.0;  // along the vector that is new; all lanes know them
  known_before = warp_gram_norm(cycle, out.rho, 0.0, product);
  const double scale = known_before + ratio;
  out.gain = warp_gram_norm(cycle, p, 0.0, product);
  out.gain /= warp_gram_norm(cycle, e, e_last, product);
  for (int pass = 0; pass < 2; ++pass) {
    warp_apply_gram(cycle, e, product);
    warp_image_products(cycle, newest, product, c);
    warp_combine(cycle, cycle.images, newest, -1.0, c, e);
    warp_combine(cycle, cycle.directions, newest, -1.0, c, p);
  }
  const double length = warp_gram_norm(cycle, e, e_last, product);
  out.usable = length > negligible * scale;
  if (out.usable) {
    e_last /= length;
    PYDEQ_ROLL_LOOP for (int64_t i = lane; i < n; i += kWarp) {
      e[i] /= length;
      p[i] /= length;
    }
    warp_apply_gram(cycle, out.rho, product);
    warp_image_products(cycle, newest, product, c);
    warp_combine(cycle, cycle.images, newest, -1.0, c, out.rho);
    warp_combine(cycle, cycle.directions, newest, 1.0, c, out.x);
    warp_apply_gram(cycle, out.rho, product);
    const double along = warp_dot(e, product, n);
    PYDEQ_ROLL_LOOP for (int64_t i = lane; i < n; i += kWarp) {
      out.rho[i] -= along * e[i];
      out.x[i] += along * p[i];
    }
    rho_last -= along * e_last;
  }
  out.known = warp_gram_norm(cycle, out.rho, rho_last, product);
  bool odd = !finite(rho_last);
  PYDEQ_ROLL_LOOP for (int64_t i = lane; i < n; i += kWarp) odd =
      odd || !finite(out.h[i]) || !finite(out.x[i]) || !finite(out.rho[i]);
  out.sound = !warp_any(odd);
  if (lane == 0) {
    e[n] = e_last;
    out.rho[n] = rho_last;
  }
  warp_sync();
  return out;
}

}  // namespace pydeq
