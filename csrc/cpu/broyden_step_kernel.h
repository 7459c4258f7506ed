// c[j]      = theta[j] (<s_j, g> + sum_{i<j} c[i] <s_j, u_i>) / ||s_j||^2
// s_{k+1}   = (g + sum_{j<k} c[j] u_j) / (1 - theta[k] a),   a as c[k] without theta
// next[b,d] = z[b,d] + s_{k+1}[b,d]
//
// u_j is s_{j+1}, except u_0 after a restart, which is stored.
//
// With k + 1 steps stored: reads z and f (twice, the second time from the cache while a sample fits it), s_0..s_k in
// the first pass and u_0..u_{k-1} in the second, which also forms the new row of the Gram matrix; writes the new step,
// next and the image of an improved iterate.
#pragma once

#include "cpu/step.h"
#include "shared/broyden_step.h"

namespace pydeq {
namespace PYDEQ_ISA {
namespace {

// Elements of all steps that the second pass visits at once: the rows that v is combined from are still in the
// first-level cache when v is multiplied with them.
constexpr int64_t kTile = 256;
// Number of columns with products computed in the same pass; products of further columns follow after the chunk.
constexpr int64_t kColumns = 64;

// v[i] += sum_j c[j] rows(j)[i], four rows at a time so that v passes through the registers less often.
template <class A, class Row>
inline void accumulate(A* v, Row row, const double* c, int64_t count, int64_t n) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    const A c0 = A(c[j]), c1 = A(c[j + 1]), c2 = A(c[j + 2]), c3 = A(c[j + 3]);
    const A *r0 = row(j), *r1 = row(j + 1), *r2 = row(j + 2), *r3 = row(j + 3);
    for_blocks(n, [&](int64_t i, auto part) {
      Lanes<A> x = part.template load<A>(v + i);
      x = x + c0 * part.template load<A>(r0 + i);
      x = x + c1 * part.template load<A>(r1 + i);
      x = x + c2 * part.template load<A>(r2 + i);
      x = x + c3 * part.template load<A>(r3 + i);
      part.store(v + i, x);
    });
  }
  for (; j < count; ++j) {
    const A cj = A(c[j]);
    const A* r = row(j);
    for_blocks(n, [&](int64_t i, auto part) {
      part.store(v + i, part.template load<A>(v + i) + cj * part.template load<A>(r + i));
    });
  }
}

template <class T>
struct BroydenStep {
  using A = Compute<T>;
  enum class Kind { first, next, restart };
  struct Plan {
    Verdict verdict;
    Kind kind;
    int64_t slot;    // of the new step
    bool restarted;  // factor 0 is the explicit one
    bool wide;       // sums of float products overflowed or underflowed: compute them in double
    double* c;       // [slot] coefficients of u_0, u_1, ...
    double scale;    // next: 1 / (1 - theta a); restart: u_0 = scale (s + y)
    double weight;   // restart: <s, g> / ||s||^2
  };
  const BroydenStepArgs& args;

  // ||g||^2 and ||f||^2, <s, g_previous> before a restart, then <s_j, g>.
  int64_t sums() const { return 3 + args.stored; }
  int64_t products() const { return args.stored; }
  int64_t coefficients() const { return args.stored + 1; }

  A* row_of(void* rows, int64_t b) const { return static_cast<A*>(rows) + b * args.step.state; }
  A* step_row(int64_t j, int64_t b) const { return row_of(args.steps[j], b); }
  bool full(int64_t count) const { return count == args.memory + 1; }

  // g = f - z of a chunk, with z before rounding.
  void residual(const Rows<T>& row, int64_t b, int64_t begin, int64_t n, A* g) const {
    if constexpr (is_half<T>) {
      const A* iterate = row_of(args.iterate, b) + begin;
      for_blocks(n, [&](int64_t i, auto part) {
        part.store(g + i, part.template load<A>(row.f + begin + i) - part.template load<A>(iterate + i));
      });
    } else {
      for_blocks(n, [&](int64_t i, auto part) {
        part.store(g + i, part.template load<A>(row.f + begin + i) - part.template load<A>(row.z + begin + i));
      });
    }
  }

  template <class Sum>
  void step_dots(int64_t b, int64_t count, const A* g, int64_t begin, int64_t n, double* sums) const {
    const int64_t newest = count - 1;
    if (full(count)) {
      const A* s = step_row(newest, b) + begin;
      sums[2] = dot<Sum>(s, row_of(args.restart, b) + begin, n);
      sums[3 + newest] = dot<Sum>(s, g, n);
      return;
    }
    dots<Sum>([&](int64_t j) { return step_row(j, b) + begin; }, count, g, n, sums + 3);
  }

