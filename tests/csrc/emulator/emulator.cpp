// Threads as fibers, and their schedule. Compiled without ThreadSanitizer, which is told here what orders what.
//
// ThreadSanitizer sees each fiber as a thread. Barriers are acquire and release on a tag that alternates by generation:
// with one tag, a thread that is already at the next barrier would seem ordered before one that still leaves this one.
// Shuffles and votes order nothing. Atomics do with fences, as in C++: what precedes a fence before an atomic precedes
// what follows a fence after a later atomic on the same address.
#include "emulator.h"

#include <sys/mman.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/simt.cuh"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(PYDEQ_EMULATOR_TSAN)
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#else
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif

// A stack that waits until switch_to goes on with it. swapcontext would do, but it asks the kernel for the signal mask
// each time, which takes longer than the rest.
#if defined(__x86_64__)
extern "C" void pydeq_switch_stack(void** from, void* to);
asm(R"(
.text
.type pydeq_switch_stack, @function
pydeq_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pydeq_switch_stack, . - pydeq_switch_stack
)");
struct Context {
  void* top = nullptr;
  void prepare(void* stack, size_t bytes, void (*entry)()) {
    void** at = reinterpret_cast<void**>(static_cast<char*>(stack) + bytes);
    *--at = nullptr;  // entry's return address: it never returns
    *--at = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--at = nullptr;  // registers
    top = at;
  }
};
static void switch_to(Context& from, Context& to) { pydeq_switch_stack(&from.top, to.top); }
#else
struct Context {
  ucontext_t context;
  void prepare(void* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
};
static void switch_to(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

namespace pydeq {
namespace emulator {
namespace {

// While it lives, ThreadSanitizer ignores what this thread does: the emulator's own books are kept by whoever runs.
struct Unseen {
#if defined(PYDEQ_EMULATOR_TSAN)
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  ~Unseen() {}
#endif
};

constexpr size_t kStack = 256 << 10;
constexpr int kEntry = 64;  // bytes that a lane may hand over

struct Block;

enum class State { runnable, in_warp, in_block, in_cluster, finished };

struct Fiber : Thread {
  Block* owner = nullptr;
  State state = State::runnable;
  const char* what = "";
  Site site{};
  int warp_generation = 0, block_generation = 0, cluster_generation = 0;
  char* fence = nullptr;       // tag of its last one
  std::vector<char*> noticed;  // tags of fences before atomics that it has seen the value of
  Context context;
  void* stack = nullptr;
  void* fake_stack = nullptr;
  void* tsan = nullptr;
};

struct alignas(16) Exchange {
  unsigned char entries[2][kWarp * kEntry];
};

struct Warp {
  int arrived = 0;
  Exchange exchange;
  char tags[2];
};

struct Slice {
  int64_t offset, bytes;
  void* memory;
};

struct Block;

// Blocks that run at once.
struct Cluster {
  std::vector<Block*> blocks;
  int arrived = 0, finished = 0;  // threads
  char tags[2];
};

struct Block {
  int64_t index;
  int64_t shared_bytes;
  Cluster* cluster;
  std::vector<Fiber*> threads;
  std::vector<Warp> warps;
  std::vector<Slice> slices;
  std::map<std::pair<std::string, int>, std::pair<int64_t, void*>> arrays;
  int arrived = 0, finished = 0;
  char tags[2];
};

std::mt19937_64 generator;
Context scheduler;
const std::function<void()>* body;
std::vector<Fiber*> idle;  // whose stacks are free
std::vector<Fiber*> used;  // in this launch, under ThreadSanitizer
char begin_tag, end_tag;
std::deque<char> fence_tags;                               // one for each fence of a launch
std::map<const void*, std::vector<char*>> fenced_atomics;  // by address
#if defined(__SANITIZE_ADDRESS__)
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_size;
#endif
#if defined(PYDEQ_EMULATOR_TSAN)
void* scheduler_tsan;
#endif

int64_t below(int64_t bound) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(bound)); }

Fiber* self() { return static_cast<Fiber*>(current); }

// What a block that has returned had in shared memory is no longer there for its peers.
void close_to_peers(Block& block) {
#if defined(__SANITIZE_ADDRESS__)
  for (Slice& slice : block.slices) __asan_poison_memory_region(slice.memory, static_cast<size_t>(slice.bytes));
  for (auto& array : block.arrays) {
    __asan_poison_memory_region(array.second.second, static_cast<size_t>(array.second.first));
  }
#else
  (void)block;
#endif
}

void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  __tsan_acquire(&begin_tag);
  (*body)();
  Fiber* fiber = self();
  __tsan_release(&end_tag);
  fiber->state = State::finished;
  ++fiber->owner->cluster->finished;
  if (++fiber->owner->finished == fiber->block_threads) close_to_peers(*fiber->owner);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_stack_size);  // frees its fake stack
#endif
#if defined(PYDEQ_EMULATOR_TSAN)
  __tsan_switch_to_fiber(scheduler_tsan, 1);
#endif
  switch_to(fiber->context, scheduler);
  std::abort();
}

// From the scheduler into a fiber, until it waits or ends.
void resume(Fiber* fiber) {
  current = fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber->stack, kStack);
#endif
#if defined(PYDEQ_EMULATOR_TSAN)
  __tsan_switch_to_fiber(fiber->tsan, 1);
#endif
  switch_to(scheduler, fiber->context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

// From a fiber back to the scheduler.
void yield() {
  Fiber* fiber = self();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fiber->fake_stack, scheduler_stack, scheduler_stack_size);
#endif
#if defined(PYDEQ_EMULATOR_TSAN)
  __tsan_switch_to_fiber(scheduler_tsan, 1);
#endif
  switch_to(fiber->context, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber->fake_stack, &scheduler_stack, &scheduler_stack_size);
#endif
}

void add_idle(int64_t count) {
  const size_t bytes = kStack * static_cast<size_t>(count);
  void* stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) fail("no memory for the stacks of %lld threads", static_cast<long long>(count));
  for (int64_t i = 0; i < count; ++i) {
    idle.push_back(new Fiber);
    idle.back()->stack = static_cast<char*>(stacks) + kStack * static_cast<size_t>(i);
  }
}

