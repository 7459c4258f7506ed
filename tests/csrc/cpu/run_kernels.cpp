// The kernels of csrc/cpu, for the instruction set that is active, in place of the emulator's: linked with run_cases.cpp.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "cpu/isa.h"
#include "emulator/emulator.h"
#include "run_case.h"
#include "shared/anderson_step.h"
#include "shared/broyden_step.h"
#include "shared/gmres_step.h"
#include "shared/picard_step.h"
#include "shared/random_probes.h"
#include "shared/squared_norm.h"

PYDEQ_DECLARE_KERNEL(squared_norm, SquaredNormArgs)
PYDEQ_DECLARE_KERNEL(random_probes, RandomProbesArgs)
PYDEQ_DECLARE_KERNEL(picard_step, PicardStepArgs)
PYDEQ_DECLARE_KERNEL(anderson_step, AndersonStepArgs)
PYDEQ_DECLARE_KERNEL(broyden_step, BroydenStepArgs)
PYDEQ_DECLARE_KERNEL(gmres_step, GmresStepArgs)

namespace pydeq {

// All that run_cases.cpp takes from the emulator.
namespace emulator {

Traffic traffic;
Launches launches;

void seed(uint64_t) {}

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::exit(1);
}

}  // namespace emulator

namespace {

// Ranges of one piece of work each, the last one first: no result may depend on that.
const Parallel backwards{[](int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
                           for (int64_t i = count; i-- > 0;) body(context, i, i + 1);
                         },
                         2};

StepArgs step_args(const Case& test) {
  StepArgs args = test.step_args();
  args.parallel = backwards;
  return args;
}

double* doubles(const Case& test, const char* key) { return static_cast<double*>(test.pointer(key)); }

std::vector<void*> rows(const Case& test, const std::string& key) {
  std::vector<void*> found;
  for (int64_t j = 0; j < test.integer("stored"); ++j) found.push_back(test.pointer(key + std::to_string(j)));
  return found;
}

}  // namespace

void run_squared_norm(const Case& test) {
  const SquaredNormArgs args{test.integer("probes"),
                             test.integer("batch"),
                             test.integer("state"),
                             test.dtype(),
                             test.pointer("x"),
                             test.pointer("y"),
                             backwards};
  PYDEQ_CALL_KERNEL(squared_norm, args);
}

void run_random_probes(const Case& test) {
  const RandomProbesArgs args{test.integer("probes"),
                              test.integer("batch"),
                              test.integer("state"),
                              test.dtype(),
                              static_cast<uint64_t>(*static_cast<const int64_t*>(test.pointer("key"))),
                              static_cast<int>(test.integer("distribution")),
                              test.pointer("out"),
                              backwards};
  PYDEQ_CALL_KERNEL(random_probes, args);
}

void run_picard_step(const Case& test) {
  const PicardStepArgs args{step_args(test), test.number("damping")};
  PYDEQ_CALL_KERNEL(picard_step, args);
}

void run_anderson_step(const Case& test) {
  const AndersonStepArgs args{step_args(test),        test.pointer("residuals"), test.pointer("values"),
                              doubles(test, "gram"),  test.integer("slots"),     test.integer("memory"),
                              test.number("damping"), test.number("ridge")};
  PYDEQ_CALL_KERNEL(anderson_step, args);
}

void run_broyden_step(const Case& test) {
  const std::vector<void*> steps = rows(test, "steps");
  const BroydenStepArgs args{step_args(test),         test.pointer("iterate"),  steps.data(),
                             test.integer("stored"),  test.pointer("restart"),  doubles(test, "gram"),
                             doubles(test, "thetas"), test.integer("capacity"), test.integer("memory")};
  PYDEQ_CALL_KERNEL(broyden_step, args);
}

void run_gmres_step(const Case& test) {
  const std::vector<void*> basis = rows(test, "basis");
  const GmresStepArgs args{step_args(test),
                           test.pointer("iterate"),
                           test.pointer("start"),
                           basis.data(),
                           test.integer("stored"),
                           doubles(test, "gram"),
                           doubles(test, "images"),
                           doubles(test, "directions"),
                           doubles(test, "coordinates"),
                           doubles(test, "lengths"),
                           test.integer("capacity"),
                           test.integer("restart"),
                           test.integer("penultimate") != 0};
  PYDEQ_CALL_KERNEL(gmres_step, args);
}

void run_step_shape(const Case&) { emulator::fail("step_shape is for the emulator"); }
void run_specimen(const Case&) { emulator::fail("specimen is for the emulator"); }

}  // namespace pydeq