  PYDEQ_FLATTEN void reduce(int64_t b, int64_t begin, int64_t n, double* sums) const {
    const Rows<T> row(args.step, b);
    A g[kChunk];
    Lanes<A> rr = splat(A(0)), ff = splat(A(0));
    for_blocks(n, [&](int64_t i, auto part) {
      const Lanes<A> f = part.template load<A>(row.f + begin + i);
      const Lanes<A> difference = f - part.template load<A>(row.z + begin + i);
      rr = rr + difference * difference;
      ff = ff + f * f;
      part.store(g + i, difference);
    });
    for (int64_t i = 0; i < this->sums(); ++i) sums[i] = 0.0;
    sums[0] = sum(rr);
    sums[1] = sum(ff);
    if (args.step.rules.last) return;
    if (is_half<T>) residual(row, b, begin, n, g);
    step_dots<A>(b, row.counters[constants::COUNTER_COUNT], g, begin, n, sums);
  }

  void decide(int64_t b, double* sums, Plan& plan, double* coefficients) const {
    using namespace constants;
    const Rows<T> row(args.step, b);
    int32_t* counters = row.counters;
    double norm_g, norm_f;
    const bool fits = norms(row, args.step.state, sums[0], sums[1], &norm_g, &norm_f);
    plan.verdict = judge(norm_g, norm_f, row.scalars, counters, args.step.rules);
    plan.wide = !fits && sizeof(T) < 8;
    if (plan.verdict.retry) counters[COUNTER_COUNT] = 0;
    if (!plan.verdict.proceed) return;

    const int64_t count = counters[COUNTER_COUNT], k = count - 1, K = args.capacity;
    double *gram = args.gram + b * K * K, *theta = args.thetas + b * K;
    if (plan.wide && count > 0) sum_again(row, b, count, sums);
    const double* t = sums + 3;
    plan.c = coefficients;
    plan.restarted = counters[COUNTER_RESTARTED];
    bool sound = false;
    if (full(count)) {
      plan.kind = Kind::restart;
      const double squared = gram[k * K + k], gamma = -(t[k] - sums[2]) / squared;
      const double damping = denominator_damping(gamma);
      plan.scale = damping / (1.0 - damping + damping * gamma);
      plan.weight = t[k] / squared;
      plan.slot = 1;
      sound = finite(plan.scale) && finite(plan.weight);
      gram[0] = squared;
      theta[0] = 1.0;
    } else if (count > 0) {
      plan.kind = Kind::next;
      double a = 0.0;
      for (int64_t j = 0; j < count; ++j) {
        double total = t[j];
        for (int64_t i = 0; i < j; ++i) total += plan.c[i] * gram[j * K + (plan.restarted && i == 0 ? 0 : i + 1)];
        a = total / gram[j * K + j];
        plan.c[j] = theta[j] * a;
      }
      theta[k] = denominator_damping(1.0 - a);
      plan.scale = 1.0 / (1.0 - theta[k] * a);
      plan.slot = count;
      sound = finite(theta[k] * a);
    }
    if (!sound) {
      plan.kind = Kind::first;
      plan.slot = 0;
      // A retry would take the same plain step from a new best.
      if (plan.verdict.improved) counters[COUNTER_TRIED] = 1;
    }
    if (plan.kind != Kind::next) plan.restarted = plan.kind == Kind::restart;
    counters[COUNTER_COUNT] = static_cast<int32_t>(plan.slot + 1);
    counters[COUNTER_RESTARTED] = plan.restarted;
  }

  void sum_again(const Rows<T>& row, int64_t b, int64_t count, double* sums) const {
    A g[kChunk];
    for (int64_t i = 2; i < this->sums(); ++i) sums[i] = 0.0;
    for (int64_t begin = 0; begin < args.step.state; begin += kChunk) {
      const int64_t left = args.step.state - begin, n = left < kChunk ? left : kChunk;
      residual(row, b, begin, n, g);
      for (int64_t j = full(count) ? count - 1 : 0; j < count; ++j) {
        sums[3 + j] += dot<double>(step_row(j, b) + begin, g, n);
      }
      if (full(count)) sums[2] += dot<double>(step_row(count - 1, b) + begin, row_of(args.restart, b) + begin, n);
    }
  }

