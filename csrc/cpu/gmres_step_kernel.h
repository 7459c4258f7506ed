// products[i] = <V_i, g> / ||g||                                     h, x, r, the next point: from coordinates in V
// V_n[b,d]    = (g[b,d] / ||g|| - sum_i h[i] V_i[b,d]) / ||g / ||g|| - V h||
// next[b,d]   = start[b,d] + beta (sum_{i<n} point[i] V_i[b,d] + point[n] V_n[b,d])
//
// With n vectors in the basis: reads z and f (twice, the second time from the cache while a sample fits it), start and
// V_0..V_{n-1} in both passes; the second also forms the new row of the Gram matrix, from chunks that are still in the
// cache. Writes V_n, next and the image of an improved iterate.
#pragma once

#include "cpu/krylov.h"
#include "cpu/step.h"
#include "shared/gmres_step.h"

namespace pydeq {
namespace PYDEQ_ISA {
namespace {

// v[i] -= sum_j h[j] rows[j][i] and y[i] += sum_j c[j] rows[j][i], four rows at a time. No v where h is null.
template <class A, class Row>
inline void combine(A* v, A* y, Row row, const double* h, const double* c, int64_t count, int64_t n) {
  for (int64_t j = 0; j < count; j += 4) {
    const int64_t group = count - j < 4 ? count - j : 4;
    const A* r[4];
    A to_v[4], to_y[4];
    for (int64_t i = 0; i < group; ++i) {
      r[i] = row(j + i);
      to_v[i] = h ? A(-h[j + i]) : A(0);
      to_y[i] = A(c[j + i]);
    }
    for_blocks(n, [&](int64_t i, auto part) {
      Lanes<A> at_y = part.template load<A>(y + i), at_v = h ? part.template load<A>(v + i) : at_y;
      for (int64_t k = 0; k < group; ++k) {
        const Lanes<A> x = part.template load<A>(r[k] + i);
        at_y = at_y + to_y[k] * x;
        if (h) at_v = at_v + to_v[k] * x;
      }
      part.store(y + i, at_y);
      if (h) part.store(v + i, at_v);
    });
  }
}

template <class T>
struct GmresStep {
  using A = Compute<T>;
  enum class Kind { plain, begin, extend, close };
  struct Plan {
    Verdict verdict;
    Kind kind;
    bool wide;       // sums of float products overflowed or underflowed: compute them in double
    int64_t n;       // basis vectors before this step
    double inverse;  // 1 / ||g||
    double inverse_remainder;
    double beta;
    const double* h;      // [n]
    const double* point;  // [n + 1], [n] where the cycle closes
  };
  const GmresStepArgs& args;

  // ||f - z||^2 and ||f||^2, ||g||^2, then <V_i, g>.
  int64_t sums() const { return 3 + args.stored; }
  int64_t products() const { return args.stored; }
  int64_t coefficients() const { return extension_size(args.stored) + args.stored + 1; }

  A* row_of(void* rows, int64_t b) const { return static_cast<A*>(rows) + b * args.step.state; }
  A* basis_row(int64_t i, int64_t b) const { return row_of(args.basis[i], b); }
  double* matrix(double* all, int64_t b) const { return all + b * args.capacity * args.capacity; }
  double* coordinates(int64_t b, int64_t row) const {
    return args.coordinates + (b * constants::COORDINATE_SIZE + row) * args.capacity;
  }

  // g = f - z of a chunk, with z before rounding.
  void residual(const Rows<T>& row, int64_t b, int64_t begin, int64_t n, A* g) const {
    for_blocks(n, [&](int64_t i, auto part) {
      const Lanes<A> f = part.template load<A>(row.f + begin + i);
      if constexpr (is_half<T>) {
        part.store(g + i, f - part.template load<A>(row_of(args.iterate, b) + begin + i));
      } else {
        part.store(g + i, f - part.template load<A>(row.z + begin + i));
      }
    });
  }

  template <class Sum>
  void basis_dots(int64_t b, int64_t count, const A* g, int64_t begin, int64_t n, double* sums) const {
    if (is_half<T>) sums[2] = dot<Sum>(g, g, n);
    dots<Sum>([&](int64_t i) { return basis_row(i, b) + begin; }, count, g, n, sums + 3);
  }

