// The names of csrc/cuda/simt.cuh, for the CPU. Only that file includes this one, which replaces its content.
//
// Every thread of a block is a fiber. What is inline here is compiled with the sanitizers, so that they see each access
// that a kernel makes; what waits, switches or exchanges is in emulator.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator/emulator.h"

#define PYDEQ_KERNEL(threads, resident) void
#define PYDEQ_DEVICE inline
#define PYDEQ_PARAMETER const
#define PYDEQ_UNROLL_LOOP
#define PYDEQ_ROLL_LOOP
#define PYDEQ_SHARED(type, name, count) \
  type* const name =                    \
      static_cast<type*>(::pydeq::emulator::shared_array(::pydeq::emulator::Site::here(), sizeof(type) * (count)))

namespace pydeq {
namespace emulator {

// A place in the source: as a default argument, the caller's.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

struct Thread {
  int index, block_threads;
  int64_t block, blocks;
  int rank;  // of the block in its cluster
};
extern Thread* current;

void* shared_array(Site site, int64_t bytes);
void* shared_slice(int64_t offset, int64_t bytes, int alignment);
void block_sync(Site site);
void warp_sync(Site site);
void cluster_sync(Site site);
void* cluster_peer(void* shared, int rank, Site site);
void fence();
void note_atomic(const void* address);

// Meets all lanes of the warp. The last one to come has `combine` turn their 32 entries of `bytes` bytes into what
// every lane then finds in the returned copy of them.
using Combine = void (*)(void* entries, int argument);
const void* exchange(const char* what, Site site, const void* entry, int bytes, Combine combine, int argument);

void count_load(int64_t bytes);
void count_store(int64_t bytes);

}  // namespace emulator

inline int thread_index() { return emulator::current->index; }
inline int block_threads() { return emulator::current->block_threads; }
inline int lane_index() { return emulator::current->index % kWarp; }
inline int warp_index() { return emulator::current->index / kWarp; }
inline int block_warps() { return emulator::current->block_threads / kWarp; }
inline int64_t block_index() { return emulator::current->block; }
inline int64_t grid_blocks() { return emulator::current->blocks; }

template <class T>
inline T* shared_slice(int64_t offset, int64_t count) {
  return static_cast<T*>(emulator::shared_slice(offset, count * static_cast<int64_t>(sizeof(T)), alignof(T)));
}

// --- Synchronization

inline void block_sync(emulator::Site site = emulator::Site::here()) { emulator::block_sync(site); }
inline void warp_sync(emulator::Site site = emulator::Site::here()) { emulator::warp_sync(site); }
inline int cluster_rank() { return emulator::current->rank; }
inline void cluster_sync(emulator::Site site = emulator::Site::here()) { emulator::cluster_sync(site); }
template <class T>
inline T* cluster_peer(T* shared, int rank, emulator::Site site = emulator::Site::here()) {
  return static_cast<T*>(emulator::cluster_peer(shared, rank, site));
}
inline void fence_device() { emulator::fence(); }
inline void fence_system() { emulator::fence(); }

// Relaxed: without fences it orders nothing, here as there.
inline int32_t atomic_add(int32_t* counter, int32_t value) {
  emulator::note_atomic(counter);
  return __atomic_fetch_add(counter, value, __ATOMIC_RELAXED);
}

// --- Exchange within a warp

namespace emulator {

template <int N, class A>
void add_lanes(void* entries, int) {
  A(*lane)[N] = static_cast<A(*)[N]>(entries);
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    for (int l = 0; l < distance; ++l) {
      for (int i = 0; i < N; ++i) lane[l][i] += lane[l + distance][i];
    }
  }
}

inline void keep(void*, int) {}

}  // namespace emulator

template <int N, class A>
inline void warp_sum(A (&values)[N], emulator::Site site = emulator::Site::here()) {
  const void* sums = emulator::exchange("warp_sum", site, values, sizeof values, emulator::add_lanes<N, A>, 0);
  for (int i = 0; i < N; ++i) values[i] = static_cast<const A*>(sums)[i];
}

template <class A>
inline A warp_broadcast(A value, int lane, emulator::Site site = emulator::Site::here()) {
  if (lane < 0 || lane >= kWarp) emulator::fail("warp_broadcast of lane %d at %s:%d", lane, site.file, site.line);
  return static_cast<const A*>(
      emulator::exchange("warp_broadcast", site, &value, sizeof value, emulator::keep, lane))[lane];
}

template <class A>
inline A warp_shuffle_xor(A value, int distance, emulator::Site site = emulator::Site::here()) {
  return static_cast<const A*>(emulator::exchange("warp_shuffle_xor", site, &value, sizeof value, emulator::keep,
                                                  distance))[lane_index() ^ distance];
}

inline bool warp_any(bool vote, emulator::Site site = emulator::Site::here()) {
  const int mine[1] = {vote};
  return *static_cast<const int*>(
             emulator::exchange("warp_any", site, mine, sizeof mine, emulator::add_lanes<1, int>, 0)) != 0;
}

// --- Global memory

template <int N, class T>
inline Pack<T, N> load_pack(const T* p, emulator::Site site = emulator::Site::here()) {
  static_assert(sizeof(T) * N == 8 || sizeof(T) * N == 16);
  if (reinterpret_cast<uintptr_t>(p) % (sizeof(T) * N)) {
    emulator::fail("misaligned load_pack of %d bytes at %s:%d", static_cast<int>(sizeof(T) * N), site.file, site.line);
  }
  emulator::count_load(sizeof(T) * N);
  Pack<T, N> out;
  for (int i = 0; i < N; i += kPerWord<T>) out.words[i / kPerWord<T>] = join<T>(p + i);
  return out;
}

template <int N, class T>
inline void store_pack(T* p, const Pack<T, N>& pack, emulator::Site site = emulator::Site::here()) {
  static_assert(sizeof(T) * N == 8 || sizeof(T) * N == 16);
  if (reinterpret_cast<uintptr_t>(p) % (sizeof(T) * N)) {
    emulator::fail("misaligned store_pack of %d bytes at %s:%d", static_cast<int>(sizeof(T) * N), site.file, site.line);
  }
  emulator::count_store(sizeof(T) * N);
  for (int i = 0; i < N; ++i) p[i] = entry<T>(pack.words[i / kPerWord<T>], i);
}

template <class T>
inline T load_one(const T* p) {
  emulator::count_load(sizeof(T));
  return *p;
}

template <class T>
inline void store_one(T* p, T value) {
  emulator::count_store(sizeof(T));
  *p = value;
}

inline void store_system(int64_t* p, int64_t value) { *p = value; }

// --- Storage types

inline double widen(double x) { return x; }
inline float widen(float x) { return x; }
inline float widen(Float16 x) {
  _Float16 h;
  std::memcpy(&h, &x.bits, sizeof h);
  return static_cast<float>(h);
}
inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

template <class T>
inline T narrow(Compute<T> x) {
  return x;
}
template <>
inline Float16 narrow<Float16>(float x) {
  const _Float16 h = static_cast<_Float16>(x);
  Float16 out;
  std::memcpy(&out.bits, &h, sizeof h);
  return out;
}
template <>
inline BFloat16 narrow<BFloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <class T>
inline Word<T> narrow_word(const Compute<T>* x) {
  T entries[kPerWord<T>];
  for (int i = 0; i < kPerWord<T>; ++i) entries[i] = narrow<T>(x[i]);
  return join(entries);
}

}  // namespace pydeq
