// How a step is laid out on a GPU: launches, blocks, shared memory and scratch; plain host code.
//
// A launch, for Step one of PicardStep<T>, AndersonStep<T>, BroydenStep<T>, GmresStep<T> of csrc/ops/<op>.cuh:
//
//   StepShape shape = step_shape<Step>(args, limits);           refuse unless shape.valid
//   scratch: shape.scratch_bytes of device memory, uninitialized, until the step's last kernel has run; may be null at
//   0 fused:   step_fused_kernel<Step><<<shape.blocks, shape.threads, shape.shared_bytes, stream>>>(args, shape,
//   scratch) else:    step_reduce_kernel<Step><<<blocks, threads, shape.reduce_shared_bytes, ...>>>(args, shape,
//   scratch), then
//            step_apply_kernel<Step><<<blocks, threads, shape.shared_bytes, ...>>>(args, shape, scratch)
//   Without samples there is nothing to launch, and the host writes progress. Compile with --fmad=false: what is not a
//   sum is then the same as on the CPU to the last bit. limits.shared_bytes is what cudaFuncSetAttribute granted each
//   kernel; progress is pinned memory of the host.
//
// What is summed in which order follows from D, the dtype and the solver's memory alone: never from B, the GPU, or the
// limits that a caller sets on the grid and on shared memory.
#pragma once

#include <cstdint>

#include "common/termination.h"

namespace pydeq {

// Threads of a block, at most; kernels are compiled for it.
constexpr int kMaxThreads = 256;
// Entries of a row that a thread has of each tile.
constexpr int kShare = 8;
constexpr int kWarp = 32;

struct StepLimits {
  int64_t shared_bytes = 48 << 10;       // a block may have, after cudaFuncSetAttribute where it is beyond 48 KiB
  int64_t max_blocks = (1LL << 31) - 1;  // of a grid
  int64_t fused_state = 8192;            // the largest D that one block works on; changes the order of sums
  int64_t max_threads = kMaxThreads;     // likewise; a multiple of 32
};

struct StepShape {
  bool valid;          // else the history's sums do not fit a block's shared memory: refuse
  bool fused;          // one launch, of step_fused_kernel; else step_reduce_kernel and step_apply_kernel
  int threads;         // of each block
  int tiles;           // of a sample: ceil(D / (threads * kShare))
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
};

// Where in a block's dynamic shared memory things are, in bytes.
template <class Plan>
struct SharedLayout {
  int64_t totals, sums, norms, coefficients, plan, flag, stage;

  PYDEQ_HOST_DEVICE SharedLayout(int64_t threads, int64_t width, int64_t count) {
    totals = 0;                                        // [width] double
    sums = totals + 8 * width;                         // [warps, width] double
    norms = sums + 8 * width * (threads / kWarp);      // [2] double
    coefficients = norms + 16;                         // [count] double
    plan = coefficients + 8 * count;                   // Plan
    flag = plan + static_cast<int64_t>(sizeof(Plan));  // int
    stage = (flag + 4 + 15) / 16 * 16;                 // rows
  }
};

// Step::Args are what its kernels take.
template <class Step>
StepShape step_shape(const typename Step::Args& args, const StepLimits& limits) {
  using Plan = typename Step::Plan;
  const int64_t state = Step::common(args).state, batch = Step::common(args).batch;
  StepShape shape{};
  const int64_t sums = Step::sums(args), products = Step::products(args), coefficients = Step::coefficients(args);
  const int64_t width = sums > products ? sums : products;
  shape.valid = sums < (1 << 20) && coefficients < (1 << 30);
  shape.sums = static_cast<int>(sums);
  shape.products = static_cast<int>(products);
  shape.coefficients = static_cast<int>(coefficients);
  shape.kept = static_cast<int>(Step::kept(args));
  shape.fused = state <= limits.fused_state || state == 0;

  // Enough threads for one tile, where a block may have that many; fewer where their sums would not fit.
  int64_t threads = Step::kSplitThreads;
  if (shape.fused) {
    threads = 2 * kWarp;
    while (threads < kMaxThreads && threads * kShare < state) threads *= 2;
  }
  if (threads > limits.max_threads) threads = limits.max_threads;
  while (threads > kWarp && SharedLayout<Plan>(threads, width, 0).stage > (32 << 10)) threads /= 2;
  shape.threads = static_cast<int>(threads);
  const int64_t tiles = (state + threads * kShare - 1) / (threads * kShare);
  shape.valid = shape.valid && tiles <= INT32_MAX;
  shape.tiles = static_cast<int>(tiles);

  // Work for deciding is in shared memory unless the history is long.
  int64_t header = SharedLayout<Plan>(threads, width, coefficients).stage;
  shape.coefficients_shared = header <= limits.shared_bytes;
  if (!shape.coefficients_shared) header = SharedLayout<Plan>(threads, width, 0).stage;
  shape.valid = shape.valid && header <= limits.shared_bytes;

  // Split, two blocks a multiprocessor hide each other's waits.
  const int64_t staged_tiles = shape.fused ? tiles : 1;
  const int64_t room = (shape.fused ? limits.shared_bytes : limits.shared_bytes / 2) - header;
  const int64_t row = Step::stage_row_bytes(staged_tiles, threads);
  const int64_t wanted = Step::stage_rows(args, shape.fused);
  int64_t rows = room > 0 && row > 0 ? room / row : 0;
  if (rows > wanted) rows = wanted;
  shape.stage_rows = static_cast<int>(rows);
  shape.shared_bytes = header + rows * row;
  shape.reduce_shared_bytes = header;

  const int64_t items = shape.fused ? batch : batch * tiles;
  shape.blocks = items < limits.max_blocks ? items : limits.max_blocks;

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
