// c[j]      = theta[j] (<s_j, g> + sum_{i<j} c[i] <s_j, u_i>) / ||s_j||^2
// s_{k+1}   = (g + sum_{j<k} c[j] u_j) / (1 - theta[k] a),   a as c[k] without theta
// next[b,d] = z[b,d] + s_{k+1}[b,d]
//                                    z, f, next and each s_j: [B, D]   gram = S^T S: [B, K, K]   thetas: [B, K]
//
// u_j is s_{j+1}, except u_0 after a restart, which is stored.
//
// Threads as in cuda/step.cuh. One launch where rows that are read twice fit shared memory: a block, or a cluster of up
// to 8, per sample. Else two launches: a block per tile of 1024 entries. Neighbouring threads read neighbouring 16
// bytes. A warp solves for c, a row of the triangle to each lane.
// With k + 1 steps stored: reads z, f and s_0..s_k; in two launches z, f and s_1..s_k again, and rows that do not fit
// shared memory a third time, for the new row of the Gram matrix. Writes the new step, next, and the image of an
// improved iterate.
#pragma once

#include "cuda/step.cuh"
#include "shared/broyden_step.h"

namespace pydeq {

template <class T>
struct BroydenStep {
  using Type = T;
  using A = Compute<T>;
  static constexpr int kResident = sizeof(A) == 8 ? kMaxThreads : 384;
  static constexpr int kPack = 16 / sizeof(A);
  static constexpr int kTileThreads = 128;
  static constexpr int kGroup = sizeof(A) == 8 ? 2 : 4;  // steps under way at once
  using Args = Listing<BroydenStepArgs>;                 // the base's `steps` is not read
  using Tile = pydeq::Tile<kPack>;
  using Stage = pydeq::Stage<kPack, A>;
  enum class Kind { first, next, restart };
  struct Plan {
    Verdict verdict;
    bool active;
    bool restarted;  // factor 0 is the explicit one
    bool wide;       // sums of float products overflowed or underflowed: compute them in double
    Kind kind;
    int slot;       // of the new step
    double scale;   // next: 1 / (1 - theta a); restart: u_0 = scale (s + y)
    double weight;  // restart: <s, g> / ||s||^2
  };

  static PYDEQ_HOST_DEVICE const StepArgs& common(const Args& args) { return args.step; }
  // ||g||^2 and ||f||^2, <s, g_previous> before a restart, then <s_j, g>.
  static int64_t sums(const Args& args) { return args.step.rules.last ? 2 : 3 + args.stored; }
  // The new row of the Gram matrix.
  static int64_t products(const Args& args) { return args.step.rules.last ? 0 : args.stored; }
  static int64_t coefficients(const Args& args) { return args.stored; }
  static int64_t kept(const Args& args) { return args.stored; }
  // About how many vectors a step reads and writes.
  static int64_t vectors(const Args& args, bool fused) {
    const int64_t steps = args.step.step < args.memory ? args.step.step : args.memory;
    return fused ? steps + 5 : 2 * steps + 6;
  }
  // In one launch the iterate, f, s_1, s_2, ...; else only the steps.
  static int64_t stage_rows(const Args& args, bool fused) {
    const int64_t steps = args.stored > 1 ? args.stored - 1 : 0;
    return args.step.rules.last ? 0 : fused ? 2 + steps : steps;
  }
  static PYDEQ_HOST_DEVICE int64_t stage_row_bytes(int64_t tiles, int64_t threads) {
    return Stage::row_bytes(tiles, threads);
  }

  const Args& args;
  const DeviceRows<T> row;
  const int64_t offset;  // of the sample's rows
  A *iterate, *u0;       // [D] or null
  double *gram, *theta;  // [K, K], [K]
  const int count;       // steps stored
  const bool restarted;

  PYDEQ_DEVICE BroydenStep(const Args& a, int64_t b)
      : args(a),
        row(a.step, b),
        offset(b * a.step.state),
        iterate(is_half<T> ? static_cast<A*>(a.iterate) + offset : nullptr),
        u0(a.restart ? static_cast<A*>(a.restart) + offset : nullptr),
        gram(a.gram + b * a.capacity * a.capacity),
        theta(a.thetas + b * a.capacity),
        count(row.counters[constants::COUNTER_COUNT]),
        restarted(row.counters[constants::COUNTER_RESTARTED]) {}

