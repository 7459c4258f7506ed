// The only include of torch, and only of its stable ABI: the libraries run with TORCH_TARGET_VERSION and every later
// torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "shared/parallel.h"

namespace pydeq {

// torch's thread pool, as wide as torch.get_num_threads() says for the calling thread.
inline Parallel torch_parallel() {
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  if (threads == 1) {
    return {[](int64_t count, Body body, void* context) {
              if (count > 0) body(context, 0, count);
            },
            threads};
  }
  return {[](int64_t count, Body body, void* context) {
            // One element per range at least: the caller's elements are whole chunks of work.
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
          },
          threads};
}

}  // namespace pydeq
