// The vocabulary of device code: every other .cuh uses only these names for threads, memory and synchronization. nvcc
// takes them from here. tests/csrc/emulator defines the same names for the CPU, where each access, barrier and exchange
// is checked and counted.
//
// Warps are always whole: all 32 lanes call every collective, at the same place in the source. Blocks are one-
// dimensional and hold a multiple of 32 threads.
#pragma once

#include <cstdint>

#include "cuda/step_shape.h"
#include "shared/dispatch.h"

namespace pydeq {

// The type in which a thread holds stored entries. Registers have 32 bits, so a word holds two halves, the first one
// in the low bits. Splitting a word waits for its load, so rows stay in words until they are used.
template <class T>
struct WordOf {
  using Type = T;
};
template <>
struct WordOf<Float16> {
  using Type = uint32_t;
};
template <>
struct WordOf<BFloat16> {
  using Type = uint32_t;
};
template <class T>
using Word = typename WordOf<T>::Type;
template <class T>
constexpr int kPerWord = static_cast<int>(sizeof(Word<T>) / sizeof(T));

// The entry that is number i, counted from the first of this word or of any before it.
template <class T>
PYDEQ_HOST_DEVICE inline T entry(Word<T> word, int i) {
  if constexpr (is_half<T>) {
    return {static_cast<uint16_t>(word >> i % kPerWord<T> * 16)};
  } else {
    return word;
  }
}

// The word of kPerWord neighbouring entries.
template <class T>
PYDEQ_HOST_DEVICE inline Word<T> join(const T* entries) {
  if constexpr (is_half<T>) {
    return entries[0].bits | static_cast<uint32_t>(entries[1].bits) << 16;
  } else {
    return entries[0];
  }
}

// N neighbouring entries that travel together, in one access of 8 or 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  Word<T> words[N / kPerWord<T>];
};

}  // namespace pydeq

#ifdef PYDEQ_EMULATOR
#include "emulator/simt.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// PYDEQ_KERNEL(threads, resident) void name(...): a kernel of at most that many threads a block, of which a
// multiprocessor is to have registers for at least `resident`.
#define PYDEQ_KERNEL(threads, resident) __global__ void __launch_bounds__(threads, (resident) / (threads))
#define PYDEQ_DEVICE __device__ inline
// A parameter of a kernel that is read in place, however large it is.
#define PYDEQ_PARAMETER const __grid_constant__
#define PYDEQ_UNROLL_LOOP _Pragma("unroll")
// Before a loop that mostly runs once, such as one over a lane's entries of a short vector: unrolled copies would waste
// registers.
#define PYDEQ_ROLL_LOOP _Pragma("unroll 1")
// type name[count] in a block's shared memory; count is a constant. Not initialized.
#define PYDEQ_SHARED(type, name, count) __shared__ type name[count]

namespace pydeq {

// count entries, `offset` bytes into the shared memory whose size the launch gave; offset is a multiple of the type's
// alignment. Slices do not overlap. Not initialized.
template <class T>
__device__ inline T* shared_slice(int64_t offset, int64_t /*count*/) {
  extern __shared__ __align__(16) unsigned char pydeq_dynamic_shared[];
  return reinterpret_cast<T*>(pydeq_dynamic_shared + offset);
}

__device__ inline int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ inline int block_threads() { return static_cast<int>(blockDim.x); }
__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ inline int block_warps() { return static_cast<int>(blockDim.x) / kWarp; }
__device__ inline int64_t block_index() { return blockIdx.x; }
__device__ inline int64_t grid_blocks() { return gridDim.x; }

// --- Synchronization
// Each of these waits for all threads of its group, and makes all earlier writes visible to them.

__device__ inline void block_sync() { __syncthreads(); }
__device__ inline void warp_sync() { __syncwarp(); }

// Clusters: as many neighbouring blocks as the launch says run at once, and see each other's shared memory from the
// first cluster_sync on, until one of them returns. All threads of all blocks must call cluster_sync. It makes all
// earlier writes visible to them, as block_sync does in a block. GPUs before 9.0 have no clusters: each block is one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ inline int cluster_rank() { return static_cast<int>(__clusterRelativeBlockRank()); }
__device__ inline void cluster_sync() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}
// The address in the block of this rank that corresponds to `shared` in this block.
template <class T>
__device__ inline T* cluster_peer(T* shared, int rank) {
  return static_cast<T*>(__cluster_map_shared_rank(shared, static_cast<unsigned>(rank)));
}
#else
__device__ inline int cluster_rank() { return 0; }
__device__ inline void cluster_sync() { __syncthreads(); }
template <class T>
__device__ inline T* cluster_peer(T* shared, int /*rank*/) {
  return shared;
}
#endif

