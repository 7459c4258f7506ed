// gram[b, k, j] = sum_d residuals[b, k, d] * residuals[b, j, d]           for the newest k
// next[b, d]    = sum_j a[j] * (values[b, j, d] - (1 - damping) * residuals[b, j, d])
//                                            z, f, next: [B, D]   residuals, values: [B, S, D]   gram: [B, S, S]
//
// Threads as in cuda/step.cuh. One launch where rows that are read twice fit shared memory: a block, or a cluster of up
// to 8, per sample. Else two launches: a block per tile of 2048 entries. Neighbouring threads read neighbouring 16
// bytes. A warp solves for a.
// With m columns: reads z, f, m - 1 residuals and m values (the newest from shared memory in one launch; with damping
// also m residuals); writes one residual, one value, next. The image of the previous iterate is still in the ring and
// the iterate in next, so a best iterate is only copied once it is no longer the newest.
#pragma once

#include "cuda/small_solve.cuh"
#include "cuda/step.cuh"
#include "shared/anderson_step.h"

namespace pydeq {

template <class T>
struct AndersonStep {
  static constexpr int kPack = 16 / sizeof(T);
  static constexpr int kTileThreads = 256;
  static constexpr int kGroup = 16 / sizeof(T);  // columns under way at once: eight loads of 16 bytes
  using Type = T;
  using A = Compute<T>;
  static constexpr int kResident = sizeof(A) == 8 ? kMaxThreads : kResidentThreads;
  using Args = AndersonStepArgs;
  using Tile = pydeq::Tile<kPack>;
  using Stage = pydeq::Stage<kPack, T>;
  struct Plan {
    Verdict verdict;
    bool active;
    int slot;     // of this evaluation
    int columns;  // mixed
  };

  static PYDEQ_HOST_DEVICE const StepArgs& common(const Args& args) { return args.step; }
  // ||g||^2 and ||f||^2, ||g||^2 as rounded to T, then <g, g_age>.
  static int64_t sums(const Args& args) { return 2 + args.memory; }
  static int64_t products(const Args&) { return 0; }
  // a: [m], the Gram matrix by age: [m, m], and work to solve with it.
  static int64_t coefficients(const Args& args) { return args.memory * (2 * args.memory + 4); }
  static int64_t kept(const Args& args) { return args.memory; }
  // About how many vectors a step reads and writes.
  static int64_t vectors(const Args& args, bool fused) {
    const int64_t columns = args.step.step < args.memory ? args.step.step + 1 : args.memory;
    return (args.damping == 1.0 || fused ? 2 : 3) * columns + (fused ? 3 : 4);
  }
  // f, then residuals by age.
  static int64_t stage_rows(const Args& args, bool fused) {
    return !fused || args.step.rules.last ? 0 : args.damping == 1.0 ? 1 : 1 + args.memory;
  }
  static PYDEQ_HOST_DEVICE int64_t stage_row_bytes(int64_t tiles, int64_t threads) {
    return Stage::row_bytes(tiles, threads);
  }

  const Args& args;
  const DeviceRows<T> row;
  T *residuals, *values;  // [S, D]
  double* gram;           // [S, S]
  const int slots, slot;  // the slot of this evaluation
  const int older;        // columns before this one that are kept

  PYDEQ_DEVICE AndersonStep(const Args& a, int64_t b)
      : args(a),
        row(a.step, b),
        residuals(static_cast<T*>(a.residuals) + b * a.slots * a.step.state),
        values(static_cast<T*>(a.values) + b * a.slots * a.step.state),
        gram(a.gram + b * a.slots * a.slots),
        slots(static_cast<int>(a.slots)),
        slot(row.counters[constants::COUNTER_HEAD]),
        older(row.counters[constants::COUNTER_COUNT] < a.memory ? row.counters[constants::COUNTER_COUNT]
                                                                : static_cast<int>(a.memory) - 1) {}

  // The slot of the column that is `age` evaluations older than `newest`.
  PYDEQ_DEVICE int aged(int newest, int age) const { return newest >= age ? newest - age : newest - age + slots; }
  PYDEQ_DEVICE T* ring(T* rows, int index) const { return rows + index * args.step.state; }

