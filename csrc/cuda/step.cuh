// The parts of a step that all solvers share, on a GPU; cpu/step.h has them for the CPU.
//
// A step is two passes over the state of each active sample. The first reduces. From the totals a warp decides and
// solves. The second pass applies. If a sample is done, a block only reads its status.
//
// Small states take one launch, of step_fused_kernel: one block, or a cluster of blocks, for each sample. The blocks
// keep the rows that the second pass needs again in shared memory, so that each vector is read once. The first block,
// the leader, adds up its peers' sums from their shared memory and decides, and the peers read the plan from its shared
// memory.
// Large states take two launches. step_reduce_kernel has a block for each tile of each sample; the block that finishes
// a sample's last tile adds up the tiles and decides. step_apply_kernel has the same blocks for the second pass; where
// that has sums too, the last block of a sample closes them.
//
// Totals are sums over a warp in the compute type, then in double over the warps of a tile, then over tiles, in an
// order that depends only on D. So both paths, and clusters of any size, give the same bits. The block that decides
// last reports to the host.
//
// A Step has these members in addition to those that cuda/step_shape.h needs:
//   kResident                                              threads that a multiprocessor has registers for
//   Step(args, b)                                          of one sample; reads its counters
//   template <Sum, first> reduce(tile, sums, stage)        first pass; writes its results where `first`
//   decide(totals, residual, norm, fits, Plan&, work)      met by one warp
//   apply(tile, plan, coefficients, sums, stage, staged)   second pass; `staged` if `stage` holds the first pass's rows
//   close(plan, totals)                                    met by one warp
#pragma once

#include "cuda/tile.cuh"
#include "shared/step_args.h"
#include "shared/termination.h"

namespace pydeq {

// The largest number of vectors in a launch.
constexpr int kMaxListed = static_cast<int>(constants::CUDA_VECTORS);

// The arguments of a step that has a list of vectors, with the list where a kernel can read it: by value.
template <class Args>
struct Listing : Args {
  void* rows[kMaxListed];  // `stored` pointers to [B, D]
};

// The rows of one sample.
template <class T>
struct DeviceRows {
  T* z;        // [D]
  const T* f;  // [D]
  T* next;     // [D]
  T* value;    // [D] the best iterate
  T* image;    // [D] and its image
  double* scalars;
  int32_t* counters;

  PYDEQ_DEVICE DeviceRows(const StepArgs& a, int64_t b)
      : z(static_cast<T*>(a.z) + b * a.state),
        f(static_cast<const T*>(a.f) + b * a.state),
        next(static_cast<T*>(a.next) + b * a.state),
        value(static_cast<T*>(a.best) + b * a.state),
        image(static_cast<T*>(a.best) + (a.batch + b) * a.state),
        scalars(a.scalars + b * constants::SCALAR_SIZE),
        counters(a.counters + b * constants::COUNTER_SIZE) {}
};

// Saves the best iterate if it would be lost, places stopped samples, starts retries. previous_image is null if the
// solver does not keep it: then the caller, which has loaded f, saves the image of every improvement that is not
// materialized here (see saves_image). After a retry z holds the iterate that the retry starts from.
template <int W, class T>
PYDEQ_DEVICE void settle(const DeviceRows<T>& row, const Verdict& verdict, const T* previous_image, double damping,
                         const Tile<W>& tile) {
  using A = Compute<T>;
  if (verdict.materialize) {
    copy_share(row.value, row.z, tile);
    copy_share(row.image, row.f, tile);
  } else {
    if (verdict.displaced) {
      copy_share(row.value, row.next, tile);
      if (previous_image) copy_share(row.image, previous_image, tile);
    }
  }
  if (verdict.stopped) {
    if (!verdict.materialize) copy_share(row.z, row.value, tile);
    copy_share(row.next, row.value, tile);
  } else if (verdict.from_best || verdict.halfway) {
    A from[kShare], to[kShare];
    load_wide(verdict.from_best ? row.value : row.next, tile, from);
    load_wide(verdict.from_best ? row.image : row.z, tile, to);
    store_wide(row.z, tile, from);
    const double part = verdict.from_best ? damping : 0.5;
    if (part != 1.0) {
      PYDEQ_UNROLL_LOOP for (int i = 0; i < kShare; ++i) to[i] = from[i] + A(part) * (to[i] - from[i]);
    }
    store_wide(row.next, tile, to);
  }
}

// For a sample that proceeds.
PYDEQ_DEVICE bool saves_image(const Verdict& verdict) { return verdict.improved && !verdict.materialize; }

// Whether a sum of squares of the compute type may be trusted at this size; 0 may not.
template <class T>
PYDEQ_DEVICE bool in_range(double total) {
  return sizeof(T) == 8 ? total > 1e-280 && total < 1e280 : total > 1e-30 && total < 1e30;
}

// The larger one, or NaN if one of them is NaN.
PYDEQ_DEVICE double larger(double a, double b) { return !(a >= b) && a == a ? b : a; }

// A block's part of shared memory.
template <class Step>
struct StepBlock {
  double* totals;        // [width]
  double* partial;       // [width, slots] totals of tiles; null where a sample is one tile, and in two launches
  Sums sums;             // [warps, width]
  double* norms;         // [2]
  double* coefficients;  // [coefficients], null where they do not fit
  typename Step::Plan* plan;
  int* flag;
  typename Step::Stage stage;

