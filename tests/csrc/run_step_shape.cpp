// How a step would be laid out: nothing runs. `shape` gets what the struct of the same name says.
#include "cuda/anderson_step.cuh"
#include "cuda/broyden_step.cuh"
#include "cuda/gmres_step.cuh"
#include "cuda/picard_step.cuh"
#include "run_step.h"

namespace pydeq {
namespace {

struct Described {
  int64_t valid, launches, cluster, blocks, threads, tiles, shared_bytes, scratch_bytes;
};

template <class Step>
void describe(const Case& test, const typename Step::Args& args) {
  const StepShape shape = step_shape<Step>(args, test.limits());
  *static_cast<Described*>(test.pointer("shape")) = {shape.valid,        shape.fused ? 1 : 2, shape.cluster,
                                                     shape.blocks,       shape.threads,       shape.tiles,
                                                     shape.shared_bytes, shape.scratch_bytes};
}

}  // namespace

void run_step_shape(const Case& test) {
  const StepArgs step = test.step_args();
  const int64_t memory = test.integer("memory"), stored = test.integer("stored");
  const double damping = test.number("damping");
  switch (test.integer("method")) {
    case 0: {
      PicardStepArgs args{};
      args.step = step;
      args.damping = damping;
      PYDEQ_EMULATE(test.dtype(), T, describe<PicardStep<T>>(test, args));
      break;
    }
    case 1: {
      AndersonStepArgs args{};
      args.step = step;
      args.memory = memory;
      args.slots = memory < 2 ? 2 : memory;
      args.damping = damping;
      PYDEQ_EMULATE(test.dtype(), T, describe<AndersonStep<T>>(test, args));
      break;
    }
    case 2: {
      Listing<BroydenStepArgs> args{};
      args.step = step;
      args.memory = memory;
      args.stored = stored;
      PYDEQ_EMULATE(test.dtype(), T, describe<BroydenStep<T>>(test, args));
      break;
    }
    default: {
      Listing<GmresStepArgs> args{};
      args.step = step;
      args.restart = memory;
      args.stored = stored;
      PYDEQ_EMULATE(test.dtype(), T, describe<GmresStep<T>>(test, args));
    }
  }
}

}  // namespace pydeq
