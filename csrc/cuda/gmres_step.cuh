// products[i] = <V_i, g> / ||g||                                     h, x, r, the next point: from coordinates in V
// V_n[b,d]    = (g[b,d] / ||g|| - sum_i h[i] V_i[b,d]) / ||g / ||g|| - V h||
// next[b,d]   = start[b,d] + beta (sum_{i<n} point[i] V_i[b,d] + point[n] V_n[b,d])
//                  z, f, next, start and each V_i: [B, D]   gram = V^T V: [B, K, K]   x, r, point: [B, K], in V
//
// Threads as in cuda/step.cuh. One launch where rows that are read twice fit shared memory: a block, or a cluster of up
// to 8, per sample. Else two launches: a block per tile of 1024 entries. Neighbouring threads read neighbouring 16
// bytes. A warp solves the least-squares problem (cuda/krylov.cuh).
// With n vectors in the basis: reads z, f, V_0..V_{n-1} and start; in two launches z, f and V_0..V_{n-1} again, and
// rows that do not fit shared memory a third time, for the new row of the Gram matrix. Writes V_n, next, and the image
// of an improved iterate; at the beginning of a cycle also start.
#pragma once

#include "cuda/krylov.cuh"
#include "cuda/step.cuh"
#include "shared/gmres_step.h"

namespace pydeq {

template <class T>
struct GmresStep {
  using Type = T;
  using A = Compute<T>;
  static constexpr int kResident = sizeof(A) == 8 ? kMaxThreads : 384;
  static constexpr int kPack = 16 / sizeof(A);
  static constexpr int kTileThreads = 128;
  static constexpr int kGroup = sizeof(A) == 8 ? 2 : 4;  // vectors under way at once
  using Args = Listing<GmresStepArgs>;                   // the base's `basis` is not read
  using Tile = pydeq::Tile<kPack>;
  using Stage = pydeq::Stage<kPack, A>;
  enum class Kind { plain, begin, extend, close };
  struct Plan {
    Verdict verdict;
    bool active;
    Kind kind;
    int n;           // basis vectors before this step
    double inverse;  // 1 / ||g||
    double inverse_remainder;
    double beta;
  };

  static PYDEQ_HOST_DEVICE const StepArgs& common(const Args& args) { return args.step; }
  // ||f - z||^2 and ||f||^2, ||g||^2, then <V_i, g>.
  static int64_t sums(const Args& args) { return args.step.rules.last ? 2 : 3 + args.stored; }
  // The new row of the Gram matrix.
  static int64_t products(const Args& args) { return args.step.rules.last ? 0 : args.stored; }
  // The point, then h and the rest of an extension.
  static int64_t coefficients(const Args& args) { return args.stored + 1 + extension_size(args.stored); }
  static int64_t kept(const Args& args) { return 2 * (args.stored + 1); }
  // About how many vectors a step reads and writes.
  static int64_t vectors(const Args& args, bool fused) {
    const int64_t basis = args.step.step < args.restart ? args.step.step : args.restart;
    return fused ? basis + 6 : 2 * basis + 8;
  }
  // In one launch the iterate, f, V_0, V_1, ...; else only the vectors.
  static int64_t stage_rows(const Args& args, bool fused) {
    return args.step.rules.last ? 0 : fused ? 2 + args.stored : args.stored;
  }
  static PYDEQ_HOST_DEVICE int64_t stage_row_bytes(int64_t tiles, int64_t threads) {
    return Stage::row_bytes(tiles, threads);
  }

  const Args& args;
  const DeviceRows<T> row;
  const int64_t offset;  // of the sample's rows
  A *iterate, *start;    // [D]; iterate is null unless states are halves
  const int64_t b;
  const int count;  // basis vectors before this step, in the first pass

  PYDEQ_DEVICE GmresStep(const Args& a, int64_t sample)
      : args(a),
        row(a.step, sample),
        offset(sample * a.step.state),
        iterate(is_half<T> ? static_cast<A*>(a.iterate) + offset : nullptr),
        start(static_cast<A*>(a.start) + offset),
        b(sample),
        count(row.counters[constants::COUNTER_COUNT]) {}