Fiber* make_fiber(Block* block, int index, int threads, int64_t blocks) {
  if (idle.empty()) add_idle(1);
  Fiber* fiber = idle.back();
  idle.pop_back();
  const int rank = static_cast<int>(block->index % static_cast<int64_t>(block->cluster->blocks.size()));
  static_cast<Thread&>(*fiber) = {index, threads, block->index, blocks, rank};
  fiber->owner = block;
  fiber->state = State::runnable;
  fiber->what = "";
  fiber->site = {};
  fiber->warp_generation = fiber->block_generation = fiber->cluster_generation = 0;
  fiber->fence = nullptr;
  fiber->noticed.clear();
  fiber->fake_stack = nullptr;
  fiber->context.prepare(fiber->stack, kStack, enter);
#if defined(PYDEQ_EMULATOR_TSAN)
  fiber->tsan = __tsan_create_fiber(0);
#endif
  return fiber;
}

// Memory of exactly this size that holds NaN in every floating-point type.
void* poisoned(int64_t bytes) {
  unsigned char* memory = static_cast<unsigned char*>(std::malloc(static_cast<size_t>(bytes)));
  if (!memory && bytes) fail("no memory for a block's shared memory");
  for (int64_t i = 0; i < bytes; ++i) memory[i] = 0xff;
  return memory;
}

std::unique_ptr<Block> make_block(int64_t index, Cluster* cluster, const Grid& grid) {
  auto block = std::make_unique<Block>();
  block->index = index;
  block->shared_bytes = grid.shared_bytes;
  block->cluster = cluster;
  block->warps = std::vector<Warp>(static_cast<size_t>(grid.threads / kWarp));
  for (int t = 0; t < grid.threads; ++t) {
    block->threads.push_back(make_fiber(block.get(), t, grid.threads, grid.blocks));
  }
  return block;
}

void free_part(void* memory, int64_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory, static_cast<size_t>(bytes));
#else
  (void)bytes;
#endif
  std::free(memory);
}

// Its threads are done.
void retire(Block& block) {
  for (Fiber* fiber : block.threads) {
#if defined(PYDEQ_EMULATOR_TSAN)
    // The next thread on this stack would seem to race with this one, and one of the same number would seem to be it.
    used.push_back(fiber);
#else
    idle.push_back(fiber);
#endif
  }
}

void free_shared(Block& block) {
  for (Slice& slice : block.slices) free_part(slice.memory, slice.bytes);
  for (auto& array : block.arrays) free_part(array.second.second, array.second.first);
}

// Shared memory of a block, poisoned when it is first asked for.
void* array_of(Block& block, const std::pair<std::string, int>& place, int64_t bytes) {
  auto& array = block.arrays[place];
  if (!array.second) array = {bytes, poisoned(bytes)};
  return array.second;
}