  // Keeps stage_rows rows of each of `tiles` tiles that a team has, and the totals of `slots` tiles.
  PYDEQ_DEVICE StepBlock(const StepShape& shape, int slots, int tiles, int stage_rows) {
    using Plan = typename Step::Plan;
    const int width = shape.width(), count = shape.coefficients_shared ? shape.coefficients : 0;
    const SharedLayout<Plan> at(block_threads(), width, slots, count);
    totals = shared_slice<double>(at.totals, width);
    partial = slots > 0 ? shared_slice<double>(at.partial, width * slots) : nullptr;
    sums = {shared_slice<double>(at.sums, width * block_warps()), width};
    norms = shared_slice<double>(at.norms, 2);
    coefficients = shape.coefficients_shared ? shared_slice<double>(at.coefficients, count) : nullptr;
    plan = shared_slice<Plan>(at.plan, 1);
    flag = shared_slice<int>(at.flag, 1);
    using Place = typename Step::Stage::Place;
    const int64_t bytes = stage_rows * Step::stage_row_bytes(tiles, block_threads());
    stage = {shared_slice<Place>(at.stage, bytes / static_cast<int64_t>(sizeof(Place))), tiles, stage_rows};
  }
};

// Tile t of a sample for the first team of a block; an empty tile for the second team. So sums have the same order as
// in a block with one team.
template <class Step>
PYDEQ_DEVICE typename Step::Tile first_teams_tile(const StepArgs& args, const StepShape& shape, int t) {
  const Team team = Team::of(shape.tile_threads);
  return {team, team.index == 0 ? t : shape.tiles, args.state, 0};
}

// ||f - z|| and ||f|| of a whole sample of doubles whose squares over- or underflowed.
template <class Step>
PYDEQ_DEVICE void careful_norms(const StepArgs& args, int64_t b, const StepShape& shape, const StepBlock<Step>& block) {
  const DeviceRows<double> row(args, b);
  double largest[2] = {0.0, 0.0}, z[kShare], f[kShare];
  for (int t = 0; t < shape.tiles; ++t) {
    const auto tile = first_teams_tile<Step>(args, shape, t);
    load_wide(row.z, tile, z);
    load_wide(row.f, tile, f);
    PYDEQ_UNROLL_LOOP for (int i = 0; i < kShare; ++i) {
      largest[0] = larger(largest[0], fabs(f[i] - z[i]));
      largest[1] = larger(largest[1], fabs(f[i]));
    }
  }
  double* by_warp = block.sums.by_warp;
  for (int n = 0; n < 2; ++n) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      largest[n] = larger(largest[n], warp_shuffle_xor(largest[n], distance));
    }
    if (lane_index() == 0) by_warp[warp_index() * block.sums.width + n] = largest[n];
  }
  block_sync();
  for (int n = 0; n < 2; ++n) {
    for (int w = 0; w < block_warps(); ++w) largest[n] = larger(largest[n], by_warp[w * block.sums.width + n]);
    if (largest[n] == 0.0) largest[n] = 1.0;
  }
  block_sync();
  block.sums.clear();
  for (int t = 0; t < shape.tiles; ++t) {
    const auto tile = first_teams_tile<Step>(args, shape, t);
    load_wide(row.z, tile, z);
    load_wide(row.f, tile, f);
    double squares[2] = {0.0, 0.0};
    PYDEQ_UNROLL_LOOP for (int i = 0; i < kShare; ++i) {
      const double g = (f[i] - z[i]) / largest[0], scaled = f[i] / largest[1];
      squares[0] += g * g;
      squares[1] += scaled * scaled;
    }
    block.sums.add(0, squares);
  }
  // The other totals are still needed.
  block_sync();
  if (thread_index() < 2) {
    double total = 0.0;
    for (int w = 0; w < block_warps(); ++w) total += by_warp[w * block.sums.width + thread_index()];
    block.norms[thread_index()] = largest[thread_index()] * sqrt(total);
  }
  block_sync();
}

