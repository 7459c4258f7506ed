// When a sample is done; pydeq/termination.py is the reference and says why.
#pragma once

#include <cstdint>

#include "pydeq_protocol.h"

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
};

struct Verdict {
  bool improved;     // this iterate is the best so far
  bool displaced;    // it is not, and the best one is the previous iterate: save it now
  bool proceed;      // take the solver's step
  bool retry;        // forget the history, take a plain step from the best iterate
  bool stopped;      // done now: its rows hold its value from here on
  bool materialize;  // the best iterate is this one and must be saved now
};

namespace {  // compiled for several instruction sets: never one copy for all

PYDEQ_HOST_DEVICE inline bool finite(double x) { return x - x == 0.0; }

// Whether a sample with these counters is evaluated for its own sake.
PYDEQ_HOST_DEVICE inline bool is_active(const int32_t* counters, bool freeze) {
  const int32_t status = counters[protocol::COUNTER_STATUS];
  return status == protocol::RUNNING ||
         (!freeze && (status == protocol::STATUS_CONVERGED || status == protocol::STATUS_STALLED));
}

// Takes ||f(z) - z|| and ||f(z)|| of an active sample, updates its scalars and counters, and decides.
PYDEQ_HOST_DEVICE inline Verdict judge(double residual, double norm, double* scalars, int32_t* counters,
                                       const Rules& rules) {
  using namespace protocol;
  const bool running = counters[COUNTER_STATUS] == RUNNING;
  const bool begins = ++counters[COUNTER_EVALUATIONS] == 1;
  const bool is_finite = finite(residual) && finite(norm);
  if (!is_finite) residual = __builtin_huge_val();
  scalars[SCALAR_RESIDUAL] = residual;
  scalars[SCALAR_NORM] = norm;
  if (begins) {
    scalars[SCALAR_FIRST] = residual;
    scalars[SCALAR_FIRST_NORM] = norm;
  }
  const double first = scalars[SCALAR_FIRST];
  const bool absorbed =
      0.5 * rules.eps * norm > (1.0 - CONTRACTION) * first && norm > GROWTH * scalars[SCALAR_FIRST_NORM];
  const bool contracted = residual < CONTRACTION * first && !absorbed;
  const bool meets = is_finite && residual <= rules.atol + rules.rtol * norm && (begins || contracted);

  Verdict verdict{};
  verdict.improved =
      begins || (is_finite && ((running && meets) || (residual < scalars[SCALAR_BEST] && (running || meets))));
  verdict.displaced = !verdict.improved && counters[COUNTER_FRESH];
  const bool tried = counters[COUNTER_TRIED];
  if (verdict.improved) {
    scalars[SCALAR_BEST] = residual;
    scalars[SCALAR_BEST_NORM] = norm;
    counters[COUNTER_SINCE_BEST] = 0;
  } else {
    ++counters[COUNTER_SINCE_BEST];
  }

  const bool lost = !is_finite && (begins || tried);
  if (running) {
    int32_t status = RUNNING;
    if (lost) {
      status = STATUS_NONFINITE;
    } else if (meets) {
      status = STATUS_CONVERGED;
    } else if (is_finite && residual > DIVERGENCE * first) {
      status = STATUS_DIVERGED;
    } else if (is_finite && rules.stall && counters[COUNTER_SINCE_BEST] >= STALL_WINDOW &&
               scalars[SCALAR_BEST] <= STALL_EPSILONS * rules.eps * scalars[SCALAR_BEST_NORM]) {
      status = STATUS_STALLED;
    } else if (rules.last) {
      status = STATUS_MAX_STEPS;
    }
    counters[COUNTER_STATUS] = status;
  }
  const int32_t status = counters[COUNTER_STATUS];
  const bool done = status != RUNNING;
  const bool ended = rules.freeze ? done : status >= STATUS_DIVERGED || lost;
  verdict.stopped = ended || rules.last;
  verdict.retry = !is_finite && !verdict.stopped;
  verdict.proceed = !verdict.retry && !verdict.stopped;
  verdict.materialize = verdict.improved && (done || rules.last);
  counters[COUNTER_TRIED] = verdict.retry || (tried && !verdict.improved);
  counters[COUNTER_FRESH] = verdict.improved && !verdict.materialize;
  return verdict;
}

}  // namespace
}  // namespace pydeq
