// Philox 4x32-10: a bijection of 128-bit counters for each 64-bit key, whose images pass as random (Salmon, Moraes,
// Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011). No state: any thread can draw any number.
//
// For host and device. Only 32-bit words and their 64-bit products are used, so the words are the same everywhere.
#pragma once

#include <cstdint>

#include "pydeq_constants.h"

#if defined(__CUDACC__)
#define PYDEQ_EVERYWHERE __host__ __device__ __forceinline__
#else
#define PYDEQ_EVERYWHERE inline
#endif

namespace pydeq {
namespace {

struct PhiloxBlock {
  uint32_t w[4];
};

// The random words of `counter` under the key (key0, key1).
PYDEQ_EVERYWHERE PhiloxBlock philox(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < constants::PHILOX_ROUNDS; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(constants::PHILOX_MULTIPLIERS_0) * counter.w[0];
    const uint64_t p1 = static_cast<uint64_t>(constants::PHILOX_MULTIPLIERS_1) * counter.w[2];
    const uint32_t high0 = static_cast<uint32_t>(p0 >> 32), high1 = static_cast<uint32_t>(p1 >> 32);
    counter = {{high1 ^ counter.w[1] ^ key0, static_cast<uint32_t>(p1), high0 ^ counter.w[3] ^ key1,
                static_cast<uint32_t>(p0)}};
    key0 += static_cast<uint32_t>(constants::PHILOX_INCREMENTS_0);
    key1 += static_cast<uint32_t>(constants::PHILOX_INCREMENTS_1);
  }
  return counter;
}

}  // namespace
}  // namespace pydeq