void* slice_of(Block& block, int64_t offset, int64_t bytes) {
  if (offset < 0 || bytes < 0 || offset + bytes > block.shared_bytes) {
    fail("shared memory from %lld to %lld, of %lld bytes", static_cast<long long>(offset),
         static_cast<long long>(offset + bytes), static_cast<long long>(block.shared_bytes));
  }
  for (const Slice& slice : block.slices) {
    if (slice.offset == offset && slice.bytes == bytes) return slice.memory;
    if (offset < slice.offset + slice.bytes && slice.offset < offset + bytes) {
      fail("slices of shared memory overlap: %lld bytes at %lld, %lld bytes at %lld", static_cast<long long>(bytes),
           static_cast<long long>(offset), static_cast<long long>(slice.bytes), static_cast<long long>(slice.offset));
    }
  }
  block.slices.push_back({offset, bytes, poisoned(bytes)});
  return block.slices.back().memory;
}

bool runnable(const Block& block, size_t warp) {
  for (size_t l = 0; l < kWarp; ++l) {
    if (block.threads[warp * kWarp + l]->state == State::runnable) return true;
  }
  return false;
}

// Why nobody can go on.
[[noreturn]] void stuck(const std::vector<std::unique_ptr<Block>>& blocks) {
  std::string text;
  for (const auto& block : blocks) {
    std::map<std::string, int> places;
    for (const Fiber* fiber : block->threads) {
      std::string place = "have returned";
      if (fiber->state != State::finished) {
        place =
            std::string("wait in ") + fiber->what + " at " + fiber->site.file + ":" + std::to_string(fiber->site.line);
      }
      ++places[place];
    }
    text += "\n  block " + std::to_string(block->index) + ":";
    for (const auto& place : places) text += "\n    " + std::to_string(place.second) + " threads " + place.first;
    if (block->cluster->blocks.size() > 1) {
      text += "\n    of its cluster, " + std::to_string(block->cluster->finished) + " threads have returned";
    }
  }
  fail("deadlock: not all threads that must meet do%s", text.c_str());
}

void same_place(const Fiber* one, const Fiber* other, const char* what, Site site) {
  const bool same =
      std::string(other->what) == what && std::string(other->site.file) == site.file && other->site.line == site.line;
  if (!same) {
    fail("threads %d of block %lld and %d of block %lld meet at different places: %s at %s:%d, %s at %s:%d", one->index,
         static_cast<long long>(one->block), other->index, static_cast<long long>(other->block), what, site.file,
         site.line, other->what, other->site.file, other->site.line);
  }
}

// Meets the warp; whether the caller was the last to come. It goes on at once, the others when they are picked.
bool arrive_in_warp(const char* what, Site site) {
  const Unseen unseen;
  Fiber* fiber = self();
  Block& block = *fiber->owner;
  const int warp = fiber->index / kWarp;
  for (int l = 0; l < kWarp; ++l) {
    const Fiber* other = block.threads[static_cast<size_t>(warp * kWarp + l)];
    if (other->state == State::in_warp) {
      same_place(fiber, other, what, site);
      break;
    }
  }
  fiber->what = what;
  fiber->site = site;
  fiber->state = State::in_warp;
  ++fiber->warp_generation;
  if (++block.warps[static_cast<size_t>(warp)].arrived < kWarp) return false;
  block.warps[static_cast<size_t>(warp)].arrived = 0;
  for (int l = 0; l < kWarp; ++l) block.threads[static_cast<size_t>(warp * kWarp + l)]->state = State::runnable;
  return true;
}

}  // namespace

Thread* current;
Traffic traffic;
Launches launches;

void count_load(int64_t bytes) { traffic.loaded += bytes; }
void count_store(int64_t bytes) { traffic.stored += bytes; }

