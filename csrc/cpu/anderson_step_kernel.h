// gram[b, k, j] = sum_d residuals[b, k, d] * residuals[b, j, d]           for the newest k
// next[b, d]    = sum_j a[j] * (values[b, j, d] - (1 - damping) * residuals[b, j, d])
//
// With m columns: reads z, f, m - 1 residuals and m values; writes one residual, one value, next. The image of the
// previous iterate is still in the ring and the iterate in next, so a best iterate is only copied once it is no longer
// the newest.
#pragma once

#include "cpu/small_solve.h"
#include "cpu/step.h"
#include "shared/anderson_step.h"

namespace pydeq {
namespace PYDEQ_ISA {
namespace {

template <class T>
struct AndersonStep {
  using A = Compute<T>;
  struct Plan {
    Verdict verdict;
    int64_t slot;     // of this evaluation
    int64_t columns;  // mixed; all that follows is [columns], newest first
    double* a;
    const T** values;
    const T** residuals;
  };
  const AndersonStepArgs& args;

  // ||g||^2 and ||f||^2, ||g||^2 as rounded to T, then <g, g_age>.
  int64_t sums() const { return 2 + args.memory; }
  int64_t products() const { return 0; }
  int64_t coefficients() const { return args.memory * (args.memory + 4); }

  T* ring(void* rows, int64_t b, int64_t slot) const {
    return static_cast<T*>(rows) + (b * args.slots + slot) * args.step.state;
  }
  // The slot of the column that is `age` evaluations older than the newest.
  int64_t aged(int64_t slot, int64_t age) const { return slot >= age ? slot - age : slot - age + args.slots; }
  int64_t older(const int32_t* counters) const {
    const int64_t count = counters[constants::COUNTER_COUNT];
    return count < args.memory ? count : args.memory - 1;
  }

  // sums[age] = <g, g_age> of a chunk, age in [1, older].
  template <class Sum>
  void column_dots(int64_t b, int64_t slot, int64_t older, int64_t begin, int64_t n, double* sums) const {
    dots<Sum>([&](int64_t j) { return ring(args.residuals, b, aged(slot, j + 1)) + begin; }, older,
              ring(args.residuals, b, slot) + begin, n, sums + 1);
  }

  void reduce(int64_t b, int64_t begin, int64_t n, double* sums) const {
    const Rows<T> row(args.step, b);
    const int64_t slot = row.counters[constants::COUNTER_HEAD], columns = older(row.counters);
    T *residual = ring(args.residuals, b, slot) + begin, *value = ring(args.values, b, slot) + begin;
    const bool keep = !args.step.rules.last;
    Lanes<A> rr = splat(A(0)), ff = splat(A(0));
    for_blocks(n, [&](int64_t i, auto part) {
      const Lanes<A> f = part.template load<A>(row.f + begin + i);
      const Lanes<A> g = f - part.template load<A>(row.z + begin + i);
      rr = rr + g * g;
      ff = ff + f * f;
      if (keep) {
        part.store(residual + i, g);
        part.store(value + i, f);
      }
    });
    for (int64_t i = 0; i < this->sums(); ++i) sums[i] = 0.0;
    sums[0] = sum(rr);
    sums[1] = sum(ff);
    if (!keep) return;
    // The Gram matrix is computed from the stored residuals, or it would not be positive definite.
    sums[2] = is_half<T> ? dot<A>(residual, residual, n) : sums[0];
    column_dots<A>(b, slot, columns, begin, n, sums + 2);
  }

  void decide(int64_t b, double* sums, Plan& plan, double* coefficients) const {
    using namespace constants;
    const Rows<T> row(args.step, b);
    int32_t* counters = row.counters;
    double residual, norm;
    const bool fits = norms(row, args.step.state, sums[0], sums[1], &residual, &norm);
    plan.verdict = judge(residual, norm, row.scalars, counters, args.step.rules);
    plan.slot = counters[COUNTER_HEAD];
    if (plan.verdict.retry) counters[COUNTER_COUNT] = 0;
    if (!plan.verdict.proceed) return;

    const int64_t previous = older(counters), slots = args.slots;
    if (!fits && sizeof(T) < 8) {  // float sums over- or underflowed: again in double
      for (int64_t i = 2; i < this->sums(); ++i) sums[i] = 0.0;
      double* part = coefficients;
      for (int64_t begin = 0; begin < args.step.state; begin += kChunk) {
        const int64_t left = args.step.state - begin, n = left < kChunk ? left : kChunk;
        const T* newest = ring(args.residuals, b, plan.slot) + begin;
        part[2] = dot<double>(newest, newest, n);
        column_dots<double>(b, plan.slot, previous, begin, n, part + 2);
        for (int64_t i = 2; i <= 2 + previous; ++i) sums[i] += part[i];
      }
    }
    double* gram = args.gram + b * slots * slots;
    for (int64_t age = 0; age <= previous; ++age) {
      const int64_t other = aged(plan.slot, age);
      gram[plan.slot * slots + other] = gram[other * slots + plan.slot] = sums[2 + age];
    }
    plan.a = coefficients;
    plan.columns =
        mixing_coefficients([&](int64_t i, int64_t j) { return gram[aged(plan.slot, i) * slots + aged(plan.slot, j)]; },
                            previous + 1, args.ridge, coefficients + args.memory, plan.a);
    // The solve is done with its scratch: it takes the pointers.
    plan.values = reinterpret_cast<const T**>(coefficients + args.memory);
    plan.residuals = plan.values + args.memory;
    for (int64_t age = 0; age < plan.columns; ++age) {
      plan.values[age] = ring(args.values, b, aged(plan.slot, age));
      plan.residuals[age] = ring(args.residuals, b, aged(plan.slot, age));
    }
    counters[COUNTER_COUNT] = static_cast<int32_t>(plan.columns);
    counters[COUNTER_HEAD] = static_cast<int32_t>((plan.slot + 1) % slots);
    // Mixing one column is a plain step. A retry would take the same step from a new best.
    if (plan.columns == 1 && plan.verdict.improved) counters[COUNTER_TRIED] = 1;
  }

  void apply(int64_t b, const Plan& plan, int64_t begin, int64_t n, double*) const {
    const Rows<T> row(args.step, b);
    const T* previous_image = ring(args.values, b, aged(plan.slot, 1));
    settle(row, plan.verdict, previous_image, args.damping, begin, n);
    if (!plan.verdict.proceed) return;
    T* next = row.next + begin;
    if (plan.columns == 1 && args.damping == 1.0) {
      copy(next, row.f + begin, n);
      return;
    }
    const A undamped = A(1.0 - args.damping);
    for_blocks(n, [&](int64_t i, auto part) {
      Lanes<A> mixed = splat(A(0));
      for (int64_t age = 0; age < plan.columns; ++age) {
        Lanes<A> value = part.template load<A>(plan.values[age] + begin + i);
        if (undamped != A(0)) value = value - undamped * part.template load<A>(plan.residuals[age] + begin + i);
        mixed = mixed + A(plan.a[age]) * value;
      }
      part.store(next + i, mixed);
    });
  }

  void close(int64_t, const Plan&, const double*) const {}
};

}  // namespace

void anderson_step(const AndersonStepArgs& args) {
  PYDEQ_DISPATCH(args.step.dtype, T, AndersonStep<T> step{args}; run_step(step, args.step));
}

}  // namespace PYDEQ_ISA
}  // namespace pydeq
