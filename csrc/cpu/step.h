// The parts of a step that all solvers share: rows, norms, keeping the best iterate, and the order of work.
//
// A step is two passes over the state of each active sample. The first reduces: it computes g = f - z and sums of
// products. From the totals one thread decides and solves. The second applies: it writes the next iterate. Passes go
// chunk by chunk, and totals are sums over chunks in order, so the result does not depend on the number of threads.
#pragma once

#include <cstdlib>

#include "cpu/lanes.h"
#include "shared/step_args.h"
#include "shared/termination.h"

namespace pydeq {
namespace PYDEQ_ISA {
namespace {

// Squares of float states are summed in float within this range; beyond it they overflow or underflow.
constexpr double kSmallest = 1e-30, kLargest = 1e30;
// The rows of one sample.
template <class T>
struct Rows {
  T* z;        // [D]
  const T* f;  // [D]
  T* next;     // [D]
  T* value;    // [D] the best iterate
  T* image;    // [D] and its image
  double* scalars;
  int32_t* counters;

  Rows(const StepArgs& a, int64_t b)
      : z(static_cast<T*>(a.z) + b * a.state),
        f(static_cast<const T*>(a.f) + b * a.state),
        next(static_cast<T*>(a.next) + b * a.state),
        value(static_cast<T*>(a.best) + b * a.state),
        image(static_cast<T*>(a.best) + (a.batch + b) * a.state),
        scalars(a.scalars + b * constants::SCALAR_SIZE),
        counters(a.counters + b * constants::COUNTER_SIZE) {}
};

template <class T>
inline void copy(T* to, const T* from, int64_t n) {
  std::memcpy(to, from, n * sizeof(T));
}

// ||f - z|| and ||f|| over a whole sample where the fast sums left their range.
template <class T>
inline void careful_norms(const Rows<T>& row, int64_t state, double* residual, double* norm) {
  double rr = 0.0, ff = 0.0;
  if constexpr (sizeof(T) < 8) {  // squares of narrower types fit a double
    for (int64_t begin = 0; begin < state; begin += kChunk) {
      const int64_t n = state - begin < kChunk ? state - begin : kChunk;
      Lanes<double> r2 = splat(0.0), f2 = splat(0.0);
      for_blocks(n, [&](int64_t i, auto part) {
        const Lanes<float> f = part.template load<float>(row.f + begin + i);
        const Lanes<float> g = f - part.template load<float>(row.z + begin + i);
        float values[kLanes];
        std::memcpy(values, &g, sizeof values);
        const Lanes<double> wide = load<double>(values);
        std::memcpy(values, &f, sizeof values);
        const Lanes<double> wide_f = load<double>(values);
        r2 = r2 + wide * wide;
        f2 = f2 + wide_f * wide_f;
      });
      rr += sum(r2);
      ff += sum(f2);
    }
    *residual = __builtin_sqrt(rr);
    *norm = __builtin_sqrt(ff);
  } else {
    double largest_g = 0.0, largest_f = 0.0;
    for (int64_t d = 0; d < state; ++d) {
      const double g = __builtin_fabs(row.f[d] - row.z[d]), f = __builtin_fabs(row.f[d]);
      if (!(g <= largest_g)) largest_g = g;  // also takes a NaN, and keeps it
      if (!(f <= largest_f)) largest_f = f;
      if (g != g || f != f) {
        *residual = *norm = g + f;
        return;
      }
    }
    const double by_g = largest_g > 0.0 ? largest_g : 1.0, by_f = largest_f > 0.0 ? largest_f : 1.0;
    for (int64_t d = 0; d < state; ++d) {
      const double g = (row.f[d] - row.z[d]) / by_g, f = row.f[d] / by_f;
      rr += g * g;
      ff += f * f;
    }
    *residual = by_g * __builtin_sqrt(rr);
    *norm = by_f * __builtin_sqrt(ff);
  }
}

// Whether sums of squares of the compute type may be trusted at this size; 0 may not.
template <class T>
inline bool in_range(double total) {
  if constexpr (sizeof(T) == 8) return total > 1e-280 && total < 1e280;
  return total > kSmallest && total < kLargest;
}

// Norms from the sums of a reduction. Returns whether the sums stayed in range.
template <class T>
inline bool norms(const Rows<T>& row, int64_t state, double rr, double ff, double* residual, double* norm) {
  const bool g_fits = in_range<T>(rr), f_fits = in_range<T>(ff);
  *residual = __builtin_sqrt(rr);
  *norm = __builtin_sqrt(ff);
  if (!g_fits || !f_fits) careful_norms(row, state, residual, norm);
  return g_fits;
}

// Saves the best iterate if it would be lost, places stopped samples, starts retries; [begin, begin + n) of a sample.
// previous_image is null if the solver does not keep it: then every improvement saves its image at once. After a retry
// z holds the finite iterate that the retry starts from, as after any other step.
template <class T>
inline void settle(const Rows<T>& row, const Verdict& verdict, const T* previous_image, double damping, int64_t begin,
                   int64_t n) {
  T *z = row.z + begin, *next = row.next + begin, *value = row.value + begin, *image = row.image + begin;
  const T* f = row.f + begin;
  if (verdict.materialize) {
    copy(value, z, n);
    copy(image, f, n);
  } else {
    if (verdict.displaced) {
      copy(value, next, n);
      if (previous_image) copy(image, previous_image + begin, n);
    }
    if (!previous_image && verdict.improved) copy(image, f, n);
  }
  if (verdict.stopped) {
    if (!verdict.materialize) copy(z, value, n);
    copy(next, value, n);
  } else if (verdict.from_best) {
    copy(z, value, n);
    if (damping == 1.0) {
      copy(next, image, n);
    } else {
      using A = Compute<T>;
      for_blocks(n, [&](int64_t i, auto part) {
        const Lanes<A> v = part.template load<A>(value + i);
        part.store(next + i, v + A(damping) * (part.template load<A>(image + i) - v));
      });
    }
  } else if (verdict.halfway) {
    using A = Compute<T>;
    for_blocks(n, [&](int64_t i, auto part) {
      const Lanes<A> from = part.template load<A>(next + i), to = part.template load<A>(z + i);
      part.store(z + i, from);
      part.store(next + i, from + A(0.5) * (to - from));
    });
  }
}

// Runs a step over all active samples. Step has:
//   struct Plan                                             passed from decide to apply, for one sample
//   int64_t sums() const, products() const                  totals of the first and of the second pass
//   int64_t coefficients() const                            doubles a sample's plan needs, scratch included
//   void reduce(b, begin, n, double* sums)                  first pass over a chunk; writes every entry of sums
//   void decide(b, double* sums, Plan&, double* coefficients)
//   void apply(b, const Plan&, begin, n, double* products)  second pass over a chunk
//   void close(b, const Plan&, const double* products)      after it
template <class Step>
struct Runner {
  Step& step;
  const StepArgs& args;
  int64_t chunks, sums, products, coefficients;
  int64_t* samples;            // [active]
  typename Step::Plan* plans;  // [active]
  double* plan_coefficients;   // [active, coefficients]
  double* partial;             // [active, chunks, max(sums, products)] where chunks are spread over threads

