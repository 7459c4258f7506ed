// Host memory that is known to be pinned, so that no step needs to ask the driver: the blocks that the pool of reports
// has allocated. They are never freed. Plain host code.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace pydeq {

// Blocks are only ever added, by any thread, while other threads look them up.
class PinnedBlocks {
 public:
  void add(const void* memory, size_t bytes) {
    Block* block = new Block{reinterpret_cast<uintptr_t>(memory), bytes, first_.load(std::memory_order_relaxed)};
    while (!first_.compare_exchange_weak(block->next, block, std::memory_order_release, std::memory_order_relaxed)) {
    }
  }

  // Whether one of them has all of [memory, memory + bytes).
  bool hold(const void* memory, size_t bytes) const {
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
    for (const Block* block = first_.load(std::memory_order_acquire); block; block = block->next) {
      if (address >= block->begin && bytes <= block->bytes && address - block->begin <= block->bytes - bytes)
        return true;
    }
    return false;
  }

 private:
  struct Block {
    uintptr_t begin;
    size_t bytes;
    Block* next;
  };
  std::atomic<Block*> first_{nullptr};
};

inline PinnedBlocks& pinned_blocks() {
  static PinnedBlocks blocks;
  return blocks;
}

}  // namespace pydeq
