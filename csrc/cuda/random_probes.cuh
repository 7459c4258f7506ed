// out[k, b, d] = a random number that the seed and (k, b, d) decide                              out: [K, B, D]
//
// The words of block d / 4 (Gaussian) or d / 128 (Rademacher) are Philox of (block, b, k, distribution), as on the CPU,
// and numbers come from them by the same operations in the same order: the same bits.
//
// A block of at most 256 threads per kTurns tiles of 8 entries a thread of a row (k, b); neighbouring threads write
// neighbouring 16 bytes. The signs of a warp come from 8 or 16 blocks of words, each drawn by one lane and broadcast.
// One launch; writes out once, reads the seed's 8 bytes and nothing else.
#pragma once

#include "cuda/tile.cuh"
#include "shared/normal.h"
#include "shared/random_probes.h"

namespace pydeq {

// Tiles of a block, one after the other.
constexpr int kTurns = 4;

struct RandomProbesShape {
  int threads;
  int64_t parts, blocks;  // of a row, of the grid
};

inline RandomProbesShape random_probes_shape(const RandomProbesArgs& args, const StepLimits& limits) {
  RandomProbesShape shape{};
  const int64_t most = limits.tile_threads < 256 ? limits.tile_threads : 256;
  const int64_t warps = (args.state + kWarp * kShare - 1) / (kWarp * kShare);
  shape.threads = static_cast<int>(warps * kWarp < most ? warps * kWarp : most);
  if (shape.threads == 0) return shape;
  const int64_t part = static_cast<int64_t>(shape.threads) * kShare * kTurns;
  shape.parts = (args.state + part - 1) / part;
  const int64_t items = args.probes * args.batch * shape.parts;
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

// The words of the signs that a warp draws in kTurns tiles, a block of words to each of the first lanes.
template <int W>
struct Signs {
  static constexpr int kSigns = 128;                                 // of a block of words
  static constexpr int kPacks = kShare / W;                          // of a thread in a tile
  static constexpr int kSpan = kWarp * W;                            // entries of a warp's packs
  static constexpr int kEach = kSpan < kSigns ? 1 : kSpan / kSigns;  // blocks that they come from
  static_assert(kTurns * kPacks * kEach <= kWarp, "a lane draws at most one block");
  PhiloxBlock words;

  // first: the entry of the warp's first pack in the first tile; a tile is `threads` threads wide.
  PYDEQ_DEVICE Signs(PhiloxBlock counter, uint64_t seed, int64_t first, int threads) {
    const int which = lane_index() / kEach, turn = which / kPacks, p = which % kPacks;
    const int64_t from = first + (static_cast<int64_t>(turn) * kShare + p * W) * threads;
    counter.w[0] = static_cast<uint32_t>(from / kSigns + lane_index() % kEach);
    words = philox(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  }

  // This lane's W signs of pack p in this turn, which begins at entry d. Met by the whole warp.
  template <class A>
  PYDEQ_DEVICE void draw(int turn, int p, int64_t d, A* out) const {
    const int from = (turn * kPacks + p) * kEach + lane_index() * W / kSigns % kEach;
    uint32_t of_block[4];
    PYDEQ_UNROLL_LOOP for (int i = 0; i < 4; ++i) of_block[i] = warp_broadcast(words.w[i], from);
    const int at = static_cast<int>(d % kSigns);
    const uint32_t low = at & 32 ? of_block[1] : of_block[0], high = at & 32 ? of_block[3] : of_block[2];
    const uint32_t bits = (at & 64 ? high : low) >> at % 32;
    PYDEQ_UNROLL_LOOP for (int i = 0; i < W; ++i) out[i] = float_of_bits(kOne | (bits >> i) << 31);
  }
};

template <class T>
PYDEQ_KERNEL(kMaxThreads, kResidentThreads)
random_probes_kernel(PYDEQ_PARAMETER RandomProbesArgs args, PYDEQ_PARAMETER RandomProbesShape shape,
                     const int64_t* seed_at) {
  constexpr int kPack = 16 / sizeof(T), kPacks = kShare / kPack;
  const uint64_t seed = static_cast<uint64_t>(load_one(seed_at));
  const Team team = Team::whole_block();
  for (int64_t item = block_index(); item < args.probes * args.batch * shape.parts; item += grid_blocks()) {
    const int64_t row = item / shape.parts, begin = item % shape.parts * kTurns;
    const PhiloxBlock counter{{0, static_cast<uint32_t>(row % args.batch), static_cast<uint32_t>(row / args.batch),
                               static_cast<uint32_t>(args.distribution)}};
    T* out = static_cast<T*>(args.out) + row * args.state;
    Compute<T> numbers[kShare];
    if (args.distribution == constants::DISTRIBUTION_GAUSSIAN) {
      for (int turn = 0; turn < kTurns; ++turn) {
        const Tile<kPack> tile(team, begin + turn, args.state, 0);
        if (tile.first >= args.state) break;
        PYDEQ_UNROLL_LOOP for (int p = 0; p < kPacks; ++p) {
          draw_gaussian<kPack>(counter, seed, tile.pack(p), numbers + p * kPack);
        }
        store_wide(out, tile, numbers);
      }
    } else {
      const int64_t first = Tile<kPack>(team, begin, args.state, 0).first - lane_index() * kPack;
      const Signs<kPack> signs(counter, seed, first, team.threads);
      PYDEQ_UNROLL_LOOP for (int turn = 0; turn < kTurns; ++turn) {
        const Tile<kPack> tile(team, begin + turn, args.state, 0);
        PYDEQ_UNROLL_LOOP for (int p = 0; p < kPacks; ++p) { signs.draw(turn, p, tile.pack(p), numbers + p * kPack); }
        store_wide(out, tile, numbers);
      }
    }
  }
}

}  // namespace pydeq