// Orders this thread's accesses before it against those after it, as seen by the device, or by the host too.
__device__ inline void fence_device() { __threadfence(); }
__device__ inline void fence_system() { __threadfence_system(); }

// Adds to a counter in global memory and returns the old value. Orders no other access: see fence_device.
__device__ inline int32_t atomic_add(int32_t* counter, int32_t value) { return atomicAdd(counter, value); }

// --- Exchange within a warp

// Replaces each of N values by its sum over the warp: halves of lanes, quarters, ..., the same bits in every lane.
template <int N, class A>
__device__ inline void warp_sum(A (&values)[N]) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += __shfl_xor_sync(0xffffffffu, values[i], distance);
  }
}

// The value of the lane with this number; lanes may ask different lanes.
template <class A>
__device__ inline A warp_broadcast(A value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

template <class A>
__device__ inline A warp_shuffle_xor(A value, int distance) {
  return __shfl_xor_sync(0xffffffffu, value, distance);
}

__device__ inline bool warp_any(bool vote) { return __any_sync(0xffffffffu, vote) != 0; }

// --- Global memory

// A pack is copied as one of CUDA's vector types, member by member: the compiler splits a copy made byte by byte. The
// store is an intrinsic, or the compiler would merge it with the stores of single entries at the end of a row.
namespace detail {

__device__ inline void load(const double* p, Pack<double, 2>& out) {
  const double2 v = *reinterpret_cast<const double2*>(p);
  out = {{v.x, v.y}};
}
__device__ inline void load(const float* p, Pack<float, 4>& out) {
  const float4 v = *reinterpret_cast<const float4*>(p);
  out = {{v.x, v.y, v.z, v.w}};
}
template <class Half>
__device__ inline void load(const Half* p, Pack<Half, 8>& out) {
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  out.words[0] = v.x;
  out.words[1] = v.y;
  out.words[2] = v.z;
  out.words[3] = v.w;
}
template <class Half>
__device__ inline void load(const Half* p, Pack<Half, 4>& out) {
  const uint2 v = *reinterpret_cast<const uint2*>(p);
  out.words[0] = v.x;
  out.words[1] = v.y;
}

__device__ inline void store(double* p, const Pack<double, 2>& in) {
  __stwb(reinterpret_cast<double2*>(p), make_double2(in.words[0], in.words[1]));
}
__device__ inline void store(float* p, const Pack<float, 4>& in) {
  __stwb(reinterpret_cast<float4*>(p), make_float4(in.words[0], in.words[1], in.words[2], in.words[3]));
}
template <class Half>
__device__ inline void store(Half* p, const Pack<Half, 8>& in) {
  __stwb(reinterpret_cast<uint4*>(p), make_uint4(in.words[0], in.words[1], in.words[2], in.words[3]));
}
template <class Half>
__device__ inline void store(Half* p, const Pack<Half, 4>& in) {
  __stwb(reinterpret_cast<uint2*>(p), make_uint2(in.words[0], in.words[1]));
}

}  // namespace detail

// p is aligned to the pack.
template <int N, class T>
__device__ inline Pack<T, N> load_pack(const T* p) {
  Pack<T, N> out;
  detail::load(p, out);
  return out;
}

template <int N, class T>
__device__ inline void store_pack(T* p, const Pack<T, N>& pack) {
  detail::store(p, pack);
}

template <class T>
__device__ inline T load_one(const T* p) {
  return *p;
}

template <class T>
__device__ inline void store_one(T* p, T value) {
  *p = value;
}

// Writes to memory that the host polls.
__device__ inline void store_system(int64_t* p, int64_t value) { *static_cast<volatile int64_t*>(p) = value; }

// --- From storage types to compute types, and back, rounding to nearest even

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline float widen(BFloat16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }

template <class T>
__device__ inline T narrow(Compute<T> x) {
  return x;
}
template <>
__device__ inline Float16 narrow<Float16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
__device__ inline BFloat16 narrow<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

// kPerWord neighbouring entries, narrowed to a word.
template <class T>
__device__ inline Word<T> narrow_word(const Compute<T>* x) {
  return *x;
}
template <>
__device__ inline uint32_t narrow_word<Float16>(const float* x) {
  const __half2 pair = __floats2half2_rn(x[0], x[1]);
  return __half_as_ushort(__low2half(pair)) | static_cast<uint32_t>(__half_as_ushort(__high2half(pair))) << 16;
}
template <>
__device__ inline uint32_t narrow_word<BFloat16>(const float* x) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x[0], x[1]);
  return __bfloat16_as_ushort(__low2bfloat16(pair)) | static_cast<uint32_t>(__bfloat16_as_ushort(__high2bfloat16(pair)))
                                                          << 16;
}

}  // namespace pydeq

#endif  // PYDEQ_EMULATOR
