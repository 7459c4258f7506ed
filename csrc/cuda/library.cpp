// The C functions of libpydeq_cuda.so, which pydeq/ops/libraries.py calls by ctypes, without the GIL: queries about a
// device while a solve runs, and a description of the build. This file needs neither torch nor Python. The operations
// in csrc/cuda/*.cu register themselves with torch when the library loads.
#include <cuda_runtime.h>

#include <cstddef>
#include <string>

#include "cuda/cuda_path.h"
#include "cuda/pinned_blocks.h"
#include "pydeq_cuda_facts.h"
#include "pydeq_interface.h"
#include "shared/await_report.h"
#include "shared/export.h"

namespace {

// While it lives, this thread's calls are allowed even though some thread captures a graph.
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

}  // namespace

// As in the CPU library.
PYDEQ_EXPORT const char* pydeq_interface() { return PYDEQ_INTERFACE; }
PYDEQ_EXPORT const char* pydeq_cuda_version() { return PYDEQ_CUDA_VERSION; }
PYDEQ_EXPORT const char* pydeq_cuda_archs() { return PYDEQ_CUDA_ARCHS; }

// Whether a stream is still working; does not wait for it. A pydeq::StreamQuery.
PYDEQ_EXPORT int pydeq_query_stream(void* stream, int device) {
  const Uncaptured uncaptured;
  const OnDevice guard(device);
  const cudaError_t status = cudaStreamQuery(static_cast<cudaStream_t>(stream));
  if (status == cudaSuccess) return pydeq::kDone;
  cudaGetLastError();  // an answer, not an error that the next check should find
  if (status == cudaErrorNotReady) return pydeq::kWorking;
  // Another thread's capture can forbid the query; the error then says nothing about this stream.
  if (status == cudaErrorStreamCaptureUnsupported || status == cudaErrorStreamCaptureImplicit) return pydeq::kWorking;
  return status;
}

// Valid until this thread calls it again.
PYDEQ_EXPORT const char* pydeq_describe_error(int code) {
  thread_local std::string text;
  const cudaError_t error = static_cast<cudaError_t>(code);
  text = std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
  return text.c_str();
}

// Host memory that every device can write to, for as long as the process lives. Returns the error's code, 0 for none.
PYDEQ_EXPORT int pydeq_allocate_pinned(size_t bytes, void** memory) {
  const Uncaptured uncaptured;
  const cudaError_t status = cudaHostAlloc(memory, bytes, cudaHostAllocPortable | cudaHostAllocMapped);
  if (status == cudaSuccess) {
    pydeq::pinned_blocks().add(*memory, bytes);
  } else {
    cudaGetLastError();
  }
  return status;
}

// Uses this path for steps from now on: one of constants::CUDA_PATH_*.
PYDEQ_EXPORT void pydeq_select_cuda_path(int path) { pydeq::cuda_path().store(path); }
