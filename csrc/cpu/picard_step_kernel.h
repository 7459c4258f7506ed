// next[b, d] = z[b, d] + damping * (f[b, d] - z[b, d])
//
// Reads z and f twice, the second time from the cache while a sample fits it; writes next. Without damping the image of
// the previous iterate is z itself, so a best iterate is only copied once it is no longer the newest.
#pragma once

#include "cpu/step.h"
#include "shared/picard_step.h"

namespace pydeq {
namespace PYDEQ_ISA {
namespace {

template <class T>
struct PicardStep {
  using A = Compute<T>;
  using Plan = Verdict;
  const PicardStepArgs& args;

  int64_t sums() const { return 2; }
  int64_t products() const { return 0; }
  int64_t coefficients() const { return 0; }

  void reduce(int64_t b, int64_t begin, int64_t n, double* sums) const {
    const Rows<T> row(args.step, b);
    Lanes<A> rr = splat(A(0)), ff = splat(A(0));
    for_blocks(n, [&](int64_t i, auto part) {
      const Lanes<A> f = part.template load<A>(row.f + begin + i);
      const Lanes<A> g = f - part.template load<A>(row.z + begin + i);
      rr = rr + g * g;
      ff = ff + f * f;
    });
    sums[0] = sum(rr);
    sums[1] = sum(ff);
  }

  void decide(int64_t b, const double* sums, Verdict& verdict, double*) const {
    const Rows<T> row(args.step, b);
    double residual, norm;
    norms(row, args.step.state, sums[0], sums[1], &residual, &norm);
    verdict = judge(residual, norm, row.scalars, row.counters, args.step.rules);
    // Every step is a plain one. A retry would take the same step from a new best.
    if (verdict.proceed && verdict.improved) row.counters[constants::COUNTER_TRIED] = 1;
  }

  void apply(int64_t b, const Verdict& verdict, int64_t begin, int64_t n, double*) const {
    const Rows<T> row(args.step, b);
    settle(row, verdict, args.damping == 1.0 ? row.z : nullptr, args.damping, begin, n);
    if (!verdict.proceed) return;
    if (args.damping == 1.0) {
      copy(row.next + begin, row.f + begin, n);
      return;
    }
    for_blocks(n, [&](int64_t i, auto part) {
      const Lanes<A> z = part.template load<A>(row.z + begin + i);
      const Lanes<A> g = part.template load<A>(row.f + begin + i) - z;
      part.store(row.next + begin + i, z + A(args.damping) * g);
    });
  }

  void close(int64_t, const Verdict&, const double*) const {}
};

}  // namespace

void picard_step(const PicardStepArgs& args) {
  PYDEQ_DISPATCH(args.step.dtype, T, PicardStep<T> step{args}; run_step(step, args.step));
}

}  // namespace PYDEQ_ISA
}  // namespace pydeq