  PYDEQ_DEVICE A* step_row(int j) const { return static_cast<A*>(args.rows[j]) + offset; }
  PYDEQ_DEVICE bool full() const { return count == args.memory + 1; }
  // The place of the staged step j >= 1.
  static PYDEQ_DEVICE int staged_row(int j, bool fused) { return j - 1 + (fused ? 2 : 0); }

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
    }
    if (first) {
      stage.put(0, tile, position);
      stage.put(1, tile, f);
    }
    if (full()) {
      A s[kShare];
      load_share(step_row(count - 1), tile, s);
      load_share(u0, tile, f);
      Sum product[1] = {dot_share<Sum>(s, f)};
      sums.add(2, product);
      product[0] = dot_share<Sum>(s, g);
      sums.add(3 + count - 1, product);
      return;
    }
    for (int j = 0; j < count; j += kGroup) {
      A s[kGroup][kShare];
      Sum products[kGroup];
      PYDEQ_UNROLL_LOOP for (int i = 0; i < kGroup; ++i) {
        if (j + i < count) load_share(step_row(j + i), tile, s[i]);
      }
      PYDEQ_UNROLL_LOOP for (int i = 0; i < kGroup; ++i) {
        products[i] = 0;
        if (j + i >= count) continue;
        if (first && j + i > 0) stage.put(staged_row(j + i, true), tile, s[i]);
        products[i] = dot_share<Sum>(s[i], g);
      }
      sums.add(3 + j, products, count - j);
    }
  }

  PYDEQ_DEVICE void decide(const double* totals, double residual, double norm, bool fits, Plan& plan, double* c) const {
    using namespace constants;
    int32_t* counters = row.counters;
    if (lane_index() == 0) {
      plan.verdict = judge(residual, norm, row.scalars, counters, args.step.rules);
      if (plan.verdict.retry) counters[COUNTER_COUNT] = 0;
    }
    warp_sync();
    if (!plan.verdict.proceed) return;

    const int64_t K = args.capacity;
    const int k = count - 1;
    const double* t = totals + 3;
    Kind kind = Kind::first;
    double scale = 0.0, weight = 0.0, damping = 1.0;
    int slot = 0;
    if (full()) {
      const double squared = gram[k * K + k], gamma = -(t[k] - totals[2]) / squared;
      damping = denominator_damping(gamma);
      scale = damping / (1.0 - damping + damping * gamma);
      weight = t[k] / squared;
      if (finite(scale) && finite(weight)) kind = Kind::restart, slot = 1;
      warp_sync();  // all have read the matrix
      if (lane_index() == 0) {
        gram[0] = squared;
        theta[0] = 1.0;
      }
    } else if (count > 0) {
      const double a = solve(t, c);
      damping = denominator_damping(1.0 - a);
      scale = 1.0 / (1.0 - damping * a);
      if (finite(damping * a)) kind = Kind::next, slot = count;
      if (lane_index() == 0) theta[k] = damping;
    }
    if (lane_index() != 0) return;
    // A retry would take the same plain step from a new best.
    if (kind == Kind::first && plan.verdict.improved) counters[COUNTER_TRIED] = 1;
    plan.kind = kind;
    plan.slot = slot;
    plan.scale = scale;
    plan.weight = weight;
    plan.wide = !fits && sizeof(T) < 8;
    plan.restarted = kind == Kind::next ? restarted : kind == Kind::restart;
    counters[COUNTER_COUNT] = slot + 1;
    counters[COUNTER_RESTARTED] = plan.restarted;
  }

  // c[j] for j < k; returns a. Only lane j % 32 reads and writes c[j]. Once c[i] is known, all j > i take their term.
  PYDEQ_DEVICE double solve(const double* t, double* c) const {
    const int64_t K = args.capacity;
    const int lane = lane_index();
    PYDEQ_ROLL_LOOP for (int j = lane; j < count; j += kWarp) c[j] = t[j];
    for (int i = 0;; ++i) {
      const int owner = i % kWarp;
      const double a = warp_broadcast(lane == owner ? c[i] / gram[i * K + i] : 0.0, owner);
      if (i == count - 1) return a;
      const double ci = theta[i] * a;
      if (lane == owner) c[i] = ci;
      const int column = restarted && i == 0 ? 0 : i + 1;
      const int first = i + 1 + (lane - (i + 1) % kWarp + kWarp) % kWarp;  // the first row of this lane beyond i
      PYDEQ_ROLL_LOOP for (int j = first; j < count; j += kWarp) c[j] += ci * gram[j * K + column];
    }
  }

  PYDEQ_DEVICE void apply(const Tile& tile, const Plan& plan, const double* c, const Sums& sums, const Stage& stage,
                          bool staged) const {
    settle<kPack, T>(row, plan.verdict, nullptr, 1.0, tile);
    A f[kShare], g[kShare], v[kShare], position[kShare], w[kShare];
    if (is_half<T> && plan.verdict.retry) {
      load_wide(row.next, tile, g);
      store_share(iterate, tile, g);
    }
    if (!plan.verdict.proceed) return;

    if (staged && stage.holds(1)) {
      stage.get(0, tile, position);
      stage.get(1, tile, f);
    } else {
      Share<T> stored_f;
      load_position(tile, position);
      load_share(row.f, tile, stored_f);
      widen_share<T>(stored_f, f);
    }
    PYDEQ_UNROLL_LOOP for (int i = 0; i < kShare; ++i) v[i] = g[i] = f[i] - position[i];

    if (plan.kind == Kind::restart) {
      A s[kShare];
      load_share(step_row(static_cast<int>(args.memory)), tile, s);
      load_share(u0, tile, w);
      const A scale = A(plan.scale), weight = A(plan.weight);
      PYDEQ_UNROLL_LOOP for (int i = 0; i < kShare; ++i) {
        w[i] = scale * (s[i] + (g[i] - w[i]));
        v[i] = g[i] + weight * w[i];
      }
      store_share(step_row(0), tile, s);
      store_share(u0, tile, w);
    } else if (plan.kind == Kind::next) {
      if (plan.restarted) {
        load_share(u0, tile, w);
        if (plan.slot > 1) {
          const A cj = A(c[0]);
          PYDEQ_UNROLL_LOOP for (int i = 0; i < kShare; ++i) v[i] += cj * w[i];
        }
      }
      for (int j = 1; j < plan.slot; j += kGroup) {  // u_{j-1} is s_j
        A s[kGroup][kShare];
        load_steps(j, plan.slot, tile, stage, staged, staged, s);
        PYDEQ_UNROLL_LOOP for (int i = 0; i < kGroup; ++i) {
          if (j + i >= plan.slot) continue;
          if (!staged) stage.put(staged_row(j + i, false), tile, s[i]);
          if (plan.restarted && j + i == 1) continue;
          const A cj = A(c[j + i - 1]);
          PYDEQ_UNROLL_LOOP for (int e = 0; e < kShare; ++e) v[e] += cj * s[i][e];
        }
      }
      const A scale = A(plan.scale);
      PYDEQ_UNROLL_LOOP for (int i = 0; i < kShare; ++i) v[i] *= scale;
    }

    // Stores come last, since no load is moved above one.
    if (saves_image(plan.verdict)) store_wide(row.image, tile, f);
    store_share(step_row(plan.slot), tile, v);
    PYDEQ_UNROLL_LOOP for (int i = 0; i < kShare; ++i) position[i] += v[i];
    if constexpr (is_half<T>) store_share(iterate, tile, position);
    store_wide(row.next, tile, position);
    if (plan.wide) {
      new_products<double>(tile, plan, v, w, sums, stage, staged);
    } else {
      new_products<A>(tile, plan, v, w, sums, stage, staged);
    }
    if (u0 && plan.slot == args.memory) store_share(u0, tile, g);  // the next step restarts, and needs this residual
  }

  // Steps j, j + 1, ... of a group, below `end`; from shared memory as far as they are there.
  PYDEQ_DEVICE void load_steps(int j, int end, const Tile& tile, const Stage& stage, bool filled, bool fused,
                               A (&s)[kGroup][kShare]) const {
    PYDEQ_UNROLL_LOOP for (int i = 0; i < kGroup; ++i) {
      if (j + i >= end) continue;
      if (filled && stage.holds(staged_row(j + i, fused))) {
        stage.get(staged_row(j + i, fused), tile, s[i]);
      } else {
        load_share(step_row(j + i), tile, s[i]);
      }
    }
  }

  // Adds up <v, s_j>, and <v, u_0> = <v, w> after a restart, for the new row of the Gram matrix.
  template <class Sum>
  PYDEQ_DEVICE void new_products(const Tile& tile, const Plan& plan, const A (&v)[kShare], const A (&w)[kShare],
                                 const Sums& sums, const Stage& stage, bool staged) const {
    Sum product[1];
    if (plan.restarted) {
      product[0] = dot_share<Sum>(v, w);
      sums.add(0, product);
    }
    for (int j = 1; j < plan.slot; j += kGroup) {
      A s[kGroup][kShare];
      Sum products[kGroup];
      load_steps(j, plan.slot, tile, stage, true, staged, s);
      PYDEQ_UNROLL_LOOP for (int i = 0; i < kGroup; ++i) {
        products[i] = j + i < plan.slot ? dot_share<Sum>(v, s[i]) : Sum(0);
      }
      sums.add(j, products, plan.slot - j);
    }
    product[0] = dot_share<Sum>(v, v);
    sums.add(plan.slot, product);
  }

  PYDEQ_DEVICE void close(const Plan& plan, const double* products) const {
    if (!plan.verdict.proceed) return;
    double* fresh = gram + plan.slot * args.capacity;
    const int from = plan.slot > 0 && !plan.restarted ? 1 : 0;
    PYDEQ_ROLL_LOOP for (int j = from + lane_index(); j <= plan.slot; j += kWarp) fresh[j] = products[j];
  }
};

}  // namespace pydeq
