// Threads for kernels that do not depend on torch: a kernel gets a Parallel and calls its run.
#pragma once

#include <cstdint>

namespace pydeq {

struct Parallel {
  // Calls body(context, begin, end) on ranges that cover [0, count) once, on at most `threads` threads at a time, and
  // returns when all are done. body must not throw. Which thread gets which range is not fixed.
  void (*run)(int64_t count, void (*body)(void* context, int64_t begin, int64_t end), void* context);
  int threads;
};

}  // namespace pydeq
