// The layout of a step on a GPU: launches, blocks, shared memory and scratch; plain host code.
//
// A launch, for Step one of PicardStep<T>, AndersonStep<T>, BroydenStep<T>, GmresStep<T> of csrc/cuda/<op>.cuh:
//
//   StepShape shape = step_shape<Step>(args, limits);           refuse unless shape.valid
//   scratch: shape.scratch_bytes of device memory, uninitialized, until the last kernel has run; null for 0 bytes
//   fused:   step_fused_kernel<Step><<<blocks, threads, shape.shared_bytes, stream>>>(args, shape, scratch),
//            in clusters of shape.cluster blocks
//   else:    step_reduce_kernel<Step><<<blocks, threads, shape.reduce_shared_bytes, ...>>>(args, shape, scratch), then
//            step_apply_kernel<Step><<<blocks, threads, shape.shared_bytes, ...>>>(args, shape, scratch)
//
// Without samples there is nothing to launch, and the host writes progress. Compile with --fmad=false: then everything
// except the sums is the same as on the CPU to the last bit. limits.shared_bytes is what cudaFuncSetAttribute granted
// each kernel; progress is pinned memory of the host.
//
// The order of sums depends only on D, the dtype and the solver's memory. It does not depend on B, the GPU, the number
// of launches and blocks, or the caller's limits on these and on shared memory. So a step may take the fastest path:
// one launch with a block or a cluster for each sample, or two launches with a block for each tile:
//
//   time  ~  bytes that the busiest multiprocessor moves  +  the extra cost of a launch or a cluster, in bytes
//
// One launch reads each vector once, but a sample keeps at most one multiprocessor busy for each block of its cluster:
// with few samples most of the GPU is idle. Two launches spread the tiles of all samples over the whole GPU, and read
// some vectors twice. An H200 gives each of its 132 multiprocessors 36 KB a us of its memory's 4.8 TB/s, and about 50
// where the other ones are idle. The second launch of a step follows the last block of the first one after 2.5 us:
// kLaunchBytes. The three barriers of a cluster cost about 0.3 us: kClusterBytes.
#pragma once

#include <cmath>
#include <cstdint>

#include "shared/termination.h"

namespace pydeq {

// Threads of a block, at most; kernels are compiled for it.
constexpr int kMaxThreads = 256;
// Threads that a multiprocessor has registers for: enough to hide memory latency.
constexpr int kResidentThreads = 512;
// Entries of a row that a thread has of each tile.
constexpr int kShare = 8;
constexpr int kWarp = 32;
// Bytes of a multiprocessor's shared memory that each block costs in addition to its own.
constexpr int64_t kReservedShared = 1 << 10;

// Cost of a second launch and of a cluster, in bytes that a multiprocessor moves in that time.
constexpr int64_t kLaunchBytes = 128 << 10, kClusterBytes = 16 << 10;

struct StepLimits {
  int64_t shared_bytes = 48 << 10;       // a block may have, after cudaFuncSetAttribute where it is beyond 48 KiB
  int64_t max_blocks = (1LL << 31) - 1;  // of a grid
  int64_t block_state = 8192;            // entries that a block of a single launch has, at most; below 0: two launches
  int64_t cluster_blocks = 1;            // of a cluster, at most; a power of 2
  int64_t tile_threads = kMaxThreads;    // at most; a multiple of 32. Changes the order of sums.
  int64_t multiprocessors = 0;           // of the GPU; 0 where it is unknown: then as many as there are blocks
  int path = constants::CUDA_PATH_AUTO;  // of a step where it fits; two launches always fit
};

struct StepShape {
  bool valid;          // else the history's sums do not fit a block's shared memory: refuse
  bool fused;          // one launch, of step_fused_kernel; else step_reduce_kernel and step_apply_kernel
  int threads;         // of each block
  int tile_threads;    // of them, those that share a tile
  int tiles;           // of a sample: ceil(D / (tile_threads * kShare)), at least 1
  int cluster;         // blocks that share a sample in one launch; tile t is of block t % cluster
  int rounds;          // tiles of a sample that a team of threads has in one launch, at most
  int64_t blocks;      // of each grid
  int sums, products;  // of the first and second pass
  int coefficients;    // doubles of work for deciding
  int kept;            // of them, the first ones that the second pass reads
  bool coefficients_shared;
  int stage_rows;               // rows that a block keeps in shared memory
  int64_t shared_bytes;         // dynamic, of step_fused_kernel and step_apply_kernel
  int64_t reduce_shared_bytes;  // and of step_reduce_kernel
  // Scratch in device memory, uninitialized, of these many bytes in all; offsets are aligned to 16 bytes.
  int64_t scratch_bytes;
  int64_t partial_at, plans_at, coefficients_at;

