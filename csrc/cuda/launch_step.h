// Launching a step: the layout from cuda/step_shape.h, scratch from torch, one or two kernels of cuda/step.cuh. A
// single kernel runs in clusters if the GPU has them.
#pragma once

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

#include "cuda/cuda_path.h"
#include "cuda/kept_scratch.h"
#include "cuda/launch.h"
#include "cuda/pinned_blocks.h"
#include "cuda/step.cuh"
#include "cuda/step_shape.h"

namespace pydeq {

// Blocks that a cluster can have on every GPU that has clusters.
constexpr int kPortableCluster = 8;

// The configuration of a launch in clusters of `cluster` blocks; it points to `attribute`.
inline cudaLaunchConfig_t in_clusters(int cluster, dim3 grid, dim3 block, int64_t shared_bytes, cudaStream_t stream,
                                      cudaLaunchAttribute& attribute) {
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return config;
}

// Blocks of the largest cluster in which `kernel` can run with all of a block's shared memory; 1 if there is none.
template <class Kernel>
int measure_clusters(const Launch& launch, Kernel* kernel, int64_t shared_bytes) {
  int supported = 0;
  launch.check(cudaDeviceGetAttribute(&supported, cudaDevAttrClusterLaunch, launch.device()));
  if (!supported) return 1;
  // A GPU with clusters may run code that was compiled for GPUs without them. There each cluster is one block.
  cudaFuncAttributes attributes{};
  launch.check(cudaFuncGetAttributes(&attributes, kernel));
  if (attributes.ptxVersion < 90) return 1;
  for (int cluster = kPortableCluster; cluster > 1; cluster /= 2) {
    cudaLaunchAttribute attribute{};
    const cudaLaunchConfig_t config =
        in_clusters(cluster, dim3(static_cast<unsigned>(cluster)), dim3(kMaxThreads), shared_bytes, nullptr, attribute);
    int active = 0;
    if (cudaOccupancyMaxActiveClusters(&active, kernel, &config) == cudaSuccess && active > 0) return cluster;
    cudaGetLastError();
  }
  return 1;
}

// A device's answer to a query, asked once and then kept.
class OncePerDevice {
 public:
  // `ask` must not answer 0.
  template <class Ask>
  int operator()(int device, const Ask& ask) {
    if (device >= kDevices) return ask();
    int answer = known_[device].load(std::memory_order_acquire);
    if (!answer) known_[device].store(answer = ask(), std::memory_order_release);
    return answer;
  }

 private:
  static constexpr int kDevices = 64;
  std::atomic<int> known_[kDevices]{};
};

// An attribute of a device; asked once.
template <cudaDeviceAttr attribute>
int device_attribute(const Launch& launch) {
  static OncePerDevice known;
  return known(launch.device(), [&] {
    int value = 0;
    launch.check(cudaDeviceGetAttribute(&value, attribute, launch.device()));
    return value;
  });
}

// The limits of this device, and the forced path. The other limits keep their defaults, since sums depend on them.
inline StepLimits step_limits(const Launch& launch) {
  StepLimits limits;
  limits.shared_bytes = device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(launch);
  limits.multiprocessors = device_attribute<cudaDevAttrMultiProcessorCount>(launch);
  limits.path = cuda_path().load(std::memory_order_relaxed);
  return limits;
}

// Allows a kernel to use all of a block's shared memory.
template <auto kernel>
void allow_shared_memory(const Launch& launch, int64_t bytes) {
  static OncePerDevice allowed;
  allowed(launch.device(), [&] {
    launch.check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
    return 1;
  });
}

// Blocks of the largest cluster that a kernel can be launched in; 1 without clusters.
template <auto kernel>
int largest_cluster(const Launch& launch, int64_t shared_bytes) {
  static OncePerDevice largest;
  return largest(launch.device(), [&] { return measure_clusters(launch, kernel, shared_bytes); });
}

// The memory that kernels report to. A device can write to pinned memory while the host continues. Memory from the pool
// of reports is pinned and has the same address on every device (CUDA C++ Programming Guide, unified virtual
// addressing), so the driver need not be asked. For other memory, which no solve passes, the step waits and copies.
class ReportPlace {
 public:
  ReportPlace(const Launch& launch, const Tensor& like, int64_t* host) : launch_(launch), host_(host), address_(host) {
    if (pinned_blocks().hold(host, sizeof(int64_t) * constants::PROGRESS_SIZE)) return;
    cudaPointerAttributes attributes{};
    launch.check(cudaPointerGetAttributes(&attributes, host));
    if (attributes.type != cudaMemoryTypeHost || !attributes.devicePointer) {
      copy_ = torch::stable::new_empty(like, {constants::PROGRESS_SIZE}, ScalarType::Long);
      address_ = static_cast<int64_t*>(copy_.data_ptr());
      pinned_ = false;
    } else {
      address_ = static_cast<int64_t*>(attributes.devicePointer);
    }
  }