  void reduce(int64_t b, int64_t begin, int64_t n, double* sums) const {
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
    basis_dots<A>(b, row.counters[constants::COUNTER_COUNT], g, begin, n, sums);
  }

  void sum_again(const Rows<T>& row, int64_t b, int64_t count, double* sums, double* part) const {
    A g[kChunk];
    for (int64_t i = 2; i < this->sums(); ++i) sums[i] = 0.0;
    for (int64_t begin = 0; begin < args.step.state; begin += kChunk) {
      const int64_t left = args.step.state - begin, n = left < kChunk ? left : kChunk;
      residual(row, b, begin, n, g);
      part[2] = 0.0;
      basis_dots<double>(b, count, g, begin, n, part);
      for (int64_t i = 2; i < 3 + count; ++i) sums[i] += part[i];
    }
  }

  void decide(int64_t b, double* sums, Plan& plan, double* coefficients) const {
    using namespace constants;
    const Rows<T> row(args.step, b);
    int32_t* counters = row.counters;
    double norm_g, norm_f;
    const bool fits = norms(row, args.step.state, sums[0], sums[1], &norm_g, &norm_f);
    plan.verdict = judge(norm_g, norm_f, row.scalars, counters, args.step.rules);
    if (plan.verdict.retry) counters[COUNTER_COUNT] = 0;
    if (!plan.verdict.proceed) return;

    const int64_t n = counters[COUNTER_COUNT];
    plan.n = n;
    plan.wide = sizeof(T) < 8 && (!fits || (is_half<T> && !in_range<T>(sums[2])));
    if (plan.wide) sum_again(row, b, n, sums, coefficients);
    const double size = is_half<T> ? __builtin_sqrt(sums[2]) : norm_g;
    plan.inverse = 1.0 / size;
    bool sound = false;
    if (n > 0) sound = continue_cycle(b, row, size, sums + 3, plan, coefficients);
    if (!sound) {
      const bool normal = size > 0.0 && finite(double(A(plan.inverse)));
      plan.kind = normal ? Kind::begin : Kind::plain;
      counters[COUNTER_COUNT] = normal;
      // A retry would take the same plain step from a new best.
      if (plan.verdict.improved) counters[COUNTER_TRIED] = 1;
      if (normal) {
        args.lengths[b] = size;
        coordinates(b, COORDINATE_MINIMUM)[0] = 0.0;
        coordinates(b, COORDINATE_RESIDUAL)[0] = coordinates(b, COORDINATE_POINT)[0] = 1.0;
      }
    }
  }

  // Adds g to the least-squares problem and chooses the next point. Returns false if a number is not finite.
  bool continue_cycle(int64_t b, const Rows<T>& row, double size, double* products, Plan& plan,
                      double* coefficients) const {
    using namespace constants;
    const int64_t n = plan.n, K = args.capacity;
    const double beta = args.lengths[b], ratio = size / beta;
    const double unit = size > 0.0 ? size : 1.0;
    for (int64_t i = 0; i < n; ++i) products[i] /= unit;
    plan.inverse = 1.0 / unit;
    const Cycle cycle{n,
                      K,
                      matrix(args.gram, b),
                      matrix(args.images, b),
                      matrix(args.directions, b),
                      coordinates(b, COORDINATE_MINIMUM),
                      coordinates(b, COORDINATE_RESIDUAL),
                      coordinates(b, COORDINATE_POINT)};
    double before = 0.0;
    const Extension add = extend(cycle, products, ratio, epsilon<A>, coefficients + args.stored + 1, before);
    if (!add.sound) return false;

    const double target = closing_residual(row.scalars, args.step.rules, epsilon<T>);
    const bool closes = add.known <= target / beta || add.remainder == 0.0 || !add.usable || n == args.restart ||
                        (ratio > before && args.penultimate);
    plan.beta = beta;
    plan.h = add.h;
    double* point = coefficients;
    plan.point = point;
    if (closes) {
      plan.kind = Kind::close;
      for (int64_t i = 0; i < n; ++i) point[i] = add.x[i];
      row.counters[COUNTER_COUNT] = row.counters[COUNTER_FAR] = 0;  // the solution is evaluated next
      return true;
    }
    plan.kind = Kind::extend;
    plan.inverse_remainder = 1.0 / add.remainder;
    for (int64_t i = 0; i < n; ++i) point[i] = add.x[i] + add.gain * add.rho[i];
    point[n] = add.gain * newest_share(add.rho[n], add.known);

    for (int64_t i = 0; i < n - 1; ++i) cycle.images[i * K + n] = cycle.directions[i * K + n] = 0.0;
    for (int64_t i = 0; i <= n; ++i) {
      cycle.images[(n - 1) * K + i] = add.image[i];
      cycle.directions[(n - 1) * K + i] = i < n ? add.direction[i] : 0.0;
      cycle.x[i] = i < n ? add.x[i] : 0.0;
      cycle.rho[i] = add.rho[i];
      cycle.point[i] = point[i];
    }
    row.counters[COUNTER_COUNT] = static_cast<int32_t>(n + 1);
    return true;
  }

