// out[k, b, d] = a random number that the seed and (k, b, d) decide                              out: [K, B, D]
//
// The words of block d / 4 (Gaussian) or d / 128 (Rademacher) are Philox of (block, b, k, distribution), as on the CPU,
// and numbers come from them by the same operations in the same order: the same bits.
//
// A block of at most 256 threads per tile of 8 entries a thread of a row (k, b); neighbouring threads write
// neighbouring 16 bytes. One launch; writes out once, reads the seed's 8 bytes and nothing else.
#pragma once

#include "common/normal.h"
#include "common/tile.cuh"
#include "ops/random_probes.h"

namespace pydeq {

struct RandomProbesShape {
  int threads;
  int64_t tiles, blocks;
};

inline RandomProbesShape random_probes_shape(const RandomProbesArgs& args, const StepLimits& limits) {
  RandomProbesShape shape{};
  const int64_t most = limits.tile_threads < 256 ? limits.tile_threads : 256;
  const int64_t warps = (args.state + kWarp * kShare - 1) / (kWarp * kShare);
  shape.threads = static_cast<int>(warps * kWarp < most ? warps * kWarp : most);
  if (shape.threads == 0) return shape;
  const int64_t tile = static_cast<int64_t>(shape.threads) * kShare;
  shape.tiles = (args.state + tile - 1) / tile;
  const int64_t items = args.probes * args.batch * shape.tiles;
  shape.blocks = items < limits.max_blocks ? items : limits.max_blocks;
  return shape;
}

// Entries [d, d + W) of a row; W divides d.
template <int W, class A>
PYDEQ_DEVICE void draw_gaussian(PhiloxBlock counter, uint64_t seed, int64_t d, A* out) {
  constexpr int kBlock = W < 4 ? W : 4;
  PYDEQ_UNROLL_LOOP for (int i = 0; i < W; i += kBlock) {
    counter.w[0] = static_cast<uint32_t>((d + i) / 4);
    const PhiloxBlock words = philox(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    PYDEQ_UNROLL_LOOP for (int j = 0; j < kBlock; j += 2) {
      const bool second = (d + i + j) % 4 == 2;
      const NormalPair pair = normal_pair(second ? words.w[2] : words.w[0], second ? words.w[3] : words.w[1]);
      out[i + j] = pair.first;
      out[i + j + 1] = pair.second;
    }
  }
}

template <int W, class A>
PYDEQ_DEVICE void draw_rademacher(PhiloxBlock counter, uint64_t seed, int64_t d, A* out) {
  counter.w[0] = static_cast<uint32_t>(d / 128);
  const PhiloxBlock words = philox(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  const int at = static_cast<int>(d % 128);
  const uint32_t low = at & 32 ? words.w[1] : words.w[0], high = at & 32 ? words.w[3] : words.w[2];
  const uint32_t bits = (at & 64 ? high : low) >> at % 32;
  PYDEQ_UNROLL_LOOP for (int i = 0; i < W; ++i) out[i] = float_of_bits(kOne | (bits >> i) << 31);
}

template <class T>
PYDEQ_KERNEL(kMaxThreads, kResidentThreads)
random_probes_kernel(PYDEQ_PARAMETER RandomProbesArgs args, PYDEQ_PARAMETER RandomProbesShape shape,
                     const int64_t* seed_at) {
  constexpr int kPack = 16 / sizeof(T);
  const uint64_t seed = static_cast<uint64_t>(load_one(seed_at));
  for (int64_t item = block_index(); item < args.probes * args.batch * shape.tiles; item += grid_blocks()) {
    const int64_t row = item / shape.tiles, t = item % shape.tiles;
    const Tile<kPack> tile(Team::whole_block(), t, args.state, 0);
    const PhiloxBlock counter{{0, static_cast<uint32_t>(row % args.batch), static_cast<uint32_t>(row / args.batch),
                               static_cast<uint32_t>(args.distribution)}};
    Compute<T> numbers[kShare];
    PYDEQ_UNROLL_LOOP for (int p = 0; p < kShare / kPack; ++p) {
      if (args.distribution == protocol::DISTRIBUTION_GAUSSIAN) {
        draw_gaussian<kPack>(counter, seed, tile.pack(p), numbers + p * kPack);
      } else {
        draw_rademacher<kPack>(counter, seed, tile.pack(p), numbers + p * kPack);
      }
    }
    store_wide(static_cast<T*>(args.out) + row * args.state, tile, numbers);
  }
}

}  // namespace pydeq
