// y[b] = sum_d x[b, d]^2
//
// Reads x once. One sample a thread; a few large samples are spread by chunks.
#pragma once

#include <cstdlib>

#include "common/lanes.h"
#include "ops/squared_norm.h"

namespace pydeq {
namespace PYDEQ_ISA {
namespace {

template <class T>
struct SquaredNorm {
  const SquaredNormArgs& args;
  int64_t chunks;
  double* partial;  // [B, chunks]

  static void run(void* context, int64_t begin, int64_t end) {
    const SquaredNorm& self = *static_cast<const SquaredNorm*>(context);
    const int64_t state = self.args.state;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / self.chunks, first = i % self.chunks * kChunk;
      const int64_t n = state - first < kChunk ? state - first : kChunk;
      const T* x = static_cast<const T*>(self.args.x) + b * state + first;
      self.partial[i] = dot<Compute<T>>(x, x, n);
    }
  }
};

template <class T>
void run_squared_norm(const SquaredNormArgs& args) {
  const int64_t chunks = (args.state + kChunk - 1) / kChunk, count = args.batch * chunks;
  double* partial = static_cast<double*>(std::malloc(count * sizeof(double) + 1));
  SquaredNorm<T> work{args, chunks, partial};
  if (args.batch * args.state < kSerialWork) {
    SquaredNorm<T>::run(&work, 0, count);
  } else {
    args.parallel.run(count, SquaredNorm<T>::run, &work);
  }
  for (int64_t b = 0; b < args.batch; ++b) {
    double total = 0.0;
    for (int64_t c = 0; c < chunks; ++c) total += partial[b * chunks + c];
    static_cast<Compute<T>*>(args.y)[b] = static_cast<Compute<T>>(total);
  }
  std::free(partial);
}

}  // namespace

void squared_norm(const SquaredNormArgs& args) { PYDEQ_DISPATCH(args.dtype, T, run_squared_norm<T>(args)); }

}  // namespace PYDEQ_ISA
}  // namespace pydeq
