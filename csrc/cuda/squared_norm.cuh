// y[b] = 1/K sum_k sum_d x[k, b, d]^2                                                         x: [K, B, D]   y: [B]
//
// A block of 256 threads per tile of 2048 entries of a sample, which it takes from each probe; neighbouring threads
// read neighbouring 16 bytes. One launch; reads x once, writes y once. Where a sample has several tiles, the block that
// finishes the last one adds them up, in order: 8 bytes written and read per tile, and a counter set to 0 before.
#pragma once

#include "cuda/step.cuh"
#include "shared/squared_norm.h"

namespace pydeq {

struct SquaredNormShape {
  int threads, tiles;
  int64_t blocks;
  int64_t shared_bytes;
  // Scratch in device memory: `partial_bytes` uninitialized, then a counter per sample, [B] int32, that must be 0 when
  // the kernel starts and is 0 again when it ends. 0 in all where a sample is one tile.
  int64_t partial_bytes, scratch_bytes;
};

inline SquaredNormShape squared_norm_shape(const SquaredNormArgs& args, const StepLimits& limits) {
  SquaredNormShape shape{};
  shape.threads = 256 < limits.tile_threads ? 256 : static_cast<int>(limits.tile_threads);
  const int64_t tile = static_cast<int64_t>(shape.threads) * kShare;
  const int64_t tiles = args.state > tile ? (args.state + tile - 1) / tile : 1;
  shape.tiles = static_cast<int>(tiles);
  shape.blocks = args.batch * tiles < limits.max_blocks ? args.batch * tiles : limits.max_blocks;
  shape.shared_bytes = 8 * (shape.threads / kWarp + 1) + 8;
  shape.partial_bytes = tiles > 1 ? args.batch * tiles * 8 : 0;
  shape.scratch_bytes = tiles > 1 ? shape.partial_bytes + args.batch * 4 : 0;
  return shape;
}

template <class T>
PYDEQ_KERNEL(kMaxThreads, kResidentThreads)
squared_norm_kernel(PYDEQ_PARAMETER SquaredNormArgs args, PYDEQ_PARAMETER SquaredNormShape shape,
                    unsigned char* scratch) {
  using A = Compute<T>;
  constexpr int kPack = 16 / sizeof(T);
  constexpr int kGroup = 8 / (kShare / kPack);  // probes under way at once: eight loads of 16 bytes
  double* totals = shared_slice<double>(0, 1);
  const Sums sums{shared_slice<double>(8, block_warps()), 1};
  int* flag = shared_slice<int>(8 + 8 * block_warps(), 1);
  double* partial = reinterpret_cast<double*>(scratch);
  int32_t* arrived = reinterpret_cast<int32_t*>(scratch + shape.partial_bytes);
  for (int64_t item = block_index(); item < args.batch * shape.tiles; item += grid_blocks()) {
    const int64_t b = item / shape.tiles, t = item % shape.tiles;
    const Tile<kPack> tile(Team::whole_block(), t, args.state, 0);
    sums.clear();
    const T* row = static_cast<const T*>(args.x) + b * args.state;
    for (int64_t k = 0; k < args.probes; k += kGroup) {
      Share<T> rows[kGroup];
      PYDEQ_UNROLL_LOOP for (int i = 0; i < kGroup; ++i) {
        if (k + i < args.probes) load_share(row + (k + i) * args.batch * args.state, tile, rows[i]);
      }
      PYDEQ_UNROLL_LOOP for (int i = 0; i < kGroup; ++i) {
        if (k + i >= args.probes) continue;
        A x[kShare];
        widen_share<T>(rows[i], x);
        A square[1] = {dot_share<A>(x, x)};
        sums.add(0, square);
      }
    }
    sums.finish(totals);
    if (shape.tiles > 1) {
      store_partial(totals, partial + b * shape.tiles, 1, shape.tiles, t);
      if (!arrives_last(arrived + b, shape.tiles, flag)) continue;
      add_tiles(partial + b * shape.tiles, totals, 1, shape.tiles);
    }
    if (thread_index() == 0) {
      static_cast<A*>(args.y)[b] = static_cast<A>(totals[0] / static_cast<double>(args.probes));
    }
    block_sync();  // the next item takes the shared memory
  }
}

}  // namespace pydeq
