// y[b] = 1/K sum_k sum_d x[k, b, d]^2
//
// Reads x once. Each thread takes rows x[k, b, :]; if there are few large rows, it takes chunks.
#pragma once

#include <cstdlib>

#include "cpu/lanes.h"
#include "shared/squared_norm.h"

namespace pydeq {
namespace PYDEQ_ISA {
namespace {

template <class T>
struct SquaredNorm {
  const SquaredNormArgs& args;
  int64_t chunks;
  double* partial;  // [K, B, chunks]

  static void run(void* context, int64_t begin, int64_t end) {
    const SquaredNorm& self = *static_cast<const SquaredNorm*>(context);
    const int64_t state = self.args.state;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / self.chunks, first = i % self.chunks * kChunk;
      const int64_t n = state - first < kChunk ? state - first : kChunk;
      const T* x = static_cast<const T*>(self.args.x) + row * state + first;
      self.partial[i] = dot<Compute<T>>(x, x, n);
    }
  }
};

template <class T>
void run_squared_norm(const SquaredNormArgs& args) {
  const int64_t chunks = (args.state + kChunk - 1) / kChunk, rows = args.probes * args.batch;
  const int64_t count = rows * chunks;
  double* partial = static_cast<double*>(std::malloc(count * sizeof(double) + 1));
  SquaredNorm<T> work{args, chunks, partial};
  if (rows * args.state < kSerialWork) {
    SquaredNorm<T>::run(&work, 0, count);
  } else {
    args.parallel.run(count, SquaredNorm<T>::run, &work);
  }
  for (int64_t b = 0; b < args.batch; ++b) {
    double total = 0.0;
    for (int64_t k = 0; k < args.probes; ++k) {
      const double* row = partial + (k * args.batch + b) * chunks;
      for (int64_t c = 0; c < chunks; ++c) total += row[c];
    }
    static_cast<Compute<T>*>(args.y)[b] = static_cast<Compute<T>>(total / static_cast<double>(args.probes));
  }
  std::free(partial);
}

}  // namespace

void squared_norm(const SquaredNormArgs& args) { PYDEQ_DISPATCH(args.dtype, T, run_squared_norm<T>(args)); }

}  // namespace PYDEQ_ISA
}  // namespace pydeq
