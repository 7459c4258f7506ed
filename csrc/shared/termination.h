// The rules that decide when a sample is done; pydeq/ops/termination.py is the reference and has the reasons.
#pragma once

#include <cstdint>

#include "pydeq_constants.h"

#ifdef __CUDACC__
#define PYDEQ_HOST_DEVICE __host__ __device__
#else
#define PYDEQ_HOST_DEVICE
#endif

namespace pydeq {

struct Rules {
  double rtol, atol, eps;
  bool freeze, stall;
  bool last;  // no evaluation follows
  // 0, or the number of evaluations so far if the step looks back: then it checks only samples that were done before
  // the last evaluation.
  int64_t look_back = 0;
};

struct Verdict {
  bool improved;     // this iterate is the best so far
  bool displaced;    // it is not, but the previous iterate was the best one: save it now
  bool proceed;      // take the solver's step
  bool retry;        // forget the history, and try another iterate: by default the previous one again
  bool from_best;    // retry: a plain step from the best iterate
  bool halfway;      // retry: half the step from the previous iterate to this one
  bool stopped;      // done now; from now on its rows hold its value
  bool materialize;  // the best iterate is this one and must be saved now
};

namespace {  // compiled for several instruction sets, which must not share one copy

PYDEQ_HOST_DEVICE inline bool finite(double x) { return x - x == 0.0; }

// Whether a sample with these counters is judged.
PYDEQ_HOST_DEVICE inline bool is_active(const int32_t* counters, const Rules& rules) {
  using namespace constants;
  const int32_t status = counters[COUNTER_STATUS];
  const bool may_move = status == STATUS_CONVERGED || status == STATUS_STALLED;
  if (rules.look_back > 0) {
    // A sample that seemed to diverge while other samples moved gets another chance, if an evaluation is left.
    return (may_move || (status == STATUS_DIVERGED && !rules.last)) && counters[COUNTER_EVALUATIONS] < rules.look_back;
  }
  return status == RUNNING || (!rules.freeze && may_move);
}

// Judges a sample that was done before this evaluation by ||f(z) - z|| and ||f(z)|| at its value. They are the recorded
// ones unless its image depends on other samples.
PYDEQ_HOST_DEVICE inline Verdict judge_again(double residual, double norm, double* scalars, int32_t* counters,
                                             const Rules& rules) {
  using namespace constants;
  Verdict verdict{};
  const double change = __builtin_fabs(residual - scalars[SCALAR_BEST]), noise = STALL_EPSILONS * rules.eps * norm;
  if (change <= SUM_ROUNDING * residual && __builtin_fabs(norm - scalars[SCALAR_BEST_NORM]) <= SUM_ROUNDING * norm) {
    return verdict;
  }
  const int32_t before = counters[COUNTER_STATUS];
  if (!(finite(residual) && finite(norm))) {
    counters[COUNTER_STATUS] = STATUS_NONFINITE;
    return verdict;
  }
  if (before == STATUS_DIVERGED && change <= noise) return verdict;
  scalars[SCALAR_RESIDUAL] = scalars[SCALAR_BEST] = residual;
  scalars[SCALAR_NORM] = scalars[SCALAR_BEST_NORM] = norm;
  verdict.improved = verdict.materialize = true;
  if (residual <= rules.atol + rules.rtol * norm) {
    counters[COUNTER_STATUS] = STATUS_CONVERGED;
    return verdict;
  }
  if (before == STATUS_STALLED && residual <= noise) return verdict;
  counters[COUNTER_STATUS] = rules.last ? STATUS_MAX_STEPS : RUNNING;
  verdict.retry = verdict.from_best = !rules.last;
  counters[COUNTER_TRIED] = verdict.retry;
  counters[COUNTER_SINCE_BEST] = counters[COUNTER_COUNT] = counters[COUNTER_RESTARTED] = 0;
  if (residual > scalars[SCALAR_FIRST]) scalars[SCALAR_FIRST] = residual;
  return verdict;
}

// Decides about an active sample from ||f(z) - z|| and ||f(z)||, and updates its scalars and counters.
PYDEQ_HOST_DEVICE inline Verdict judge(double residual, double norm, double* scalars, int32_t* counters,
                                       const Rules& rules) {
  using namespace constants;
  if (rules.look_back > 0) return judge_again(residual, norm, scalars, counters, rules);
  const int32_t before = counters[COUNTER_STATUS];
  const bool begins = ++counters[COUNTER_EVALUATIONS] == 1;
  const double previous = scalars[SCALAR_RESIDUAL];
  const bool is_finite = finite(residual) && finite(norm);
  if (!is_finite) residual = __builtin_huge_val();
  scalars[SCALAR_RESIDUAL] = residual;
  scalars[SCALAR_NORM] = norm;
  if (begins) {
    scalars[SCALAR_FIRST] = residual;
    scalars[SCALAR_FIRST_NORM] = norm;
  }
  const bool absorbed = 0.5 * rules.eps * norm > (1.0 - CONTRACTION) * scalars[SCALAR_FIRST] &&
                        norm > GROWTH * scalars[SCALAR_FIRST_NORM];
  const bool contracted = residual < CONTRACTION * scalars[SCALAR_FIRST] && !absorbed;
  const double tolerance = rules.atol + rules.rtol * norm;
  const bool meets = is_finite && residual <= tolerance && (begins || contracted || before == STATUS_CONVERGED);
  // Without freezing, a sample counts as converged only while it meets the tolerance: other samples may move it.
  const bool reopened = before == STATUS_CONVERGED && !meets;
  if (reopened && is_finite && residual > scalars[SCALAR_FIRST]) scalars[SCALAR_FIRST] = residual;

  Verdict verdict{};
  verdict.improved =
      begins || (is_finite && (meets || reopened || (before == RUNNING && residual < scalars[SCALAR_BEST])));
  verdict.displaced = !verdict.improved && counters[COUNTER_FRESH];
  if (verdict.improved) {
    scalars[SCALAR_BEST] = residual;
    scalars[SCALAR_BEST_NORM] = norm;
    counters[COUNTER_SINCE_BEST] = 0;
  } else {
    ++counters[COUNTER_SINCE_BEST];
  }

  const bool explained = scalars[SCALAR_BEST] <= STALL_EPSILONS * rules.eps * scalars[SCALAR_BEST_NORM];
  const int32_t tried = counters[COUNTER_TRIED];
  const bool lost = !is_finite && (begins || tried > RECOVERIES);
  int32_t status = before;
  if (before != STATUS_STALLED || meets) {
    if (lost) {
      status = STATUS_NONFINITE;
    } else if (meets) {
      status = STATUS_CONVERGED;
    } else if (is_finite && residual > DIVERGENCE * scalars[SCALAR_FIRST]) {
      status = STATUS_DIVERGED;
    } else if (is_finite && rules.stall && counters[COUNTER_SINCE_BEST] >= STALL_WINDOW && explained) {
      status = STATUS_STALLED;
    } else {
      status = rules.last ? STATUS_MAX_STEPS : RUNNING;
    }
    counters[COUNTER_STATUS] = status;
  }
  const bool done = status != RUNNING;
  const bool ended = rules.freeze ? done : status >= STATUS_DIVERGED || lost;
  verdict.stopped = ended || rules.last;
  verdict.retry = !is_finite && !verdict.stopped;
  verdict.proceed = !verdict.retry && !verdict.stopped;
  verdict.materialize = verdict.improved && (done || rules.last);
  if (verdict.retry) {
    verdict.from_best = tried == 0;
    verdict.halfway = tried > 0 && counters[COUNTER_COUNT] <= 1;  // the step to this iterate was a plain one
    counters[COUNTER_TRIED] = tried + 1;
  } else if (verdict.improved) {
    counters[COUNTER_TRIED] = 0;
  }
  counters[COUNTER_FRESH] = verdict.improved && !verdict.materialize;
  // A sample that is about to stall is not far from its end either.
  const bool stalls = rules.stall && counters[COUNTER_SINCE_BEST] + 1 >= STALL_WINDOW && explained;
  const double reduction = residual < previous ? residual / previous : 1.0, squared = reduction * reduction;
  const bool far = residual * (squared * squared) > FAR * tolerance;
  counters[COUNTER_FAR] = far && !done && !begins && is_finite && !stalls;
  return verdict;
}

}  // namespace
}  // namespace pydeq