  int64_t length(int64_t chunk) const {
    const int64_t left = args.state - chunk * kChunk;
    return left < kChunk ? left : kChunk;
  }
  int64_t width() const { return sums > products ? sums : products; }

  // A whole sample on one thread. The second pass goes backwards, since the chunks that the first pass read last are in
  // cache. scratch: [width + max(sums, chunks * products)].
  void run_sample(int64_t s, double* scratch) const {
    const int64_t b = samples[s];
    double *total = scratch, *parts = scratch + width();
    for (int64_t i = 0; i < sums; ++i) total[i] = 0.0;
    for (int64_t c = 0; c < chunks; ++c) {
      step.reduce(b, c * kChunk, length(c), parts);
      for (int64_t i = 0; i < sums; ++i) total[i] += parts[i];
    }
    step.decide(b, total, plans[s], plan_coefficients + s * coefficients);
    for (int64_t i = 0; i < chunks * products; ++i) parts[i] = 0.0;
    for (int64_t c = chunks - 1; c >= 0; --c) {
      step.apply(b, plans[s], c * kChunk, length(c), parts + c * products);
    }
    add_up(parts, products, products, total);
    step.close(b, plans[s], total);
  }

  static void run_samples(void* context, int64_t begin, int64_t end) {
    const Runner& run = *static_cast<const Runner*>(context);
    const int64_t parts = run.chunks * run.products > run.sums ? run.chunks * run.products : run.sums;
    double* scratch = static_cast<double*>(std::malloc((run.width() + parts) * sizeof(double) + 1));
    for (int64_t s = begin; s < end; ++s) run.run_sample(s, scratch);
    std::free(scratch);
  }