  PYDEQ_DEVICE A* vector(int i) const { return static_cast<A*>(args.rows[i]) + offset; }
  PYDEQ_DEVICE double* matrix(double* all) const { return all + b * args.capacity * args.capacity; }
  PYDEQ_DEVICE double* coordinates(int64_t which) const {
    return args.coordinates + (b * constants::COORDINATE_SIZE + which) * args.capacity;
  }
  // The place of the staged vector i.
  static PYDEQ_DEVICE int staged_row(int i, bool fused) { return i + (fused ? 2 : 0); }

  // The iterate before rounding.
  PYDEQ_DEVICE void load_position(const Tile& tile, A (&position)[kShare]) const {
    if constexpr (is_half<T>) {
      load_share(iterate, tile, position);
    } else {
      load_share(row.z, tile, position);
    }
  }

  template <class Sum, bool first>
  PYDEQ_DEVICE void reduce(const Tile& tile, const Sums& sums, const Stage& stage) const {
    Share<T> stored_z, stored_f;
    load_share(row.z, tile, stored_z);
    load_share(row.f, tile, stored_f);
    A position[kShare], f[kShare], g[kShare], iterated[kShare];
    const bool keep = !args.step.rules.last;
    if (is_half<T> && keep) load_share(iterate, tile, iterated);
    widen_share<T>(stored_z, position);
    widen_share<T>(stored_f, f);
    PYDEQ_UNROLL_LOOP for (int i = 0; i < kShare; ++i) g[i] = f[i] - position[i];
    Sum squares[2] = {dot_share<Sum>(g, g), dot_share<Sum>(f, f)};
    sums.add(0, squares);
    if (!keep) return;
    if constexpr (is_half<T>) {
      PYDEQ_UNROLL_LOOP for (int i = 0; i < kShare; ++i) {
        position[i] = iterated[i];
        g[i] = f[i] - position[i];
      }
      Sum square[1] = {dot_share<Sum>(g, g)};
      sums.add(2, square);
    }
    if (first) {
      stage.put(0, tile, position);
      stage.put(1, tile, f);
    }
    for (int j = 0; j < count; j += kGroup) {
      A v[kGroup][kShare];
      Sum products[kGroup];
      PYDEQ_UNROLL_LOOP for (int i = 0; i < kGroup; ++i) {
        if (j + i < count) load_share(vector(j + i), tile, v[i]);
      }
      PYDEQ_UNROLL_LOOP for (int i = 0; i < kGroup; ++i) {
        products[i] = 0;
        if (j + i >= count) continue;
        if (first) stage.put(staged_row(j + i, true), tile, v[i]);
        products[i] = dot_share<Sum>(v[i], g);
      }
      sums.add(3 + j, products, count - j);
    }
  }

  PYDEQ_DEVICE void decide(const double* totals, double residual, double norm, bool, Plan& plan, double* point) const {
    using namespace constants;
    int32_t* counters = row.counters;
    if (lane_index() == 0) {
      plan.verdict = judge(residual, norm, row.scalars, counters, args.step.rules);
      if (plan.verdict.retry) counters[COUNTER_COUNT] = 0;
    }
    warp_sync();
    if (!plan.verdict.proceed) return;

    const double size = is_half<T> ? sqrt(totals[2]) : residual;
    if (count > 0 && continue_cycle(size, totals + 3, plan, point)) return;
    if (lane_index() != 0) return;
    const double inverse = 1.0 / size;
    const bool normal = size > 0.0 && finite(static_cast<double>(static_cast<A>(inverse)));
    plan.kind = normal ? Kind::begin : Kind::plain;
    plan.n = 0;
    plan.inverse = inverse;
    counters[COUNTER_COUNT] = normal;
    // A retry would take the same plain step from a new best.
    if (plan.verdict.improved) counters[COUNTER_TRIED] = 1;
    if (normal) {
      args.lengths[b] = size;
      coordinates(COORDINATE_MINIMUM)[0] = 0.0;
      coordinates(COORDINATE_RESIDUAL)[0] = coordinates(COORDINATE_POINT)[0] = 1.0;
    }
  }