  template <class Sum, bool first>
  PYDEQ_DEVICE void reduce(const Tile& tile, const Sums& sums, const Stage& stage) const {
    const bool keep = !args.step.rules.last;
    Share<T> iterate, image, residual;
    load_share(row.z, tile, iterate);
    load_share(row.f, tile, image);
    if (first && keep) stage.put(0, tile, image);
    A g[kShare], f[kShare];
    widen_share<T>(iterate, g);
    widen_share<T>(image, f);
    PYDEQ_UNROLL_LOOP for (int i = 0; i < kShare; ++i) g[i] = f[i] - g[i];
    Sum squares[3] = {dot_share<Sum>(g, g), dot_share<Sum>(f, f), 0};
    // The Gram matrix is computed from the stored residuals, or it would not be positive definite.
    narrow_share<T>(g, residual);
    widen_share<T>(residual, g);
    squares[2] = is_half<T> ? dot_share<Sum>(g, g) : squares[0];
    sums.add(0, squares);
    if (!keep) return;
    if (first) {
      stage.put(1, tile, residual);
      store_share(ring(values, slot), tile, image);
      store_share(ring(residuals, slot), tile, residual);
    }
    constexpr int kColumns = first ? kGroup : 1;  // sums in double, of a sample out of range, are rare
    for (int age = 1; age <= older; age += kColumns) {
      Share<T> columns[kColumns];
      Sum products[kColumns];
      PYDEQ_UNROLL_LOOP for (int i = 0; i < kColumns; ++i) {
        if (age + i <= older) load_share(ring(residuals, aged(slot, age + i)), tile, columns[i]);
      }
      PYDEQ_UNROLL_LOOP for (int i = 0; i < kColumns; ++i) {
        products[i] = 0;
        if (age + i <= older) {
          if (first) stage.put(1 + age + i, tile, columns[i]);
          widen_share<T>(columns[i], f);
          products[i] = dot_share<Sum>(g, f);
        }
      }
      sums.add(2 + age, products, older + 1 - age);
    }
  }

  PYDEQ_DEVICE void decide(const double* totals, double residual, double norm, bool, Plan& plan, double* work) const {
    using namespace constants;
    int32_t* counters = row.counters;
    if (lane_index() == 0) {
      plan.verdict = judge(residual, norm, row.scalars, counters, args.step.rules);
      plan.slot = slot;
      if (plan.verdict.retry) counters[COUNTER_COUNT] = 0;
    }
    warp_sync();
    if (!plan.verdict.proceed) return;
    const int count = older + 1;
    const int memory = static_cast<int>(args.memory);
    double *a = work, *by_age = a + memory, *solve = by_age + memory * memory;
    PYDEQ_ROLL_LOOP for (int age = lane_index(); age < count; age += kWarp) {
      const int other = aged(slot, age);
      gram[slot * slots + other] = gram[other * slots + slot] = by_age[age * count] = totals[2 + age];
    }
    PYDEQ_ROLL_LOOP for (int i = lane_index(); i < count * count; i += kWarp) {
      const int one = i / count, other = i % count;
      if (other > 0 && other <= one) by_age[i] = gram[aged(slot, one) * slots + aged(slot, other)];
    }
    warp_sync();
    const int columns = warp_mixing_coefficients(by_age, count, args.ridge, solve, a);
    if (lane_index() != 0) return;
    plan.columns = columns;
    counters[COUNTER_COUNT] = columns;
    counters[COUNTER_HEAD] = (slot + 1) % slots;
    // Mixing one column is a plain step. A retry would take the same step from a new best.
    if (columns == 1 && plan.verdict.improved) counters[COUNTER_TRIED] = 1;
  }

  PYDEQ_DEVICE void apply(const Tile& tile, const Plan& plan, const double* a, const Sums&, const Stage& stage,
                          bool staged) const {
    const int newest = plan.slot;  // what this step has in `slot` may be the next one already
    settle(row, plan.verdict, ring(values, aged(newest, 1)), args.damping, tile);
    if (!plan.verdict.proceed) return;
    A mixed[kShare];
    // A damped column is two rows, its value and its residual.
    const bool damped = args.damping != 1.0;
    const int rows = damped ? 2 * plan.columns : plan.columns;
    const A undamped = A(1.0 - args.damping);
    for (int begin = 0; begin < rows; begin += kGroup) {
      Share<T> stored[kGroup];
      PYDEQ_UNROLL_LOOP for (int i = 0; i < kGroup; ++i) {
        if (begin + i >= rows) continue;
        const int age = damped ? (begin + i) / 2 : begin + i;
        const bool is_residual = damped && i % 2 == 1;
        const int staged_row = is_residual ? 1 + age : 0;
        if (staged && (is_residual || age == 0) && stage.holds(staged_row)) {
          stage.get(staged_row, tile, stored[i]);
        } else {
          const T* from = age == 0 && !is_residual ? row.f : ring(is_residual ? residuals : values, aged(newest, age));
          load_share(from, tile, stored[i]);
        }
      }
      A value[kShare];
      PYDEQ_UNROLL_LOOP for (int i = 0; i < kGroup; ++i) {
        if (begin + i >= rows) continue;
        A entries[kShare];
        widen_share<T>(stored[i], entries);
        const bool is_residual = damped && i % 2 == 1;
        PYDEQ_UNROLL_LOOP for (int e = 0; e < kShare; ++e) {
          value[e] = is_residual ? value[e] - undamped * entries[e] : entries[e];
        }
        if (damped && !is_residual) continue;
        const int age = damped ? (begin + i) / 2 : begin + i;
        const A weight = A(a[age]);
        PYDEQ_UNROLL_LOOP for (int e = 0; e < kShare; ++e) {
          mixed[e] = age == 0 ? weight * value[e] : mixed[e] + weight * value[e];
        }
      }
    }
    store_wide(row.next, tile, mixed);
  }

  PYDEQ_DEVICE void close(const Plan&, const double*) const {}
};

}  // namespace pydeq
