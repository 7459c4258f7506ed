// Common parts of all launches of CUDA kernels: the tensors' device, its current stream, and errors with advice.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <string>

#include "pydeq_cuda_facts.h"
#include "shared/bind.h"

namespace pydeq {

// Makes a tensor's device the current one while it lives, and knows torch's current stream there.
class Launch {
 public:
  // `name` is the operation's, for errors.
  Launch(const char* operation, const Tensor& like, const char* name)
      : operation_(operation), device_(device_of(like, name)), guard_(device_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }
  int device() const { return device_; }

  // Raises if `status` is an error.
  void check(cudaError_t status) const {
    if (status != cudaSuccess) fail(status);
  }

  // Call it after each launch: it raises if the launch was refused. An earlier kernel's fault may also appear here.
  void check() const { check(cudaGetLastError()); }

 private:
  static int device_of(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.is_cuda(), name, " must be on the CUDA device of the other tensors, got ", describe(t),
                    " on another device");
    return t.get_device_index();
  }

  [[noreturn]] void fail(cudaError_t status) const {
    cudaGetLastError();
    std::string advice;
    if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction ||
        status == cudaErrorUnsupportedPtxVersion) {
      cudaDeviceProp properties{};
      cudaGetDeviceProperties(&properties, device_);
      const std::string capability = std::to_string(properties.major) + "." + std::to_string(properties.minor);
      advice = ". cuda:" + std::to_string(device_) + ", " + properties.name + ", has compute capability " + capability +
               ", and the CUDA kernels were compiled for " PYDEQ_CUDA_ARCHS
               ": compile them with TORCH_CUDA_ARCH_LIST=" +
               capability + (status == cudaErrorUnsupportedPtxVersion ? ", or update the NVIDIA driver" : "") +
               ", or run the plain-torch references with PYDEQ_KERNELS=off";
    }
    STD_TORCH_CHECK(false, operation_, " failed on cuda:", device_, ": ", cudaGetErrorName(status), ": ",
                    cudaGetErrorString(status), advice);
  }

  const char* operation_;
  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace pydeq
