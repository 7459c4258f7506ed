// Memory that is kept from one operation to the next. Plain host code, for any kind of memory.
#pragma once

#include <cstdint>
#include <utility>

namespace pydeq {

// The key of memory that may be reused: the same stream of the same device.
struct ScratchKey {
  int device;
  unsigned long long stream;
  bool operator==(const ScratchKey& other) const { return device == other.device && stream == other.stream; }
};

// The memory of the few keys that were used last.
template <class Memory>
class KeptScratch {
 public:
  // Returns at least `bytes` bytes; calls `allocate(size)` if the kept memory is smaller. Sizes double because a
  // history grows: otherwise a solve would allocate every few steps.
  template <class Allocate>
  Memory& take(const ScratchKey& key, int64_t bytes, const Allocate& allocate) {
    int at = 0;
    while (at < kKept - 1 && !(entries_[at].bytes > 0 && entries_[at].key == key)) ++at;
    for (; at > 0; --at) std::swap(entries_[at], entries_[at - 1]);
    Entry& entry = entries_[0];
    if (!(entry.bytes >= bytes && entry.key == key)) {
      int64_t size = kSmallest;
      while (size < bytes) size *= 2;
      entry.bytes = 0;  // an allocation that fails leaves nothing to take
      entry.memory = allocate(size);
      entry.key = key;
      entry.bytes = size;
    }
    return entry.memory;
  }

 private:
  static constexpr int kKept = 4;
  static constexpr int64_t kSmallest = 1 << 16;
  struct Entry {
    ScratchKey key{};
    int64_t bytes = 0;
    Memory memory{};
  };
  Entry entries_[kKept];
};

}  // namespace pydeq
