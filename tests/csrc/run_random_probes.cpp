#include "cuda/random_probes.cuh"
#include "run_step.h"

namespace pydeq {

void run_random_probes(const Case& test) {
  const RandomProbesArgs args{test.integer("probes"),
                              test.integer("batch"),
                              test.integer("state"),
                              test.dtype(),
                              0,
                              static_cast<int>(test.integer("distribution")),
                              test.pointer("out"),
                              {nullptr, 1}};
  const RandomProbesShape shape = random_probes_shape(args, test.limits());
  const int64_t* seed_at = static_cast<const int64_t*>(test.pointer("key"));
  PYDEQ_EMULATE(args.dtype, T, emulator::launch({shape.blocks, shape.threads, 0}, [&] {
                  random_probes_kernel<T>(args, shape, seed_at);
                }));
}

}  // namespace pydeq