  // Adds g to the least-squares problem and chooses the next point. Returns false if a number is not finite.
  PYDEQ_DEVICE bool continue_cycle(double size, const double* t, Plan& plan, double* point) const {
    using namespace constants;
    const int64_t n = count, K = args.capacity;
    const int lane = lane_index();
    const double beta = args.lengths[b], ratio = size / beta, unit = size > 0.0 ? size : 1.0;
    double* products = point;  // until there is a point
    PYDEQ_ROLL_LOOP for (int64_t i = lane; i < n; i += kWarp) products[i] = t[i] / unit;
    const Cycle cycle{n,
                      K,
                      matrix(args.gram),
                      matrix(args.images),
                      matrix(args.directions),
                      coordinates(COORDINATE_MINIMUM),
                      coordinates(COORDINATE_RESIDUAL),
                      coordinates(COORDINATE_POINT)};
    double before = 0.0;
    const Extension add = warp_extend(cycle, products, ratio, epsilon<A>, point + args.stored + 1, before);
    if (!add.sound) return false;

    const double target = closing_residual(row.scalars, args.step.rules, epsilon<T>);
    const bool closes = add.known <= target / beta || add.remainder == 0.0 || !add.usable || n == args.restart ||
                        (ratio > before && args.penultimate);
    if (lane == 0) {
      plan.kind = closes ? Kind::close : Kind::extend;
      plan.n = count;
      plan.inverse = 1.0 / unit;
      plan.inverse_remainder = 1.0 / add.remainder;
      plan.beta = beta;
      row.counters[COUNTER_COUNT] = closes ? 0 : count + 1;
      if (closes) row.counters[COUNTER_FAR] = 0;  // the solution is evaluated next
    }
    if (closes) {
      PYDEQ_ROLL_LOOP for (int64_t i = lane; i < n; i += kWarp) point[i] = add.x[i];
      return true;
    }
    PYDEQ_ROLL_LOOP for (int64_t i = lane; i < n - 1; i += kWarp) cycle.images[i * K + n] =
        cycle.directions[i * K + n] = 0.0;
    PYDEQ_ROLL_LOOP for (int64_t i = lane; i <= n; i += kWarp) {
      const bool old = i < n;
      point[i] = old ? add.x[i] + add.gain * add.rho[i] : add.gain * newest_share(add.rho[n], add.known);
      cycle.images[(n - 1) * K + i] = add.image[i];
      cycle.directions[(n - 1) * K + i] = old ? add.direction[i] : 0.0;
      cycle.x[i] = old ? add.x[i] : 0.0;
      cycle.rho[i] = add.rho[i];
      cycle.point[i] = point[i];
    }
    return true;
  }