  PYDEQ_HOST_DEVICE int width() const { return sums > products ? sums : products; }
  // Tiles of a sample that a block of a single launch has room for.
  PYDEQ_HOST_DEVICE int slots() const { return rounds * (threads / tile_threads); }
};

// Offsets in a block's dynamic shared memory, in bytes.
template <class Plan>
struct SharedLayout {
  int64_t totals, partial, sums, norms, coefficients, plan, flag, stage;

  // slots: tiles of a sample whose totals a block keeps.
  PYDEQ_HOST_DEVICE SharedLayout(int64_t threads, int64_t width, int64_t slots, int64_t count) {
    totals = 0;                                                      // [width] double
    partial = totals + 8 * width;                                    // [width, slots] double
    sums = partial + 8 * width * slots;                              // [warps, width] double
    norms = sums + 8 * width * (threads / kWarp);                    // [2] double
    coefficients = norms + 16;                                       // [count] double
    plan = coefficients + 8 * count;                                 // Plan, which may end at any byte
    flag = (plan + static_cast<int64_t>(sizeof(Plan)) + 3) / 4 * 4;  // int
    stage = (flag + 4 + 15) / 16 * 16;                               // rows
  }
};

// Lays out the shared memory of a block that has `staged_tiles` tiles for each team; returns whether all rows that are
// wanted there fit, so that the second pass reads no vector of the first again.
template <class Step>
bool lay_out(const typename Step::Args& args, int64_t available, int64_t slots, int64_t staged_tiles,
             StepShape& shape) {
  using Plan = typename Step::Plan;
  const int64_t threads = shape.threads, width = shape.width();
  // Work for deciding is in shared memory unless the history is long.
  int64_t header = SharedLayout<Plan>(threads, width, slots, shape.coefficients).stage;
  shape.coefficients_shared = header <= available;
  if (!shape.coefficients_shared) header = SharedLayout<Plan>(threads, width, slots, 0).stage;
  // With two launches, two blocks per multiprocessor hide each other's waits. A multiprocessor has kReservedShared
  // bytes more than a block may have, and reserves as many for each block.
  const int64_t room = (shape.fused ? available : (available - kReservedShared) / 2) - header;
  const int64_t row = Step::stage_row_bytes(staged_tiles, threads), wanted = Step::stage_rows(args, shape.fused);
  const int64_t rows = room > 0 ? room / row : 0;
  shape.stage_rows = static_cast<int>(rows < wanted ? rows : wanted);
  shape.shared_bytes = header + shape.stage_rows * row;
  shape.reduce_shared_bytes = header;
  shape.valid = header <= available;
  return shape.valid && rows >= wanted;
}

// One launch by clusters of `cluster` blocks. Returns whether blocks can keep the rows that the second pass needs.
template <class Step>
bool lay_out_fused(const typename Step::Args& args, const StepLimits& limits, int64_t cluster, StepShape& shape) {
  const int64_t mine = (shape.tiles + cluster - 1) / cluster, threads = shape.tile_threads;
  const int64_t teams = mine > 1 && 2 * threads <= kMaxThreads ? 2 : 1;
  if (mine > 1 && limits.path == constants::CUDA_PATH_AUTO && mine * threads * kShare > limits.block_state)
    return false;
  shape.fused = true;
  shape.cluster = static_cast<int>(cluster);
  shape.threads = static_cast<int>(teams * threads);
  shape.rounds = static_cast<int>((mine + teams - 1) / teams);
  const bool complete =
      lay_out<Step>(args, limits.shared_bytes, shape.tiles > 1 ? shape.slots() : 0, shape.rounds, shape);
  return complete || (shape.tiles == 1 && shape.valid);
}

// Two launches.
template <class Step>
void lay_out_split(const typename Step::Args& args, const StepLimits& limits, StepShape& shape) {
  shape.fused = false;
  shape.cluster = shape.rounds = 1;
  shape.threads = shape.tile_threads;
  lay_out<Step>(args, limits.shared_bytes, 0, 1, shape);
}

// The cost of a shape, in bytes that a multiprocessor moves: see above.
template <class Step>
double step_cost(const typename Step::Args& args, const StepLimits& limits, const StepShape& shape) {
  const int64_t batch = Step::common(args).batch, each = shape.fused ? shape.cluster : shape.tiles;
  const int64_t tiles = shape.fused ? (shape.tiles + shape.cluster - 1) / shape.cluster : 1;  // of a block
  const int64_t busiest =
      limits.multiprocessors > 0 ? (batch * each + limits.multiprocessors - 1) / limits.multiprocessors : 1;
  const double tile_bytes = static_cast<double>(Step::stage_row_bytes(1, shape.tile_threads));
  // The last step takes no step: it reads z and f, and may place the best iterate.
  const int64_t vectors = Step::common(args).rules.last ? shape.fused ? 4 : 5 : Step::vectors(args, shape.fused);
  const double moved = static_cast<double>(busiest * tiles * vectors) * tile_bytes;
  if (!shape.fused) return moved + static_cast<double>(kLaunchBytes);
  return moved + (shape.cluster > 1 ? static_cast<double>(busiest * kClusterBytes) : 0.0);  // each block waits
}

// Lays out a step on the path limits.path, or on the cheapest path.
template <class Step>
void choose_path(const typename Step::Args& args, const StepLimits& limits, StepShape& shape) {
  const StepShape plain = shape;
  lay_out_split<Step>(args, limits, shape);
  if (limits.path == constants::CUDA_PATH_SPLIT || limits.block_state < 0) return;
  // A forced path or an unknown GPU: one launch where it fits, with the largest cluster.
  const bool compare = limits.path == constants::CUDA_PATH_AUTO && limits.multiprocessors > 0;
  // Sums of one tile are never split, so then a second launch would gain nothing.
  double least = compare && plain.tiles > 1 && shape.valid ? step_cost<Step>(args, limits, shape) : HUGE_VAL;
  const int64_t most = limits.path == constants::CUDA_PATH_BLOCK ? 1 : limits.cluster_blocks;
  for (int64_t cluster = most; cluster >= 1; cluster /= 2) {
    if (cluster > plain.tiles) continue;
    StepShape one = plain;
    if (!lay_out_fused<Step>(args, limits, cluster, one)) return;  // smaller ones have more to keep
    const double cost = step_cost<Step>(args, limits, one);
    if (!compare || cost <= least) {
      shape = one;
      least = cost;
    }
    if (!compare) return;
  }
}

// The layout of a step; Step::Args are its kernels' arguments.
template <class Step>
StepShape step_shape(const typename Step::Args& args, const StepLimits& limits) {
  using Plan = typename Step::Plan;
  const int64_t state = Step::common(args).state, batch = Step::common(args).batch;
  StepShape shape{};
  const int64_t sums = Step::sums(args), products = Step::products(args), coefficients = Step::coefficients(args);
  if (sums >= (1 << 20) || coefficients >= (1 << 30)) return shape;
  shape.sums = static_cast<int>(sums);
  shape.products = static_cast<int>(products);
  shape.coefficients = static_cast<int>(coefficients);
  shape.kept = static_cast<int>(Step::kept(args));
  const int64_t width = shape.width();

  // Enough threads for one tile, if a block may have that many; fewer if their sums would not fit.
  int64_t threads = 2 * kWarp;
  while (threads < Step::kTileThreads && threads * kShare < state) threads *= 2;
  if (threads > limits.tile_threads) threads = limits.tile_threads;
  while (threads > kWarp && SharedLayout<Plan>(threads, width, 0, 0).stage > (32 << 10)) threads /= 2;
  shape.tile_threads = static_cast<int>(threads);
  const int64_t tile = threads * kShare, tiles = state > tile ? (state + tile - 1) / tile : 1;
  if (tiles > INT32_MAX) return shape;
  shape.tiles = static_cast<int>(tiles);

  choose_path<Step>(args, limits, shape);

  // A grid of clusters has a multiple of their blocks.
  const int64_t items = shape.fused ? batch : batch * tiles, most = limits.max_blocks / shape.cluster;
  shape.blocks = (items < most ? items : most > 1 ? most : 1) * shape.cluster;

  const auto aligned = [](int64_t bytes) { return (bytes + 15) / 16 * 16; };
  int64_t at = 0;
  if (!shape.fused) {
    shape.partial_at = at;
    at += aligned(batch * width * tiles * 8);
    shape.plans_at = at;
    at += aligned(batch * static_cast<int64_t>(sizeof(Plan)));
  }
  if (!shape.fused || !shape.coefficients_shared) {
    shape.coefficients_at = at;
    const int64_t each = shape.coefficients_shared ? shape.kept : coefficients;
    at += aligned(batch * each * 8);
  }
  shape.scratch_bytes = at;
  return shape;
}

}  // namespace pydeq
