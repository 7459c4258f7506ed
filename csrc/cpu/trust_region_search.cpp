// The search of a trust-region method for samples of few entries, called by ctypes. pydeq/ops/trust_region_search.py is
// the reference, and explains the stages and what is kept between them.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/restricted_solve.h"
#include "shared/export.h"
#include "shared/termination.h"

namespace pydeq {
namespace {

using namespace constants;

// One step of all samples; see the reference for shapes.
struct Search {
  const double *z, *f, *image;
  double* next;
  const double* scalars;
  int32_t* counters;
  int64_t* progress;
  double *vectors, *systems, *numbers;
  int64_t* counts;
  bool* flags;
  int64_t batch, entries, left;
  double largest;
  bool freeze, single;

  int64_t advance(int64_t stage) {
    if (stage == TRUST_STAGE_FIRST) {
      bool needs = false;
      for (int64_t b = 0; b < batch; ++b) needs |= judge_sample(b);
      if (needs) return TRUST_STAGE_AGAIN;
    }
    if (stage <= TRUST_STAGE_AGAIN) {
      bool needs = false;
      for (int64_t b = 0; b < batch; ++b) {
        if (flag(TRUST_FLAG_WANTED, b)) aim(b);
        const bool renewed = flag(TRUST_FLAG_WANTED, b) && !flag(TRUST_FLAG_SEARCHING, b) && !flag(TRUST_FLAG_EXACT, b);
        flag(TRUST_FLAG_RENEWED, b) = renewed;
        needs |= renewed;
      }
      if (needs) return TRUST_STAGE_AFTER_UPDATES;
    } else {
      for (int64_t b = 0; b < batch; ++b) {
        if (flag(TRUST_FLAG_RENEWED, b)) aim(b);
      }
    }
    for (int64_t b = 0; b < batch; ++b) finish(b);
    return TRUST_STAGE_DONE;
  }

 private:
  double& number(int row, int64_t b) const { return numbers[row * batch + b]; }
  int64_t& count(int row, int64_t b) const { return counts[row * batch + b]; }
  bool& flag(int row, int64_t b) const { return flags[row * batch + b]; }
  int32_t& counter(int column, int64_t b) const { return counters[b * COUNTER_SIZE + column]; }
  double found(int64_t b) const { return scalars[b * SCALAR_SIZE + SCALAR_RESIDUAL]; }
  double* begin(int64_t b) const { return vectors + b * entries; }
  double* base(int64_t b) const { return vectors + (batch + b) * entries; }
  double* accepted_image(int64_t b) const { return vectors + (2 * batch + b) * entries; }
  double* residual(int64_t b) const { return vectors + (3 * batch + b) * entries; }
  double* system(int64_t b) const { return systems + b * entries * entries; }

  void write(int64_t b, const double* x) const { std::copy(x, x + entries, next + b * entries); }

  // Accepts or rejects the sample's point. Returns whether the sample needs its Jacobian.
  bool judge_sample(int64_t b) {
    const bool searching = flag(TRUST_FLAG_SEARCHING, b), exact = flag(TRUST_FLAG_EXACT, b);
    if (searching && counter(COUNTER_STATUS, b) == STATUS_DIVERGED) {
      counter(COUNTER_STATUS, b) = RUNNING;
      ++progress[PROGRESS_RUNNING];
    }
    const double size = number(TRUST_NUMBER_RESIDUAL, b), promised = number(TRUST_NUMBER_PROMISED, b);
    const bool running = counter(COUNTER_STATUS, b) == RUNNING;
    const double enough = (1.0 - TRUST_ARMIJO * (1.0 - promised)) * size;
    const bool accepted = running && finite(found(b)) && (!searching || found(b) <= enough);
    const bool refused = running && searching && !accepted;
    if (running && !accepted && !refused && counter(COUNTER_TRIED, b) == 1) write(b, image + b * entries);
    if (refused) ++count(TRUST_COUNT_REJECTED, b);
    const bool slow = found(b) > TRUST_SLOW * size || flag(TRUST_FLAG_CAREFUL, b);
    const bool renewed = accepted ? !searching || slow : refused && !exact;
    if ((accepted && searching) || (refused && exact)) adapt(b);
    if (accepted) {
      if (!renewed) update(b);
      move(b, !searching);
    }
    flag(TRUST_FLAG_RUNNING, b) = running;
    flag(TRUST_FLAG_ACCEPTED, b) = accepted;
    flag(TRUST_FLAG_REFUSED, b) = refused;
    flag(TRUST_FLAG_WANTED, b) = accepted || (refused && count(TRUST_COUNT_REJECTED, b) <= TRUST_TRIALS);
    flag(TRUST_FLAG_RENEWED, b) = renewed;
    flag(TRUST_FLAG_SEARCHING, b) = false;
    return renewed;
  }