// Computes a sample's plan from its totals; all threads of a block take part.
template <class Step>
PYDEQ_DEVICE void decide(Step& step, const StepArgs& args, int64_t b, const StepShape& shape,
                         const StepBlock<Step>& block, double* coefficients) {
  using T = typename Step::Type;
  const bool fits = in_range<T>(block.totals[0]), image_fits = in_range<T>(block.totals[1]);
  double residual = sqrt(block.totals[0]), norm = sqrt(block.totals[1]);
  if (!fits || !image_fits) {
    if constexpr (sizeof(T) == 8) {
      careful_norms<Step>(args, b, shape, block);
      residual = block.norms[0];
      norm = block.norms[1];
    } else {  // squares of narrower types fit a double
      block.sums.clear();
      for (int t = 0; t < shape.tiles; ++t) {
        step.template reduce<double, false>(first_teams_tile<Step>(args, shape, t), block.sums, block.stage);
      }
      block.sums.finish(block.totals);
      residual = sqrt(block.totals[0]);
      norm = sqrt(block.totals[1]);
    }
  }
  if (warp_index() == 0) step.decide(block.totals, residual, norm, fits, *block.plan, coefficients);
  block_sync();
}

// Counts a sample as decided, and reports to the host if it is the last one. Met by warp 0 of one block per sample.
PYDEQ_DEVICE void report(const StepArgs& args) {
  using namespace constants;
  bool last = false;
  if (lane_index() == 0) {
    fence_device();
    int32_t* done = args.counters + COUNTER_SAMPLES_DONE;
    last = atomic_add(done, 1) == args.batch - 1;
    if (last) {
      fence_device();
      atomic_add(done, -static_cast<int32_t>(args.batch));
    }
  }
  if (!warp_any(last)) return;
  warp_sync();                  // all lanes see what lane 0 has seen
  int32_t samples[2] = {0, 0};  // running, far
  for (int64_t first = 0; first < args.batch; first += kWarp) {
    const int64_t b = first + lane_index();
    if (b >= args.batch) continue;
    const int32_t* counters = args.counters + b * COUNTER_SIZE;
    samples[0] += counters[COUNTER_STATUS] == RUNNING;
    samples[1] += counters[COUNTER_FAR];
  }
  warp_sum(samples);
  if (lane_index() == 0) {
    store_system(args.progress + PROGRESS_RUNNING, samples[0]);
    store_system(args.progress + PROGRESS_FAR, samples[1]);
    fence_system();
    store_system(args.progress + PROGRESS_STEP, args.step + 1);
  }
}

// Whether this block is the last of `expected` to arrive here. The last one sees all that the other blocks wrote.
PYDEQ_DEVICE bool arrives_last(int32_t* counter, int expected, int* flag) {
  block_sync();
  if (thread_index() == 0) {
    fence_device();
    const bool last = atomic_add(counter, 1) == expected - 1;
    if (last) {
      fence_device();
      atomic_add(counter, -expected);
    }
    *flag = last;
  }
  block_sync();
  return *flag != 0;
}

// Writes a tile's totals to partial[j, tile], j in [0, count).
PYDEQ_DEVICE void store_partial(const double* totals, double* partial, int count, int tiles, int64_t tile) {
  PYDEQ_ROLL_LOOP for (int j = thread_index(); j < count; j += block_threads())
      partial[static_cast<int64_t>(j) * tiles + tile] = totals[j];
}