void fail(const char* format, ...) {
  std::fflush(stdout);
  va_list arguments;
  va_start(arguments, format);
  std::fputs("emulator: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputs("\n", stderr);
  std::fflush(stderr);
  std::_Exit(3);
}

void* shared_array(Site site, int64_t bytes) {
  const Unseen unseen;
  return array_of(*self()->owner, {site.file, site.line}, bytes);
}

void* shared_slice(int64_t offset, int64_t bytes, int alignment) {
  const Unseen unseen;
  // Here a slice has memory of its own, which is always aligned; there it lies at its offset.
  if (offset % alignment) {
    fail("misaligned slice of shared memory: at %lld, of a type aligned to %d bytes", static_cast<long long>(offset),
         alignment);
  }
  return slice_of(*self()->owner, offset, bytes);
}

void block_sync(Site site) {
  Fiber* fiber = self();
  Block& block = *fiber->owner;
  for (const Fiber* other : block.threads) {
    if (other->state == State::in_block) {
      const Unseen unseen;
      same_place(fiber, other, "block_sync", site);
      break;
    }
  }
  fiber->what = "block_sync";
  fiber->site = site;
  fiber->state = State::in_block;
  void* tag = &block.tags[fiber->block_generation++ % 2];
  __tsan_release(tag);
  if (++block.arrived == fiber->block_threads) {
    block.arrived = 0;
    for (Fiber* other : block.threads) other->state = State::runnable;
  }
  yield();  // the last one, too: whoever goes on first is chance
  __tsan_acquire(tag);
}

void cluster_sync(Site site) {
  Fiber* fiber = self();
  Cluster& cluster = *fiber->owner->cluster;
  {
    const Unseen unseen;
    for (const Block* block : cluster.blocks) {
      for (const Fiber* other : block->threads) {
        if (other->state == State::in_cluster) {
          same_place(fiber, other, "cluster_sync", site);
          break;
        }
      }
    }
  }
  fiber->what = "cluster_sync";
  fiber->site = site;
  fiber->state = State::in_cluster;
  void* tag = &cluster.tags[fiber->cluster_generation++ % 2];
  __tsan_release(tag);
  {
    const Unseen unseen;
    if (++cluster.arrived == fiber->block_threads * static_cast<int>(cluster.blocks.size())) {
      cluster.arrived = 0;
      for (const Block* block : cluster.blocks) {
        for (Fiber* other : block->threads) other->state = State::runnable;
      }
    }
  }
  yield();
  __tsan_acquire(tag);
}

void* cluster_peer(void* shared, int rank, Site site) {
  const Unseen unseen;
  Fiber* fiber = self();
  const Cluster& cluster = *fiber->owner->cluster;
  if (rank < 0 || rank >= static_cast<int>(cluster.blocks.size())) {
    fail("no block of rank %d in a cluster of %d at %s:%d", rank, static_cast<int>(cluster.blocks.size()), site.file,
         site.line);
  }
  Block& peer = *cluster.blocks[static_cast<size_t>(rank)];
  if (&peer != fiber->owner && fiber->cluster_generation == 0) {
    fail("a peer's shared memory before it is known to have begun, at %s:%d", site.file, site.line);
  }
  if (peer.finished > 0) fail("shared memory of a peer that returns, at %s:%d", site.file, site.line);
  char* const address = static_cast<char*>(shared);
  for (const Slice& slice : fiber->owner->slices) {
    char* const begin = static_cast<char*>(slice.memory);
    if (address == begin || (begin < address && address < begin + slice.bytes)) {
      return static_cast<char*>(slice_of(peer, slice.offset, slice.bytes)) + (address - begin);
    }
  }
  for (const auto& array : fiber->owner->arrays) {
    char* const begin = static_cast<char*>(array.second.second);
    if (address == begin || (begin < address && address < begin + array.second.first)) {
      return static_cast<char*>(array_of(peer, array.first, array.second.first)) + (address - begin);
    }
  }
  fail("cluster_peer of what is not in shared memory, at %s:%d", site.file, site.line);
}

void warp_sync(Site site) {
  Fiber* fiber = self();
  void* tag = &fiber->owner->warps[static_cast<size_t>(fiber->index / kWarp)].tags[fiber->warp_generation % 2];
  __tsan_release(tag);
  if (!arrive_in_warp("warp_sync", site)) yield();
  __tsan_acquire(tag);
}

void fence() {
  Fiber* fiber = self();
  {
    const Unseen unseen;
    fence_tags.push_back(0);
    fiber->fence = &fence_tags.back();
  }
  for (char* tag : fiber->noticed) __tsan_acquire(tag);
  __tsan_release(fiber->fence);
}

void note_atomic(const void* address) {
  const Unseen unseen;
  std::vector<char*>& tags = fenced_atomics[address];
  self()->noticed = tags;
  if (self()->fence) tags.push_back(self()->fence);
}

const void* exchange(const char* what, Site site, const void* entry, int bytes, Combine combine, int argument) {
  if (bytes > kEntry) fail("%s of %d bytes at %s:%d", what, bytes, site.file, site.line);
  Fiber* fiber = self();
  Warp& warp = fiber->owner->warps[static_cast<size_t>(fiber->index / kWarp)];
  // A lane may be at the next exchange while others have yet to read this one.
  unsigned char* entries = warp.exchange.entries[fiber->warp_generation % 2];
  for (int i = 0; i < bytes; ++i) {
    entries[fiber->index % kWarp * bytes + i] = static_cast<const unsigned char*>(entry)[i];
  }
  if (arrive_in_warp(what, site)) {
    const Unseen unseen;
    combine(entries, argument);
  } else {
    yield();
  }
  return entries;
}

void seed(uint64_t value) { generator.seed(value); }

void launch(const Grid& grid, const std::function<void()>& kernel) {
  if (grid.blocks < 1 || grid.threads < kWarp || grid.threads % kWarp || grid.threads > 1024) {
    fail("a grid of %lld blocks of %d threads", static_cast<long long>(grid.blocks), grid.threads);
  }
  if (grid.cluster < 1 || grid.cluster > 8 || grid.blocks % grid.cluster) {
    fail("a grid of %lld blocks in clusters of %d", static_cast<long long>(grid.blocks), grid.cluster);
  }
  ++launches.count;
  if (grid.shared_bytes > launches.shared_bytes) launches.shared_bytes = grid.shared_bytes;
  if (grid.cluster > launches.cluster) launches.cluster = grid.cluster;
  body = &kernel;
#if defined(PYDEQ_EMULATOR_TSAN)
  scheduler_tsan = __tsan_get_current_fiber();
#endif
#if defined(PYDEQ_EMULATOR_TSAN)
  const int64_t missing = grid.blocks * grid.threads - static_cast<int64_t>(idle.size());
  if (missing > 0) add_idle(missing);
#endif
  fence_tags.clear();
  fenced_atomics.clear();
  __tsan_release(&begin_tag);
  std::vector<int64_t> waiting;  // the first blocks of clusters
  for (int64_t b = 0; b < grid.blocks; b += grid.cluster) waiting.push_back(b);
  for (size_t i = waiting.size(); i > 1; --i) std::swap(waiting[i - 1], waiting[static_cast<size_t>(below(i))]);

  const size_t resident = static_cast<size_t>((1 + below(4)) * grid.cluster);
  std::vector<std::unique_ptr<Block>> blocks, retired;
  std::vector<std::unique_ptr<Cluster>> clusters;
  while (!waiting.empty() || !blocks.empty()) {
    while (!waiting.empty() && blocks.size() + static_cast<size_t>(grid.cluster) <= resident) {
      clusters.push_back(std::make_unique<Cluster>());
      Cluster* cluster = clusters.back().get();
      cluster->blocks.resize(static_cast<size_t>(grid.cluster));
      for (int rank = 0; rank < grid.cluster; ++rank) {
        blocks.push_back(make_block(waiting.back() + rank, cluster, grid));
        cluster->blocks[static_cast<size_t>(rank)] = blocks.back().get();
      }
      waiting.pop_back();
    }
    std::vector<std::pair<size_t, size_t>> ready;  // block, warp
    for (size_t b = 0; b < blocks.size(); ++b) {
      for (size_t w = 0; w < blocks[b]->warps.size(); ++w) {
        if (runnable(*blocks[b], w)) ready.push_back({b, w});
      }
    }
    if (ready.empty()) stuck(blocks);
    const auto [b, w] = ready[static_cast<size_t>(below(static_cast<int64_t>(ready.size())))];
    Block& block = *blocks[b];
    for (;;) {
      Fiber* lanes[kWarp];
      int count = 0;
      for (size_t l = 0; l < kWarp; ++l) {
        Fiber* fiber = block.threads[w * kWarp + l];
        if (fiber->state == State::runnable) lanes[count++] = fiber;
      }
      if (count == 0) break;
      for (int i = count; i > 1; --i) std::swap(lanes[i - 1], lanes[below(i)]);
      for (int i = 0; i < count; ++i) {
        if (lanes[i]->state == State::runnable) resume(lanes[i]);
      }
    }
    if (block.finished == grid.threads) {
      retire(block);
      retired.push_back(std::move(blocks[b]));
      blocks.erase(blocks.begin() + static_cast<int64_t>(b));
    }
  }
  // Not before: what the scheduler has seen of one block, it would show to the next one.
  __tsan_acquire(&end_tag);
  for (const auto& block : retired) free_shared(*block);
#if defined(PYDEQ_EMULATOR_TSAN)
  for (Fiber* fiber : used) __tsan_destroy_fiber(fiber->tsan);
#endif
  idle.insert(idle.end(), used.begin(), used.end());
  used.clear();
}

}  // namespace emulator
}  // namespace pydeq