  void adapt(int64_t b) const {
    const double size = number(TRUST_NUMBER_RESIDUAL, b), promised = number(TRUST_NUMBER_PROMISED, b);
    const double reached = number(TRUST_NUMBER_REACHED, b), quotient = found(b) / size;
    const double share = (1.0 - quotient * quotient) / (1.0 - promised * promised);
    double& radius = number(TRUST_NUMBER_RADIUS, b);
    if (finite(share) && share >= TRUST_GOOD) {
      radius = std::min(std::max(radius, 2.0 * reached), largest);
    } else if (!(finite(share) && share >= TRUST_POOR)) {
      radius = (finite(share) && share >= TRUST_BAD ? 0.5 : 0.25) * std::min(radius, reached);
    }
  }

  // Broyden's update of the matrix, by the step from the accepted point to the new one.
  void update(int64_t b) const {
    double step[TRUST_ENTRIES], fall[TRUST_ENTRIES], wrong[TRUST_ENTRIES];
    const int64_t n = entries;
    const double *point = z + b * n, *value = f + b * n;
    for (int64_t i = 0; i < n; ++i) {
      step[i] = point[i] - base(b)[i];
      fall[i] = residual(b)[i] - (value[i] - point[i]);
    }
    const double length = vector_norm(step, n);
    subtract_product(fall, system(b), step, n, wrong);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) system(b)[i * n + j] += wrong[i] / length * (step[j] / length);
    }
    flag(TRUST_FLAG_UPDATED, b) = true;
  }

  // Takes the point as the accepted one.
  void move(int64_t b, bool fresh) const {
    const double *point = z + b * entries, *value = f + b * entries;
    for (int64_t i = 0; i < entries; ++i) {
      base(b)[i] = point[i];
      accepted_image(b)[i] = value[i];
      residual(b)[i] = value[i] - point[i];
    }
    number(TRUST_NUMBER_RESIDUAL, b) = found(b);
    if (fresh) {
      number(TRUST_NUMBER_RADIUS, b) = std::min(TRUST_FIRST * (vector_norm(base(b), entries) + found(b)), largest);
    }
    count(TRUST_COUNT_REJECTED, b) = 0;
    flag(TRUST_FLAG_EXACT, b) = false;
  }

