// Kernels with a fault of each kind that the emulator must find, and without any: y[b] = sum_i x[b, i], and how many
// blocks were there; and in clusters, total = sum_b y[b].
#include "cuda/tile.cuh"
#include "emulator/emulator.h"
#include "run_case.h"

namespace pydeq {
namespace {

enum class Fault {
  none,
  removed_barrier,
  lost_update,
  early_exit,
  divergent_warp,
  off_by_one_tail,
  uninitialized_shared,
  misaligned_pack,
  unwritten_output,
  missing_fence,
  slice_overrun,
  none_in_a_cluster,
  removed_cluster_barrier,
  peer_not_begun,
  peer_returned,
  early_exit_in_a_cluster,
  slice_overrun_of_a_peer,
  misaligned_slice,
};

constexpr int kThreads = 128;

template <Fault fault>
PYDEQ_KERNEL(kThreads, kThreads)
specimen_kernel(const float* x, int64_t n, float* y, float* partial, int32_t* done, float* total) {
  PYDEQ_SHARED(float, sums, kThreads);
  PYDEQ_SHARED(int, last, 1);
  const int t = thread_index();
  const float* row = x + block_index() * n;
  const int64_t end = fault == Fault::off_by_one_tail ? n + 1 : n;
  if (fault == Fault::early_exit && t >= n) return;
  float sum = 0.0f;
  for (int64_t i = 4 * t; i < end; i += 4 * kThreads) {
    if ((is_aligned<4>(row) || fault == Fault::misaligned_pack) && i + 4 <= n) {
      const Pack<float, 4> pack = load_pack<4>(row + i);
      for (float word : pack.words) sum += word;
    } else {
      for (int64_t j = i; j < i + 4 && j < end; ++j) sum += load_one(row + j);
    }
  }
  if (fault != Fault::uninitialized_shared || t < kThreads - 1) sums[t] = sum;
  if (fault == Fault::slice_overrun && t == 0) sums[kThreads] = sum;
  if (fault != Fault::removed_barrier) block_sync();
  for (int half = kThreads / 2; half >= kWarp; half /= 2) {
    if (t < half) sums[t] += sums[t + half];
    block_sync();
  }
  if (warp_index() == 0) {
    float lanes[1] = {sums[t]};
    if (fault == Fault::divergent_warp && t < kWarp / 2) {
      warp_sum(lanes);
    } else {
      warp_sum(lanes);
    }
    if (t == 0 && fault != Fault::unwritten_output) store_one(y + block_index(), lanes[0]);
    if (t == 0) partial[block_index()] = lanes[0];
  }
  if (t == 0) {
    if (fault != Fault::missing_fence) fence_device();
    if (fault == Fault::lost_update) {
      *last = ++*done == grid_blocks();
    } else {
      *last = atomic_add(done, 1) == grid_blocks() - 1;
    }
    fence_device();
    if (*last) {
      float all = 0.0f;
      for (int64_t b = 0; b < grid_blocks(); ++b) all += partial[b];
      *total = all;
    }
  }
}

// A block sums up a row in shared memory, and the first one of a cluster what its peers have there.
template <Fault fault>
PYDEQ_KERNEL(kThreads, kThreads)
cluster_kernel(const float* x, int64_t n, int64_t rows, int blocks, float* y, float* total) {
  float* sum = shared_slice<float>(fault == Fault::misaligned_slice ? 2 : 0, 1);
  const int64_t row = block_index();
  if (fault == Fault::early_exit_in_a_cluster && row >= rows) return;
  if (fault == Fault::removed_cluster_barrier) cluster_sync();
  if (warp_index() == 0) {
    float lanes[1] = {0.0f};
    for (int64_t i = lane_index(); row < rows && i < n; i += kWarp) lanes[0] += load_one(x + row * n + i);
    warp_sum(lanes);
    if (thread_index() == 0) *sum = lanes[0];
  }
  if (fault != Fault::removed_cluster_barrier && fault != Fault::peer_not_begun) cluster_sync();
  if (cluster_rank() == 0 && thread_index() == 0) {
    float all = 0.0f;
    for (int r = 0; r < blocks; ++r) {
      const float one = cluster_peer(sum, r)[fault == Fault::slice_overrun_of_a_peer];
      if (r < rows) store_one(y + r, one);
      all += one;
    }
    *total = all;
  }
  if (fault != Fault::peer_returned) cluster_sync();
}

template <Fault fault>
void run_in_a_cluster(const Case& test) {
  constexpr int kBlocks = 8;
  emulator::launch({kBlocks, kThreads, sizeof(float), kBlocks}, [&] {
    cluster_kernel<fault>(static_cast<const float*>(test.pointer("x")), test.integer("state"), test.integer("batch"),
                          kBlocks, static_cast<float*>(test.pointer("y")), static_cast<float*>(test.pointer("total")));
  });
  *static_cast<int32_t*>(test.pointer("done")) = static_cast<int32_t>(test.integer("batch"));
}

template <Fault fault>
void run_with(const Case& test) {
  if (fault >= Fault::none_in_a_cluster) return run_in_a_cluster<fault>(test);
  emulator::launch({test.integer("batch"), kThreads, 0}, [&] {
    specimen_kernel<fault>(static_cast<const float*>(test.pointer("x")), test.integer("state"),
                           static_cast<float*>(test.pointer("y")), static_cast<float*>(test.pointer("partial")),
                           static_cast<int32_t*>(test.pointer("done")), static_cast<float*>(test.pointer("total")));
  });
}

}  // namespace

void run_specimen(const Case& test) {
  switch (static_cast<Fault>(test.integer("fault"))) {
#define PYDEQ_FAULT(name) \
  case Fault::name:       \
    return run_with<Fault::name>(test);
    PYDEQ_FAULT(none)
    PYDEQ_FAULT(removed_barrier)
    PYDEQ_FAULT(lost_update)
    PYDEQ_FAULT(early_exit)
    PYDEQ_FAULT(divergent_warp)
    PYDEQ_FAULT(off_by_one_tail)
    PYDEQ_FAULT(uninitialized_shared)
    PYDEQ_FAULT(misaligned_pack)
    PYDEQ_FAULT(unwritten_output)
    PYDEQ_FAULT(missing_fence)
    PYDEQ_FAULT(slice_overrun)
    PYDEQ_FAULT(none_in_a_cluster)
    PYDEQ_FAULT(removed_cluster_barrier)
    PYDEQ_FAULT(peer_not_begun)
    PYDEQ_FAULT(peer_returned)
    PYDEQ_FAULT(early_exit_in_a_cluster)
    PYDEQ_FAULT(slice_overrun_of_a_peer)
    PYDEQ_FAULT(misaligned_slice)
#undef PYDEQ_FAULT
  }
}

}  // namespace pydeq
