// Running a kernel on the CPU.
#pragma once

#include <cstdint>
#include <functional>

namespace pydeq {
namespace emulator {

struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
};

// Seeds the order in which warps, lanes and blocks run.
void seed(uint64_t value);

// Runs `kernel` in every thread of the grid, a few blocks at a time: picks a random warp, runs its lanes in random
// order until all of them wait or are done, and picks again. Ends the process with a message where the kernel breaks a
// rule of SIMT.
void launch(const Grid& grid, const std::function<void()>& kernel);

int64_t launches();

}  // namespace emulator
}  // namespace pydeq