  void apply(int64_t b, const Plan& plan, int64_t begin, int64_t n, double* products) const {
    const Rows<T> row(args.step, b);
    settle<T>(row, plan.verdict, nullptr, 1.0, begin, n);
    A* iterate = is_half<T> ? row_of(args.iterate, b) + begin : nullptr;
    const auto follow = [&] {  // next, which is not a rounded one
      for_blocks(n,
                 [&](int64_t i, auto part) { part.store(iterate + i, part.template load<A>(row.next + begin + i)); });
    };
    if (is_half<T> && plan.verdict.retry) follow();
    if (!plan.verdict.proceed) return;

    A v[kChunk], y[kChunk];
    A* start = row_of(args.start, b) + begin;
    const A inverse = A(plan.inverse);
    if (plan.kind != Kind::close) {
      residual(row, b, begin, n, v);
      for_blocks(n, [&](int64_t i, auto part) { part.store(v + i, inverse * part.template load<A>(v + i)); });
    }
    if (plan.kind == Kind::begin || plan.kind == Kind::plain) {
      if constexpr (is_half<T>) {
        copy(start, iterate, n);
      } else {
        copy(start, row.z + begin, n);
      }
      copy(row.next + begin, row.f + begin, n);
      if (is_half<T>) follow();
      if (plan.kind == Kind::begin) {
        copy(basis_row(0, b) + begin, v, n);
        products[0] = dot<A>(v, v, n);
      }
      return;
    }

    const auto older = [&](int64_t i) { return basis_row(i, b) + begin; };
    const bool extends = plan.kind == Kind::extend;
    std::memset(y, 0, n * sizeof(A));
    combine(v, y, older, extends ? plan.h : nullptr, plan.point, plan.n, n);
    const A by_remainder = extends ? A(plan.inverse_remainder) : A(0), newest = extends ? A(plan.point[plan.n]) : A(0);
    const A beta = A(plan.beta);
    for_blocks(n, [&](int64_t i, auto part) {
      Lanes<A> sum = part.template load<A>(y + i);
      if (extends) {
        const Lanes<A> x = by_remainder * part.template load<A>(v + i);
        part.store(v + i, x);
        sum = sum + newest * x;
      }
      const Lanes<A> moved = part.template load<A>(start + i) + beta * sum;
      if constexpr (is_half<T>) part.store(iterate + i, moved);
      part.store(row.next + begin + i, moved);
    });
    if (!extends) return;
    copy(basis_row(plan.n, b) + begin, v, n);
    dots<A>(older, plan.n, v, n, products);
    products[plan.n] = dot<A>(v, v, n);
  }

  void close(int64_t b, const Plan& plan, const double* products) const {
    if (!plan.verdict.proceed || (plan.kind != Kind::begin && plan.kind != Kind::extend)) return;
    const int64_t newest = plan.kind == Kind::begin ? 0 : plan.n, K = args.capacity;
    double* gram = matrix(args.gram, b);
    for (int64_t i = 0; i <= newest; ++i) gram[newest * K + i] = gram[i * K + newest] = products[i];
  }
};

}  // namespace

void gmres_step(const GmresStepArgs& args) {
  PYDEQ_DISPATCH(args.step.dtype, T, GmresStep<T> step{args}; run_step(step, args.step));
}

}  // namespace PYDEQ_ISA
}  // namespace pydeq
