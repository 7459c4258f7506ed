// Running a kernel on the CPU.
#pragma once

#include <cstdint>
#include <functional>

namespace pydeq {
namespace emulator {

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  int cluster = 1;  // neighbouring blocks that run at once and see each other's shared memory
};

// Seeds the order in which warps, lanes and blocks run.
void seed(uint64_t value);

// Runs `kernel` in every thread of the grid, a few blocks at a time: picks a random warp, runs its lanes in random
// order until all of them wait or are done, and picks again. Ends the process with a message where the kernel breaks a
// rule of SIMT.
void launch(const Grid& grid, const std::function<void()>& kernel);

// Both since the last reset.
struct Traffic {
  int64_t loaded, stored;  // bytes of global memory, as the kernel asked for them
};
extern Traffic traffic;
struct Launches {
  int64_t count;
  int64_t shared_bytes, cluster;  // the most that a block, and a cluster, of one of them had
};
extern Launches launches;

}  // namespace emulator
}  // namespace pydeq