  PYDEQ_FLATTEN void apply(int64_t b, const Plan& plan, int64_t begin, int64_t n, double* products) const {
    const Rows<T> row(args.step, b);
    settle<T>(row, plan.verdict, nullptr, 1.0, begin, n);
    A* iterate = is_half<T> ? row_of(args.iterate, b) + begin : nullptr;
    if (is_half<T> && plan.verdict.retry) {
      for_blocks(n,
                 [&](int64_t i, auto part) { part.store(iterate + i, part.template load<A>(row.next + begin + i)); });
    }
    if (!plan.verdict.proceed) return;

    // The next step may restart, and then needs this whole residual. It cannot replace u_0, which is in use until the
    // end.
    A* u0 = args.restart ? row_of(args.restart, b) + begin : nullptr;
    const bool keep = u0 && plan.slot == args.memory;
    A residuals[kChunk];
    const int64_t from = first_column(plan), count = plan.slot + 1 - from;
    const int64_t along = plan.wide ? 0 : count < kColumns ? count : kColumns;
    Lanes<A> totals[kColumns];
    for (int64_t j = 0; j < along; ++j) totals[j] = splat(A(0));
    for (int64_t i = 0; i < n; i += kTile) {
      advance(row, b, plan, begin + i, n - i < kTile ? n - i : kTile, residuals + (keep ? i : 0), along, totals);
    }
    for (int64_t j = 0; j < along; ++j) products[from + j] = sum(totals[j]);
    const A* newest = step_row(plan.slot, b) + begin;
    const auto rest = [&](int64_t j) { return column(plan, b, from + along + j) + begin; };
    if (plan.wide) {
      dots<double>(rest, count - along, newest, n, products + from + along);
    } else {
      dots<A>(rest, count - along, newest, n, products + from + along);
    }
    if (keep) copy(u0, residuals, n);
  }

  // The factor of the new step for entry j of its row of the Gram matrix: s_j, or u_0 after a restart. No coefficient
  // needs <s_j, s_0>.
  int64_t first_column(const Plan& plan) const { return plan.slot > 0 && !plan.restarted ? 1 : 0; }
  A* column(const Plan& plan, int64_t b, int64_t j) const {
    return j == 0 && plan.restarted ? row_of(args.restart, b) : step_row(j, b);
  }
  // u_j, the vector of coefficient j.
  A* factor(const Plan& plan, int64_t b, int64_t j) const {
    return j == 0 && plan.restarted ? row_of(args.restart, b) : step_row(j + 1, b);
  }

  // The new step and the next iterate of a tile; products with the first `along` columns are added to totals.
  void advance(const Rows<T>& row, int64_t b, const Plan& plan, int64_t begin, int64_t n, A* g, int64_t along,
               Lanes<A>* totals) const {
    A v[kTile];
    residual(row, b, begin, n, g);
    copy(v, g, n);
    if (plan.kind == Kind::restart) {
      const A* s = step_row(args.memory, b) + begin;
      A *kept = step_row(0, b) + begin, *u0 = row_of(args.restart, b) + begin;
      const A scale = A(plan.scale), weight = A(plan.weight);
      for_blocks(n, [&](int64_t i, auto part) {
        const Lanes<A> newest = part.template load<A>(s + i), x = part.template load<A>(g + i);
        const Lanes<A> w = scale * (newest + (x - part.template load<A>(u0 + i)));
        part.store(kept + i, newest);
        part.store(u0 + i, w);
        part.store(v + i, x + weight * w);
      });
    } else if (plan.kind == Kind::next) {
      accumulate(v, [&](int64_t j) { return factor(plan, b, j) + begin; }, plan.c, plan.slot - 1, n);
      const A scale = A(plan.scale);
      for_blocks(n, [&](int64_t i, auto part) { part.store(v + i, scale * part.template load<A>(v + i)); });
    }

    A *stored = step_row(plan.slot, b) + begin, *iterate = is_half<T> ? row_of(args.iterate, b) + begin : nullptr;
    for_blocks(n, [&](int64_t i, auto part) {
      const Lanes<A> s = part.template load<A>(v + i);
      part.store(stored + i, s);
      if constexpr (is_half<T>) {
        const Lanes<A> moved = part.template load<A>(iterate + i) + s;
        part.store(iterate + i, moved);
        part.store(row.next + begin + i, moved);
      } else {
        part.store(row.next + begin + i, part.template load<A>(row.z + begin + i) + s);
      }
    });
    const int64_t from = first_column(plan);
    add_products([&](int64_t j) { return column(plan, b, from + j) + begin; }, along, v, n, totals);
  }

  void close(int64_t b, const Plan& plan, const double* products) const {
    if (!plan.verdict.proceed) return;
    double* gram = args.gram + (b * args.capacity + plan.slot) * args.capacity;
    for (int64_t j = first_column(plan); j <= plan.slot; ++j) gram[j] = products[j];
  }
};

}  // namespace

void broyden_step(const BroydenStepArgs& args) {
  PYDEQ_DISPATCH(args.step.dtype, T, BroydenStep<T> step{args}; run_step(step, args.step));
}

}  // namespace PYDEQ_ISA
}  // namespace pydeq