  // Writes the sample's trial point, if there is one that promises a reduction, and flags the sample as SEARCHING.
  void aim(int64_t b) const {
    const int64_t n = entries;
    double scaled[TRUST_ENTRIES * TRUST_ENTRIES], right[TRUST_ENTRIES], y[TRUST_ENTRIES], rest[TRUST_ENTRIES];
    const double size = number(TRUST_NUMBER_RESIDUAL, b);
    double scale = 0.0;
    for (int64_t i = 0; i < n * n; ++i) scale = larger(scale, std::fabs(system(b)[i]));
    const double unit = size / scale;
    if (!(finite(scale) && finite(unit) && unit > 0.0)) return;
    for (int64_t i = 0; i < n * n; ++i) {
      scaled[i] = system(b)[i] / scale;
      if (!finite(scaled[i])) return;
    }
    for (int64_t i = 0; i < n; ++i) right[i] = residual(b)[i] / size;
    const double radius = number(TRUST_NUMBER_RADIUS, b) / unit;
    if (!solve(scaled, right, n, y) || !(vector_norm(y, n) <= (1.0 + TRUST_SLACK) * radius)) {
      restricted_solve(scaled, right, radius, n, y);
    }
    subtract_product(right, scaled, y, n, rest);
    number(TRUST_NUMBER_PROMISED, b) = vector_norm(rest, n);
    number(TRUST_NUMBER_REACHED, b) = vector_norm(y, n) * unit;
    bool moves = false;
    for (int64_t i = 0; i < n; ++i) {
      double trial = base(b)[i] + y[i] * unit;
      if (single) trial = static_cast<float>(trial);
      if (!finite(trial)) return;
      moves |= trial != base(b)[i];
      y[i] = trial;
    }
    if (!moves || !(number(TRUST_NUMBER_PROMISED, b) < 1.0)) return;
    write(b, y);
    flag(TRUST_FLAG_SEARCHING, b) = true;
  }

  // Writes the next point of a sample without a trial point.
  void finish(int64_t b) const {
    const bool running = flag(TRUST_FLAG_RUNNING, b), refused = flag(TRUST_FLAG_REFUSED, b);
    const bool steps = flag(TRUST_FLAG_ACCEPTED, b) || refused, plain = steps && !flag(TRUST_FLAG_SEARCHING, b);
    if (plain) write(b, accepted_image(b));
    // A retry would take the same plain step.
    if (steps) counter(COUNTER_TRIED, b) = plain && (refused || counter(COUNTER_SINCE_BEST, b) == 0);
    if (stuck(b, plain && refused) && left > TRUST_PATIENCE) {
      write(b, begin(b));
      flag(TRUST_FLAG_SEARCHING, b) = false;
      flag(TRUST_FLAG_CAREFUL, b) = true;
      counter(COUNTER_TRIED, b) = 0;
    }
    if (!freeze && !running) write(b, z + b * entries);
  }

  // Whether the sample makes no progress, and has used updates. `failed`: its search has.
  bool stuck(int64_t b, bool failed) const {
    double& mark = number(TRUST_NUMBER_MARK, b);
    int64_t& idle = count(TRUST_COUNT_IDLE, b);
    const bool better = flag(TRUST_FLAG_ACCEPTED, b) && found(b) < 0.5 * mark;
    if (better) mark = found(b);
    idle = better ? 0 : idle + 1;
    bool& careful = flag(TRUST_FLAG_CAREFUL, b);
    const bool running = flag(TRUST_FLAG_RUNNING, b);
    const bool is_stuck = running && flag(TRUST_FLAG_UPDATED, b) && !careful && idle >= TRUST_PATIENCE;
    careful |= failed;
    if (!running || failed || is_stuck) {  // a sample that waits may be moved later
      mark = __builtin_huge_val();
      idle = 0;
    }
    return is_stuck && !failed;
  }
};

}  // namespace
}  // namespace pydeq

// Goes on from `stage`; returns the next one, which is TRUST_STAGE_DONE unless Jacobians are needed.
PYDEQ_EXPORT int64_t pydeq_search_trust_region(int64_t stage, const double* z, const double* f, const double* image,
                                               double* next, const double* scalars, int32_t* counters,
                                               int64_t* progress, double* vectors, double* systems, double* numbers,
                                               int64_t* counts, bool* flags, int64_t batch, int64_t entries,
                                               int64_t left, double largest, bool freeze, bool single) {
  pydeq::Search search{z,       f,      image, next,  scalars, counters, progress, vectors, systems,
                       numbers, counts, flags, batch, entries, left,     largest,  freeze,  single};
  return search.advance(stage);
}
