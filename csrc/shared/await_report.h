// Waiting for a step's report: the host's side of the progress protocol. It uses neither torch nor CUDA, so that a test
// can act as the device.
//
// A step's last block writes how many samples run and how many are far from their tolerance, then how many steps are
// done (constants::PROGRESS_*), to host memory. The host polls that memory. It asks every 100 us whether the device
// still works, and never waits for an answer: a fault is seen soon, and nothing is synchronized.
#pragma once

#include <chrono>
#include <cstdint>
#include <thread>

#include "pydeq_constants.h"

namespace pydeq {

// A stream's answer: kWorking, kDone, or the code of an error, which is not negative.
constexpr int kWorking = -1, kDone = -2;
using StreamQuery = int (*)(void* stream, int device);

struct Report {
  enum Kind {
    reported,
    pending,  // nothing happened until the deadline
    lost,     // the stream is done with all its work, and the step was not among it
    failed,   // the stream has an error
  } kind;
  int64_t value;  // reported: samples running; failed: the error's code
};

inline int64_t acquire(const int64_t* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }

inline bool has_reported(const int64_t* progress, int64_t steps) {
  return acquire(progress + constants::PROGRESS_STEP) >= steps;
}

// Polls `progress` [PROGRESS_SIZE] until `steps` steps are done, at most until `patience` is over. `idle` says that the
// device has nothing to do after that step.
inline Report await_report(const int64_t* progress, int64_t steps, StreamQuery query, void* stream, int device,
                           std::chrono::nanoseconds patience, bool idle) {
  using Clock = std::chrono::steady_clock;
  using std::chrono::microseconds;
  constexpr microseconds query_interval(100), spinning(300), nap(20);
  const auto report = [&] { return Report{Report::reported, acquire(progress + constants::PROGRESS_RUNNING)}; };
  if (has_reported(progress, steps)) return report();
  const Clock::time_point begin = Clock::now();
  Clock::time_point asked = begin;
  for (;;) {
    for (int i = 0; i < 64; ++i) {
      if (has_reported(progress, steps)) return report();
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    const Clock::time_point now = Clock::now();
    if (now - asked >= query_interval) {
      const int answer = query(stream, device);
      // All writes of the stream before its answer are visible now.
      if (has_reported(progress, steps)) return report();
      if (answer == kDone) return {Report::lost, 0};
      if (answer != kWorking) return {Report::failed, answer};
      asked = Clock::now();
      if (asked - begin >= patience) return {Report::pending, 0};
    }
    // A long wait is a wait for fn. While the device still has work, waking up late by one sleep costs nothing.
    if (!idle && now - begin >= spinning) std::this_thread::sleep_for(nap);
  }
}

}  // namespace pydeq
