#include "cuda/squared_norm.cuh"
#include "run_step.h"

namespace pydeq {

void run_squared_norm(const Case& test) {
  const SquaredNormArgs args{test.integer("probes"), test.integer("batch"), test.integer("state"), test.dtype(),
                             test.pointer("x"),      test.pointer("y"),     {nullptr, 1}};
  const SquaredNormShape shape = squared_norm_shape(args, test.limits());
  const Buffer scratch(shape.scratch_bytes, 0);
  for (int64_t i = 0; i < shape.scratch_bytes; ++i) scratch.data()[i] = i < shape.partial_bytes ? 0xff : 0;
  PYDEQ_EMULATE(args.dtype, T, emulator::launch({shape.blocks, shape.threads, shape.shared_bytes}, [&] {
                  squared_norm_kernel<T>(args, shape, scratch.data());
                }));
  for (int64_t i = shape.partial_bytes; i < shape.scratch_bytes; ++i) {
    if (scratch.data()[i]) emulator::fail("squared_norm_kernel left its counters changed");
  }
}

}  // namespace pydeq