// totals[j] = sum over tiles of load(j, tile), by a warp each.
template <class Load>
PYDEQ_DEVICE void add_up(const Load& load, double* totals, int count, int tiles) {
  for (int j = warp_index(); j < count; j += block_warps()) {
    double total[1] = {0.0};
    for (int t = lane_index(); t < tiles; t += kWarp) total[0] += load(j, t);
    warp_sum(total);
    if (lane_index() == 0) totals[j] = total[0];
  }
  block_sync();
}

PYDEQ_DEVICE void add_tiles(const double* partial, double* totals, int count, int tiles) {
  add_up([&](int j, int t) { return partial[static_cast<int64_t>(j) * tiles + t]; }, totals, count, tiles);
}

// The same for tiles that the blocks of a cluster have in shared memory.
PYDEQ_DEVICE void add_tiles_of_peers(double* partial, double* totals, int count, const StepShape& shape) {
  const int slots = shape.slots();
  add_up(
      [&](int j, int t) {
        const double* from = shape.cluster > 1 ? cluster_peer(partial, t % shape.cluster) : partial;
        return from[j * slots + t / shape.cluster];
      },
      totals, count, shape.tiles);
}

template <class Step>
PYDEQ_KERNEL(kMaxThreads, Step::kResident)
step_fused_kernel(PYDEQ_PARAMETER typename Step::Args args, PYDEQ_PARAMETER StepShape shape, unsigned char* scratch) {
  const StepArgs& common = Step::common(args);
  const Team team = Team::of(shape.tile_threads);
  const bool alone = shape.cluster == 1;
  const int teams = shape.threads / shape.tile_threads, rank = alone ? 0 : cluster_rank();
  const StepBlock<Step> block(shape, shape.tiles > 1 ? shape.slots() : 0, shape.rounds, shape.stage_rows);
  // The place for the totals of a team's tile in round r.
  const int slots = shape.tiles > 1 ? shape.slots() : 1;
  double* const of_tile = (shape.tiles > 1 ? block.partial : block.totals) + team.index;
  for (int64_t b = block_index() / shape.cluster; b < common.batch; b += grid_blocks() / shape.cluster) {
    if (!is_active(common.counters + b * constants::COUNTER_SIZE, common.rules)) {
      if (rank == 0 && warp_index() == 0) report(common);
      continue;
    }
    Step step(args, b);  // and looks at the counters before the leader changes them
    for (int r = 0; r < shape.rounds; ++r) {
      const typename Step::Tile tile(team, (r * teams + team.index) * shape.cluster + rank, common.state, r);
      block.sums.clear();
      step.template reduce<typename Step::A, true>(tile, block.sums, block.stage);
      block.sums.finish(team, of_tile + r * teams, slots, shape.sums);
    }
    if (!alone) cluster_sync();
    double* coefficients = block.coefficients;
    if (!coefficients) {
      coefficients = reinterpret_cast<double*>(scratch + shape.coefficients_at) + b * shape.coefficients;
    }
    if (rank == 0) {
      if (shape.tiles > 1) add_tiles_of_peers(block.partial, block.totals, shape.sums, shape);
      decide(step, common, b, shape, block, coefficients);
      if (warp_index() == 0) report(common);
    }
    if (!alone) {
      cluster_sync();
      if (rank > 0) {
        if (thread_index() == 0) *block.plan = *cluster_peer(block.plan, 0);
        if (block.coefficients) {
          const double* leaders = cluster_peer(block.coefficients, 0);
          PYDEQ_ROLL_LOOP for (int j = thread_index(); j < shape.kept; j += block_threads()) block.coefficients[j] =
              leaders[j];
        }
      }
      block_sync();
    }
    const Step after(args, b);  // of the plan, as in two launches: nothing is kept in registers for it
    for (int r = 0; r < shape.rounds; ++r) {
      const typename Step::Tile tile(team, (r * teams + team.index) * shape.cluster + rank, common.state, r);
      if (shape.products > 0) block.sums.clear();
      after.apply(tile, *block.plan, coefficients, block.sums, block.stage, true);
      if (shape.products > 0) block.sums.finish(team, of_tile + r * teams, slots, shape.products);
    }
    if (shape.products > 0) {
      if (!alone) cluster_sync();
      if (rank == 0) {
        if (shape.tiles > 1) add_tiles_of_peers(block.partial, block.totals, shape.products, shape);
        if (warp_index() == 0) after.close(*block.plan, block.totals);
      }
    }
    // The next sample reuses the shared memory, and the memory of a block is gone when it returns.
    if (alone) {
      block_sync();
    } else {
      cluster_sync();
    }
  }
}

