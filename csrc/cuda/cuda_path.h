// The forced path of steps on a GPU: one of constants::CUDA_PATH_*. Plain host code.
#pragma once

#include <atomic>

#include "pydeq_constants.h"

namespace pydeq {

// Read at each step; the environment's PYDEQ_CUDA_PATH is written here when the library is loaded.
inline std::atomic<int>& cuda_path() {
  static std::atomic<int> path{constants::CUDA_PATH_AUTO};
  return path;
}

}  // namespace pydeq
