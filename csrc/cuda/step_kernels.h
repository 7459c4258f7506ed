// The kernels of a step (cuda/step.cuh), with macros to instantiate them in separate translation units: they take long
// to compile, and do not need torch's headers.
#pragma once

#include "cuda/step.cuh"
#include "shared/dispatch.h"

// Instantiates the kernels of a Step in this translation unit; with `extern`, declares that another one does.
#define PYDEQ_STEP_KERNELS(linkage, ...)                                                                            \
  linkage template PYDEQ_KERNEL(kMaxThreads, __VA_ARGS__::kResident) step_fused_kernel<__VA_ARGS__>(                \
      PYDEQ_PARAMETER typename __VA_ARGS__::Args, PYDEQ_PARAMETER StepShape, unsigned char*);                       \
  linkage template PYDEQ_KERNEL(__VA_ARGS__::kTileThreads, __VA_ARGS__::kResident) step_reduce_kernel<__VA_ARGS__>( \
      PYDEQ_PARAMETER typename __VA_ARGS__::Args, PYDEQ_PARAMETER StepShape, unsigned char*);                       \
  linkage template PYDEQ_KERNEL(__VA_ARGS__::kTileThreads, __VA_ARGS__::kResident) step_apply_kernel<__VA_ARGS__>(  \
      PYDEQ_PARAMETER typename __VA_ARGS__::Args, PYDEQ_PARAMETER StepShape, unsigned char*);

// In the binding of a step, whose class template is given: its kernels are compiled elsewhere, one dtype at a time.
#define PYDEQ_KERNELS_APART(Step)           \
  PYDEQ_STEP_KERNELS(extern, Step<double>)  \
  PYDEQ_STEP_KERNELS(extern, Step<float>)   \
  PYDEQ_STEP_KERNELS(extern, Step<Float16>) \
  PYDEQ_STEP_KERNELS(extern, Step<BFloat16>)