  PYDEQ_DEVICE void apply(const Tile& tile, const Plan& plan, const double* point, const Sums& sums, const Stage& stage,
                          bool staged) const {
    settle<kPack, T>(row, plan.verdict, nullptr, 1.0, tile);
    if (is_half<T> && plan.verdict.retry) {
      A next[kShare];
      load_wide(row.next, tile, next);
      store_share(iterate, tile, next);
    }
    if (!plan.verdict.proceed) return;

    const bool closes = plan.kind == Kind::close, extends = plan.kind == Kind::extend;
    A v[kShare], y[kShare], f[kShare], position[kShare];
    if (staged && stage.holds(1)) {
      stage.get(0, tile, position);
      stage.get(1, tile, f);
    } else {
      Share<T> stored_f;
      const bool needs_f = !closes || saves_image(plan.verdict);
      if (needs_f) load_share(row.f, tile, stored_f);
      if (!closes) load_position(tile, position);
      if (needs_f) widen_share<T>(stored_f, f);
    }
    if (!closes) {
      const A inverse = A(plan.inverse);
      PYDEQ_UNROLL_LOOP for (int i = 0; i < kShare; ++i) v[i] = inverse * (f[i] - position[i]);
    }
    if (!closes && !extends) {
      if (saves_image(plan.verdict)) store_wide(row.image, tile, f);
      store_share(start, tile, position);
      store_wide(row.next, tile, f);
      if constexpr (is_half<T>) store_share(iterate, tile, f);
      if (plan.kind == Kind::begin) {
        store_share(vector(0), tile, v);
        A product[1] = {dot_share<A>(v, v)};
        sums.add(0, product);
      }
      return;
    }

    const double* h = point + args.stored + 1;
    PYDEQ_UNROLL_LOOP for (int i = 0; i < kShare; ++i) y[i] = 0;
    for (int j = 0; j < plan.n; j += kGroup) {
      A older[kGroup][kShare];
      load_vectors(j, plan.n, tile, stage, staged, staged, older);
      PYDEQ_UNROLL_LOOP for (int i = 0; i < kGroup; ++i) {
        if (j + i >= plan.n) continue;
        if (!staged && extends) stage.put(staged_row(j + i, false), tile, older[i]);
        const A to_y = A(point[j + i]);
        PYDEQ_UNROLL_LOOP for (int e = 0; e < kShare; ++e) y[e] += to_y * older[i][e];
        if (!extends) continue;
        const A to_v = A(-h[j + i]);
        PYDEQ_UNROLL_LOOP for (int e = 0; e < kShare; ++e) v[e] += to_v * older[i][e];
      }
    }
    if (extends) {
      const A by_remainder = A(plan.inverse_remainder), newest = A(point[plan.n]);
      PYDEQ_UNROLL_LOOP for (int i = 0; i < kShare; ++i) {
        v[i] *= by_remainder;
        y[i] += newest * v[i];
      }
    }
    load_share(start, tile, position);
    const A beta = A(plan.beta);
    PYDEQ_UNROLL_LOOP for (int i = 0; i < kShare; ++i) position[i] += beta * y[i];

    // Stores come last, since no load is moved above one.
    if (saves_image(plan.verdict)) store_wide(row.image, tile, f);
    if constexpr (is_half<T>) store_share(iterate, tile, position);
    store_wide(row.next, tile, position);
    if (!extends) return;
    store_share(vector(plan.n), tile, v);
    for (int j = 0; j < plan.n; j += kGroup) {
      A older[kGroup][kShare], products[kGroup];
      load_vectors(j, plan.n, tile, stage, true, staged, older);
      PYDEQ_UNROLL_LOOP for (int i = 0; i < kGroup; ++i) {
        products[i] = j + i < plan.n ? dot_share<A>(older[i], v) : A(0);
      }
      sums.add(j, products, plan.n - j);
    }
    A product[1] = {dot_share<A>(v, v)};
    sums.add(plan.n, product);
  }

  // Vectors j, j + 1, ... of a group, below `end`; from shared memory as far as they are there.
  PYDEQ_DEVICE void load_vectors(int j, int end, const Tile& tile, const Stage& stage, bool filled, bool fused,
                                 A (&v)[kGroup][kShare]) const {
    PYDEQ_UNROLL_LOOP for (int i = 0; i < kGroup; ++i) {
      if (j + i >= end) continue;
      if (filled && stage.holds(staged_row(j + i, fused))) {
        stage.get(staged_row(j + i, fused), tile, v[i]);
      } else {
        load_share(vector(j + i), tile, v[i]);
      }
    }
  }

  PYDEQ_DEVICE void close(const Plan& plan, const double* products) const {
    if (!plan.verdict.proceed || (plan.kind != Kind::begin && plan.kind != Kind::extend)) return;
    const int64_t newest = plan.n, K = args.capacity;
    double* gram = matrix(args.gram);
    PYDEQ_ROLL_LOOP for (int64_t i = lane_index(); i <= newest; i += kWarp) {
      gram[newest * K + i] = products[i];
      if (i < newest) gram[i * K + newest] = products[i];
    }
  }
};

}  // namespace pydeq
