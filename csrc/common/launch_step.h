// Launching a step: the layout from common/step_shape.h, scratch from torch, one or two kernels of common/step.cuh.
#pragma once

#include "common/launch.h"
#include "common/step.cuh"
#include "common/step_shape.h"

namespace pydeq {

// What this device allows; the rest of the limits stays as it is, since sums depend on it.
inline StepLimits step_limits(const Launch& launch) {
  StepLimits limits;
  int shared = 0;
  launch.check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, launch.device()));
  limits.shared_bytes = shared;
  return limits;
}

// Where kernels report. A device can write to pinned memory while the host goes on. For other memory, which no solve
// hands over, the step waits, and copies.
class ReportPlace {
 public:
  ReportPlace(const Launch& launch, const Tensor& like, int64_t* host) : launch_(launch), host_(host) {
    cudaPointerAttributes attributes{};
    launch.check(cudaPointerGetAttributes(&attributes, host));
    if (attributes.type == cudaMemoryTypeUnregistered) {
      copy_ = torch::stable::new_empty(like, {protocol::PROGRESS_SIZE}, ScalarType::Long);
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
    launch_.check(cudaMemcpyAsync(host_, address_, sizeof(int64_t) * protocol::PROGRESS_SIZE, cudaMemcpyDefault,
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

// Device memory from torch's allocator for the kernels that are launched on its stream meanwhile; uninitialized.
class Scratch {
 public:
  Scratch(const Tensor& like, int64_t bytes) {
    if (bytes == 0) return;
    memory_ = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
    bytes_ = static_cast<unsigned char*>(memory_.data_ptr());
  }
  unsigned char* bytes() const { return bytes_; }

 private:
  Tensor memory_;
  unsigned char* bytes_ = nullptr;
};

template <class Kernel>
void allow_shared_memory(const Launch& launch, Kernel* kernel, int64_t bytes) {
  constexpr int64_t always = 48 << 10;
  if (bytes <= always) return;
  launch.check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

// `args` has the host's address in step.progress; `like` is any of its tensors.
template <class Step>
void launch_step(const Launch& launch, const Tensor& like, typename Step::Args args) {
  StepArgs& common = args.step;
  if (common.batch == 0) {
    common.progress[protocol::PROGRESS_RUNNING] = 0;
    common.progress[protocol::PROGRESS_STEP] = common.step + 1;
    return;
  }
  const ReportPlace place(launch, like, common.progress);
  common.progress = place.address();
  const StepShape shape = step_shape<Step>(args, step_limits(launch));
  STD_TORCH_CHECK(shape.valid,
                  "the history of a step is too long for a GPU's shared memory: lower the solver's memory");
  const Scratch scratch(like, shape.scratch_bytes);
  const dim3 grid(static_cast<unsigned>(shape.blocks)), block(static_cast<unsigned>(shape.threads));
  if (shape.fused) {
    allow_shared_memory(launch, step_fused_kernel<Step>, shape.shared_bytes);
    step_fused_kernel<Step><<<grid, block, shape.shared_bytes, launch.stream()>>>(args, shape, scratch.bytes());
    launch.check();
  } else {
    allow_shared_memory(launch, step_reduce_kernel<Step>, shape.reduce_shared_bytes);
    step_reduce_kernel<Step><<<grid, block, shape.reduce_shared_bytes, launch.stream()>>>(args, shape, scratch.bytes());
    launch.check();
    allow_shared_memory(launch, step_apply_kernel<Step>, shape.shared_bytes);
    step_apply_kernel<Step><<<grid, block, shape.shared_bytes, launch.stream()>>>(args, shape, scratch.bytes());
    launch.check();
  }
  place.close();
}

}  // namespace pydeq
