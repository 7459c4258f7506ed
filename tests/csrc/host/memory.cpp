// What csrc/cuda/kept_scratch.h and csrc/cuda/pinned_blocks.h do with memory that is a number here. Prints a line
// for each check that fails.
#include <cstdio>
#include <thread>
#include <vector>

#include "cuda/kept_scratch.h"
#include "cuda/pinned_blocks.h"

namespace {

int failures = 0;

void check(bool holds, const char* what) {
  if (holds) return;
  ++failures;
  std::printf("%s\n", what);
}

void scratch() {
  pydeq::KeptScratch<int> kept;
  int allocated = 0;
  int64_t largest = 0;
  const auto take = [&](int device, unsigned long long stream, int64_t bytes) {
    return kept.take({device, stream}, bytes, [&](int64_t size) {
      check(size >= bytes, "is smaller than what was asked for");
      largest = size > largest ? size : largest;
      return ++allocated;
    });
  };
  check(take(0, 7, 100) == 1 && take(0, 7, 100) == 1 && take(0, 7, 10) == 1, "is not kept from step to step");
  check(take(0, 8, 10) == 2, "is used on another stream");
  check(take(1, 7, 10) == 3, "is used on another device");
  check(take(0, 7, 100) == 1 && take(0, 8, 10) == 2, "is lost when streams take turns");
  check(take(0, 7, largest + 1) == 4 && take(0, 7, largest) == 4, "is too small");
  for (unsigned long long stream = 20; stream < 24; ++stream) take(0, stream, 1);
  check(allocated == 8, "is allocated too often");
  check(take(0, 7, 101) == 9, "is kept for more streams than it has room for");
  const int before = allocated;
  const int64_t most = 1 << 24;
  for (int64_t bytes = 1; bytes < most; bytes += most / 500) take(0, 7, bytes);
  check(allocated - before <= 10, "is allocated at every growth");
  bool thrown = false;
  try {
    kept.take({0, 7}, 2 * most, [](int64_t) -> int { throw 1; });
  } catch (int) {
    thrown = true;
  }
  const int fresh = allocated + 1, taken = take(0, 7, 101);
  check(thrown && taken == fresh, "is taken although its allocation failed");
}

void pinned() {
  static char blocks[8][256];
  static pydeq::PinnedBlocks known;  // blocks are never freed
  check(!known.hold(blocks[0], 1), "holds what nobody added");
  std::vector<std::thread> threads;
  for (char* block : {blocks[0], blocks[2], blocks[4], blocks[6]})
    threads.emplace_back([&, block] { known.add(block, 256); });
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < 8; ++i) check(known.hold(blocks[i], 256) == (i % 2 == 0), "holds another block, or lost one");
  check(known.hold(blocks[2] + 240, 16) && !known.hold(blocks[2] + 241, 16), "does not end where the block ends");
  check(!known.hold(blocks[2] - 1, 16), "begins before the block");
}

}  // namespace

int main() {
  scratch();
  pinned();
  return failures;
}
