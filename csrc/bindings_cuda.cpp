// The Python module pydeq._C_cuda: what the host needs to know of a device while a solve runs. No torch header: the
// operations in csrc/ops/*.cu register themselves with torch when this library is loaded.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/await_report.h"

namespace py = pybind11;

namespace {

// While it lives, what this thread calls is allowed although some thread captures a graph.
class Uncaptured {
 public:
  Uncaptured() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~Uncaptured() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Uncaptured(const Uncaptured&) = delete;
  Uncaptured& operator=(const Uncaptured&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

class OnDevice {
 public:
  explicit OnDevice(int device) {
    if (cudaGetDevice(&before_) == cudaSuccess && before_ != device) {
      cudaSetDevice(device);
    } else {
      before_ = -1;
    }
  }
  ~OnDevice() {
    if (before_ >= 0) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = -1;
};

// Whether a stream still works, without waiting for it: a pydeq::StreamQuery.
int query_stream(void* stream, int device) {
  const Uncaptured uncaptured;
  const OnDevice guard(device);
  const cudaError_t status = cudaStreamQuery(static_cast<cudaStream_t>(stream));
  if (status == cudaSuccess) return pydeq::kDone;
  cudaGetLastError();  // an answer, not an error that the next check should find
  if (status == cudaErrorNotReady) return pydeq::kWorking;
  // Another thread's capture can forbid the question; it says nothing of this stream.
  if (status == cudaErrorStreamCaptureUnsupported || status == cudaErrorStreamCaptureImplicit) return pydeq::kWorking;
  return status;
}

std::string describe_error(int code) {
  const cudaError_t error = static_cast<cudaError_t>(code);
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

// Host memory that every device can write to, for as long as the process lives.
uintptr_t allocate_pinned(size_t bytes) {
  const Uncaptured uncaptured;
  void* memory = nullptr;
  const cudaError_t status = cudaHostAlloc(&memory, bytes, cudaHostAllocPortable | cudaHostAllocMapped);
  if (status != cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error("no pinned memory for the progress of solves: " + describe_error(status));
  }
  return reinterpret_cast<uintptr_t>(memory);
}

}  // namespace

PYBIND11_MODULE(_C_cuda, module) {
  module.doc() = "Compiled CUDA kernels of pydeq.";
  module.attr("query_stream") = reinterpret_cast<uintptr_t>(&query_stream);
  module.def("describe_error", &describe_error, py::arg("code"));
  module.def("allocate_pinned", &allocate_pinned, py::arg("bytes"));
}
