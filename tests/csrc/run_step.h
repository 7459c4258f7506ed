// Launching a step in the emulator, as csrc/cuda/launch_step.h does on a GPU.
#pragma once

#include "cuda/step.cuh"
#include "emulator/emulator.h"
#include "run_case.h"

// Races do not depend on the type: ThreadSanitizer sees one that is its own compute type and one that is not.
#if defined(PYDEQ_EMULATOR_TSAN)
#define PYDEQ_EMULATE(dtype, T, ...)                               \
  switch (dtype) {                                                 \
    case ::pydeq::Dtype::float32: {                                \
      using T = float;                                             \
      __VA_ARGS__;                                                 \
      break;                                                       \
    }                                                              \
    case ::pydeq::Dtype::bfloat16: {                               \
      using T = ::pydeq::BFloat16;                                 \
      __VA_ARGS__;                                                 \
      break;                                                       \
    }                                                              \
    default:                                                       \
      ::pydeq::emulator::fail("not compiled for ThreadSanitizer"); \
  }
#else
#define PYDEQ_EMULATE(dtype, T, ...) PYDEQ_DISPATCH(dtype, T, __VA_ARGS__)
#endif

namespace pydeq {

template <class Step>
void run_step(const Case& test, const typename Step::Args& args) {
  const StepShape shape = step_shape<Step>(args, test.limits());
  if (!shape.valid) emulator::fail("this step does not fit");
  const Buffer scratch(shape.scratch_bytes, 0);
  for (int64_t i = 0; i < shape.scratch_bytes; ++i) scratch.data()[i] = 0xff;
  if (shape.fused) {
    emulator::launch({shape.blocks, shape.threads, shape.shared_bytes, shape.cluster},
                     [&] { step_fused_kernel<Step>(args, shape, scratch.data()); });
  } else {
    emulator::launch({shape.blocks, shape.threads, shape.reduce_shared_bytes},
                     [&] { step_reduce_kernel<Step>(args, shape, scratch.data()); });
    emulator::launch({shape.blocks, shape.threads, shape.shared_bytes},
                     [&] { step_apply_kernel<Step>(args, shape, scratch.data()); });
  }
}

}  // namespace pydeq