  int64_t* address() const { return address_; }

  // After the last launch.
  void close() const {
    if (pinned_) return;
    launch_.check(cudaMemcpyAsync(host_, address_, sizeof(int64_t) * constants::PROGRESS_SIZE, cudaMemcpyDefault,
                                  launch_.stream()));
    launch_.check(cudaStreamSynchronize(launch_.stream()));
  }

 private:
  const Launch& launch_;
  int64_t* host_;
  int64_t* address_;
  Tensor copy_;
  bool pinned_ = true;
};

// Device memory for the kernels of one operation, uninitialized. It is kept for the next one, so that only the first
// split step of a thread allocates. Safe, since an operation leaves nothing there that a later one reads:
//   streams   memory is reused only on the stream that it was allocated for, where kernels run one after the other; a
//             stream is known by its id, which no later stream gets, not by its handle
//   threads   each has its own, so that no other thread's kernel comes between the two launches of a step
//   graphs    a captured step has its own memory, from the graph's pool: its replay may run at any time
//   the end   torch's allocator gets it back when the thread ends, like any tensor
class Scratch {
 public:
  Scratch(const Launch& launch, const Tensor& like, int64_t bytes) {
    if (bytes == 0) return;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long stream = 0;
    launch.check(cudaStreamIsCapturing(launch.stream(), &status));
    if (status != cudaStreamCaptureStatusNone) {
      captured_ = allocate(like, bytes);
      bytes_ = static_cast<unsigned char*>(captured_.data_ptr());
      return;
    }
    launch.check(cudaStreamGetId(launch.stream(), &stream));
    static thread_local KeptScratch<Tensor> kept;
    Tensor& memory = kept.take({launch.device(), stream}, bytes, [&](int64_t size) { return allocate(like, size); });
    bytes_ = static_cast<unsigned char*>(memory.data_ptr());
  }
  unsigned char* bytes() const { return bytes_; }

 private:
  static Tensor allocate(const Tensor& like, int64_t bytes) {
    return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  }

  Tensor captured_;
  unsigned char* bytes_ = nullptr;
};

// The arguments of a step's kernels: with the list of vectors, if there is one.
template <class Step, class Args>
typename Step::Args with_list(const Args& args, [[maybe_unused]] const std::vector<void*>& addresses) {
  if constexpr (std::is_same_v<typename Step::Args, Args>) {
    return args;
  } else {
    Listing<Args> all{args, {}};
    std::copy(addresses.begin(), addresses.end(), all.rows);
    return all;
  }
}

// `args` has the host's address in step.progress; `like` is any of its tensors.
template <class Step>
void launch_step(const Launch& launch, const Tensor& like, typename Step::Args args) {
  StepArgs& common = args.step;
  if (common.batch == 0) {
    common.progress[constants::PROGRESS_RUNNING] = common.progress[constants::PROGRESS_FAR] = 0;
    common.progress[constants::PROGRESS_STEP] = common.step + 1;
    return;
  }
  const ReportPlace place(launch, like, common.progress);
  common.progress = place.address();
  StepLimits limits = step_limits(launch);
  allow_shared_memory<step_fused_kernel<Step>>(launch, limits.shared_bytes);
  limits.cluster_blocks = largest_cluster<step_fused_kernel<Step>>(launch, limits.shared_bytes);
  const StepShape shape = step_shape<Step>(args, limits);
  STD_TORCH_CHECK(shape.valid,
                  "the history of a step is too long for a GPU's shared memory: lower the solver's memory");
  const Scratch scratch(launch, like, shape.scratch_bytes);
  const dim3 grid(static_cast<unsigned>(shape.blocks)), block(static_cast<unsigned>(shape.threads));
  if (shape.fused && shape.cluster > 1) {
    cudaLaunchAttribute attribute{};
    const cudaLaunchConfig_t config =
        in_clusters(shape.cluster, grid, block, shape.shared_bytes, launch.stream(), attribute);
    launch.check(cudaLaunchKernelEx(&config, step_fused_kernel<Step>, args, shape, scratch.bytes()));
  } else if (shape.fused) {
    step_fused_kernel<Step><<<grid, block, shape.shared_bytes, launch.stream()>>>(args, shape, scratch.bytes());
    launch.check();
  } else {
    allow_shared_memory<step_reduce_kernel<Step>>(launch, limits.shared_bytes);
    step_reduce_kernel<Step><<<grid, block, shape.reduce_shared_bytes, launch.stream()>>>(args, shape, scratch.bytes());
    launch.check();
    allow_shared_memory<step_apply_kernel<Step>>(launch, limits.shared_bytes);
    step_apply_kernel<Step><<<grid, block, shape.shared_bytes, launch.stream()>>>(args, shape, scratch.bytes());
    launch.check();
  }
  place.close();
}

}  // namespace pydeq
