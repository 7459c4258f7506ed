// out[k, b, d] = a random number that the seed and (k, b, d) decide
//
// The counter of a block of random words is (block, b, k, distribution): a Gaussian block has 4 numbers, a Rademacher
// block 128 signs, of which block d / 4 or d / 128 has entry d. So a sample's probes do not depend on other samples,
// and the first probes do not depend on the number of probes.
//
// Writes out once, 128 entries at a time; a chunk of a row for each piece of work.
#pragma once

#include "cpu/lanes.h"
#include "shared/normal.h"
#include "shared/random_probes.h"

namespace pydeq {
namespace PYDEQ_ISA {
namespace {

constexpr int kGroup = 128;
static_assert(kChunk % kGroup == 0, "a group lies in one chunk");

template <class T>
struct RandomProbes {
  const RandomProbesArgs& args;
  int64_t chunks;

  static void run(void* context, int64_t begin, int64_t end) {
    const RandomProbes& self = *static_cast<const RandomProbes*>(context);
    const int64_t state = self.args.state;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / self.chunks, first = i % self.chunks * kChunk;
      const int64_t last = state - first < kChunk ? state : first + kChunk;
      const uint32_t b = static_cast<uint32_t>(row % self.args.batch), k = static_cast<uint32_t>(row / self.args.batch);
      for (int64_t d = first; d < last; d += kGroup) {
        alignas(64) float group[kGroup];
        if (self.args.distribution == constants::DISTRIBUTION_GAUSSIAN) {
          self.gaussian(group, d, b, k);
        } else {
          self.rademacher(group, d, b, k);
        }
        T* out = static_cast<T*>(self.args.out) + row * state + d;
        for_blocks(last - d < kGroup ? last - d : kGroup,
                   [&](int64_t i, auto part) { part.store(out + i, PYDEQ_ISA::load<Compute<T>>(group + i)); });
      }
    }
  }

  PhiloxBlock words(int64_t block, uint32_t b, uint32_t k) const {
    const PhiloxBlock counter{{static_cast<uint32_t>(block), b, k, static_cast<uint32_t>(args.distribution)}};
    return philox(counter, static_cast<uint32_t>(args.seed), static_cast<uint32_t>(args.seed >> 32));
  }

  void gaussian(float* group, int64_t d, uint32_t b, uint32_t k) const {
    uint32_t w[4][kGroup / 4];
    for (int j = 0; j < kGroup / 4; ++j) {
      const PhiloxBlock block = words(d / 4 + j, b, k);
      for (int i = 0; i < 4; ++i) w[i][j] = block.w[i];
    }
    for (int j = 0; j < kGroup / 4; ++j) {
      const NormalPair one = normal_pair(w[0][j], w[1][j]), two = normal_pair(w[2][j], w[3][j]);
      group[4 * j] = one.first;
      group[4 * j + 1] = one.second;
      group[4 * j + 2] = two.first;
      group[4 * j + 3] = two.second;
    }
  }

  void rademacher(float* group, int64_t d, uint32_t b, uint32_t k) const {
    const PhiloxBlock block = words(d / kGroup, b, k);
    for (int i = 0; i < 4; ++i) {
      for (int bit = 0; bit < 32; ++bit) group[32 * i + bit] = float_of_bits(kOne | (block.w[i] >> bit) << 31);
    }
  }
};

template <class T>
void run_random_probes(const RandomProbesArgs& args) {
  const int64_t chunks = (args.state + kChunk - 1) / kChunk, count = args.probes * args.batch * chunks;
  RandomProbes<T> work{args, chunks};
  // Drawing a number costs as much as reading several.
  if (args.probes * args.batch * args.state < kSerialWork / 4) {
    RandomProbes<T>::run(&work, 0, count);
  } else {
    args.parallel.run(count, RandomProbes<T>::run, &work);
  }
}

}  // namespace

void random_probes(const RandomProbesArgs& args) { PYDEQ_DISPATCH(args.dtype, T, run_random_probes<T>(args)); }

}  // namespace PYDEQ_ISA
}  // namespace pydeq