template <class Step>
PYDEQ_KERNEL(Step::kTileThreads, Step::kResident)
step_reduce_kernel(PYDEQ_PARAMETER typename Step::Args args, PYDEQ_PARAMETER StepShape shape, unsigned char* scratch) {
  using Plan = typename Step::Plan;
  const StepArgs& common = Step::common(args);
  const StepBlock<Step> block(shape, 0, 1, 0);
  const int64_t items = common.batch * shape.tiles;
  for (int64_t item = block_index(); item < items; item += grid_blocks()) {
    const int64_t b = item / shape.tiles, t = item % shape.tiles;
    int32_t* counters = common.counters + b * constants::COUNTER_SIZE;
    Plan& plan = reinterpret_cast<Plan*>(scratch + shape.plans_at)[b];
    if (!is_active(counters, common.rules)) {
      if (t == 0 && warp_index() == 0) {
        if (lane_index() == 0) plan.active = false;
        report(common);
      }
      continue;
    }
    Step step(args, b);
    block.sums.clear();
    const typename Step::Tile tile(Team::whole_block(), t, common.state, 0);
    step.template reduce<typename Step::A, true>(tile, block.sums, block.stage);
    block.sums.finish(block.totals);
    double* partial = reinterpret_cast<double*>(scratch + shape.partial_at) + b * shape.width() * shape.tiles;
    store_partial(block.totals, partial, shape.sums, shape.tiles, t);
    if (!arrives_last(counters + constants::COUNTER_TILES_DONE, shape.tiles, block.flag)) continue;

    add_tiles(partial, block.totals, shape.sums, shape.tiles);
    double* const kept = reinterpret_cast<double*>(scratch + shape.coefficients_at);
    decide(step, common, b, shape, block, block.coefficients ? block.coefficients : kept + b * shape.coefficients);
    if (warp_index() == 0) report(common);
    if (block.coefficients) {
      PYDEQ_ROLL_LOOP for (int j = thread_index(); j < shape.kept; j += block_threads()) kept[b * shape.kept + j] =
          block.coefficients[j];
    }
    if (thread_index() == 0) {
      plan = *block.plan;
      plan.active = true;
    }
    block_sync();  // the next item takes the shared memory
  }
}

template <class Step>
PYDEQ_KERNEL(Step::kTileThreads, Step::kResident)
step_apply_kernel(PYDEQ_PARAMETER typename Step::Args args, PYDEQ_PARAMETER StepShape shape, unsigned char* scratch) {
  using Plan = typename Step::Plan;
  const StepArgs& common = Step::common(args);
  const StepBlock<Step> block(shape, 0, 1, shape.stage_rows);
  const int64_t items = common.batch * shape.tiles;
  for (int64_t item = block_index(); item < items; item += grid_blocks()) {
    const int64_t b = item / shape.tiles, t = item % shape.tiles;
    const Plan plan = reinterpret_cast<const Plan*>(scratch + shape.plans_at)[b];
    if (!plan.active) continue;
    Step step(args, b);
    const double* coefficients = reinterpret_cast<const double*>(scratch + shape.coefficients_at);
    coefficients += b * (block.coefficients ? shape.kept : shape.coefficients);
    if (shape.products > 0) block.sums.clear();
    const typename Step::Tile tile(Team::whole_block(), t, common.state, 0);
    step.apply(tile, plan, coefficients, block.sums, block.stage, false);
    if (shape.products == 0) continue;
    block.sums.finish(block.totals);
    double* partial = reinterpret_cast<double*>(scratch + shape.partial_at) + b * shape.width() * shape.tiles;
    store_partial(block.totals, partial, shape.products, shape.tiles, t);
    if (!arrives_last(step.row.counters + constants::COUNTER_TILES_DONE, shape.tiles, block.flag)) continue;
    add_tiles(partial, block.totals, shape.products, shape.tiles);
    if (warp_index() == 0) step.close(plan, block.totals);
    block_sync();  // the next item takes the shared memory
  }
}

}  // namespace pydeq
