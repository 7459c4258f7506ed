// next[b, d] = z[b, d] + damping * (f[b, d] - z[b, d])                    z, f, next: [B, D]
//
// Threads as in cuda/step.cuh. One launch where rows that are read twice fit shared memory: a block, or a cluster of up
// to 8, per sample. Else two launches: a block per tile of 2048 entries. Neighbouring threads read neighbouring 16
// bytes.
// Reads z and f: once where a block keeps them in shared memory, else f (and z unless damping is 1) again. Writes next.
// Without damping the image of the previous iterate is z itself, so a best iterate is only copied once it is no longer
// the newest; with damping each new best copies its image.
#pragma once

#include "cuda/step.cuh"
#include "shared/picard_step.h"

namespace pydeq {

template <class T>
struct PicardStep {
  static constexpr int kPack = 16 / sizeof(T);
  static constexpr int kTileThreads = 256;
  using Type = T;
  using A = Compute<T>;
  // float has twice the words of a half in registers: of 128 registers, one would spill.
  static constexpr int kResident = sizeof(T) == 2 ? kResidentThreads : kMaxThreads;
  using Args = PicardStepArgs;
  using Tile = pydeq::Tile<kPack>;
  using Stage = pydeq::Stage<kPack, T>;
  struct Plan {
    Verdict verdict;
    bool active;
  };

  static PYDEQ_HOST_DEVICE const StepArgs& common(const Args& args) { return args.step; }
  static int64_t sums(const Args&) { return 2; }  // ||g||^2, ||f||^2
  static int64_t products(const Args&) { return 0; }
  static int64_t coefficients(const Args&) { return 0; }
  static int64_t kept(const Args&) { return 0; }
  // About how many vectors a step reads and writes.
  static int64_t vectors(const Args&, bool fused) { return fused ? 3 : 4; }
  static int64_t stage_rows(const Args& args, bool fused) { return !fused ? 0 : args.damping == 1.0 ? 1 : 2; }  // f, z
  static PYDEQ_HOST_DEVICE int64_t stage_row_bytes(int64_t tiles, int64_t threads) {
    return Stage::row_bytes(tiles, threads);
  }

  const Args& args;
  const DeviceRows<T> row;

  PYDEQ_DEVICE PicardStep(const Args& a, int64_t b) : args(a), row(a.step, b) {}

  template <class Sum, bool first>
  PYDEQ_DEVICE void reduce(const Tile& tile, const Sums& sums, const Stage& stage) const {
    Share<T> stored_z, stored_f;
    load_share(row.z, tile, stored_z);
    load_share(row.f, tile, stored_f);
    if (first) {
      stage.put(0, tile, stored_f);
      stage.put(1, tile, stored_z);
    }
    A z[kShare], f[kShare];
    widen_share<T>(stored_z, z);
    widen_share<T>(stored_f, f);
    PYDEQ_UNROLL_LOOP for (int i = 0; i < kShare; ++i) z[i] = f[i] - z[i];
    Sum squares[2] = {dot_share<Sum>(z, z), dot_share<Sum>(f, f)};
    sums.add(0, squares);
  }

  PYDEQ_DEVICE void decide(const double*, double residual, double norm, bool, Plan& plan, double*) const {
    if (lane_index() != 0) return;
    plan.verdict = judge(residual, norm, row.scalars, row.counters, args.step.rules);
    // Every step is a plain one. A retry would take the same step from a new best.
    if (plan.verdict.proceed && plan.verdict.improved) row.counters[constants::COUNTER_TRIED] = 1;
  }

  PYDEQ_DEVICE void apply(const Tile& tile, const Plan& plan, const double*, const Sums&, const Stage& stage,
                          bool staged) const {
    settle(row, plan.verdict, args.damping == 1.0 ? row.z : nullptr, args.damping, tile);
    if (!plan.verdict.proceed) return;
    Share<T> stored_f;
    if (staged && stage.holds(0)) {
      stage.get(0, tile, stored_f);
    } else {
      load_share(row.f, tile, stored_f);
    }
    if (args.damping == 1.0) {
      store_share(row.next, tile, stored_f);
      return;
    }
    if (saves_image(plan.verdict)) store_share(row.image, tile, stored_f);
    Share<T> stored_z;
    if (staged && stage.holds(1)) {
      stage.get(1, tile, stored_z);
    } else {
      load_share(row.z, tile, stored_z);
    }
    A z[kShare], f[kShare];
    widen_share<T>(stored_z, z);
    widen_share<T>(stored_f, f);
    PYDEQ_UNROLL_LOOP for (int i = 0; i < kShare; ++i) z[i] += A(args.damping) * (f[i] - z[i]);
    store_wide(row.next, tile, z);
  }

  PYDEQ_DEVICE void close(const Plan&, const double*) const {}
};

}  // namespace pydeq