  static void reduce_chunks(void* context, int64_t begin, int64_t end) {
    const Runner& run = *static_cast<const Runner*>(context);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t s = i / run.chunks, c = i % run.chunks;
      run.step.reduce(run.samples[s], c * kChunk, run.length(c), run.partial + i * run.width());
    }
  }

  static void apply_chunks(void* context, int64_t begin, int64_t end) {
    const Runner& run = *static_cast<const Runner*>(context);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t s = i / run.chunks, c = i % run.chunks;
      double* part = run.partial + i * run.width();
      for (int64_t j = 0; j < run.products; ++j) part[j] = 0.0;
      run.step.apply(run.samples[s], run.plans[s], c * kChunk, run.length(c), part);
    }
  }

  // out[j] = the sum over chunks, in order, of entry j of parts [chunks, stride].
  void add_up(const double* parts, int64_t stride, int64_t count, double* out) const {
    for (int64_t j = 0; j < count; ++j) out[j] = 0.0;
    for (int64_t c = 0; c < chunks; ++c) {
      for (int64_t j = 0; j < count; ++j) out[j] += parts[c * stride + j];
    }
  }
};

template <class Step>
inline void run_step(Step& step, const StepArgs& args) {
  using Plan = typename Step::Plan;
  Runner<Step> run{step,
                   args,
                   (args.state + kChunk - 1) / kChunk,
                   step.sums(),
                   step.products(),
                   step.coefficients(),
                   nullptr,
                   nullptr,
                   nullptr,
                   nullptr};
  run.samples = static_cast<int64_t*>(std::malloc(args.batch * sizeof(int64_t) + 1));
  int64_t active = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    if (is_active(args.counters + b * constants::COUNTER_SIZE, args.rules)) run.samples[active++] = b;
  }
  run.plans = static_cast<Plan*>(std::malloc(active * sizeof(Plan) + 1));
  run.plan_coefficients = static_cast<double*>(std::malloc(active * run.coefficients * sizeof(double) + 1));

  const int64_t threads = args.parallel.threads;
  const bool serial = threads == 1 || active * args.state * (run.sums + 1) < kSerialWork;
  if (serial) {
    Runner<Step>::run_samples(&run, 0, active);
  } else if (active >= 4 * threads || run.chunks <= 1) {
    args.parallel.run(active, Runner<Step>::run_samples, &run);
  } else {  // few samples: spread their chunks
    run.partial = static_cast<double*>(std::malloc(active * run.chunks * run.width() * sizeof(double) + 1));
    double* totals = static_cast<double*>(std::malloc(run.width() * sizeof(double) + 1));
    args.parallel.run(active * run.chunks, Runner<Step>::reduce_chunks, &run);
    for (int64_t s = 0; s < active; ++s) {
      run.add_up(run.partial + s * run.chunks * run.width(), run.width(), run.sums, totals);
      step.decide(run.samples[s], totals, run.plans[s], run.plan_coefficients + s * run.coefficients);
    }
    args.parallel.run(active * run.chunks, Runner<Step>::apply_chunks, &run);
    for (int64_t s = 0; s < active; ++s) {
      run.add_up(run.partial + s * run.chunks * run.width(), run.width(), run.products, totals);
      step.close(run.samples[s], run.plans[s], totals);
    }
    std::free(totals);
    std::free(run.partial);
  }

  int64_t running = 0, far = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    const int32_t* counters = args.counters + b * constants::COUNTER_SIZE;
    running += counters[constants::COUNTER_STATUS] == constants::RUNNING;
    far += counters[constants::COUNTER_FAR];
  }
  args.progress[constants::PROGRESS_STEP] = args.step + 1;
  args.progress[constants::PROGRESS_RUNNING] = running;
  args.progress[constants::PROGRESS_FAR] = far;
  std::free(run.plan_coefficients);
  std::free(run.plans);
  std::free(run.samples);
}

}  // namespace
}  // namespace PYDEQ_ISA
}  // namespace pydeq
