// Whole solves of a map that was compiled ahead of time: the loop of pydeq/solve/iteration.py without Python between the
// evaluations. Called by ctypes; pydeq/ops/compiled_loop.py has the same structures.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstring>
#include <vector>

#include "cpu/isa.h"
#include "shared/anderson_step.h"
#include "shared/broyden_step.h"
#include "shared/export.h"
#include "shared/picard_step.h"
#include "shared/stable.h"

PYDEQ_DECLARE_KERNEL(picard_step, PicardStepArgs)
PYDEQ_DECLARE_KERNEL(anderson_step, AndersonStepArgs)
PYDEQ_DECLARE_KERNEL(broyden_step, BroydenStepArgs)

namespace pydeq {
namespace {

// AOTInductorModelContainerRunSingleThreaded of the compiled map. It takes over the handles of its inputs, and gives
// those of its outputs; 0 for success.
using RunModel = int32_t (*)(void* model, AtenTensorHandle* inputs, size_t input_count, AtenTensorHandle* outputs,
                             size_t output_count, void* stream, void* proxy_executor);

// An input of the map, a tensor on the CPU.
struct Input {
  int64_t dims;
  const int64_t* sizes;
  const int64_t* strides;
  int64_t dtype;  // torch's number
};

class Views;

// A solve, whatever the solver. The buffers are those of pydeq/solvers/base.py.
struct Loop {
  int64_t bytes;  // sizeof(Loop)
  RunModel run;
  void* model;
  const Input* inputs;  // the first one is z0, [B, D]
  void* const* data;    // of the inputs
  int64_t count;
  Views* views;                  // kept from solve to solve; null before the first one
  int64_t batch, state, single;  // B, D, and whether states are float, not double
  void *z, *other;               // [B, D] each
  void* best;                    // [2, B, D]
  void *value, *image;           // out: what best has in the end, [B, D] each
  double* scalars;               // [B, SCALAR_SIZE]
  int32_t* counters;             // [B, COUNTER_SIZE]
  double rtol, atol, eps;
  int64_t stall, max_steps;
  double damping;  // of a plain step
  int64_t woken;   // out: samples that other samples moved after they were done

  int64_t item() const { return single ? sizeof(float) : sizeof(double); }
};

// A tensor's handle, deleted at the end.
struct Handle {
  AtenTensorHandle handle = nullptr;

  Handle() = default;
  Handle(const Handle&) = delete;
  Handle(Handle&& other) noexcept : handle(other.handle) { other.handle = nullptr; }
  ~Handle() { reset(); }

  void reset() {
    if (handle) aoti_torch_delete_tensor_object(handle);
    handle = nullptr;
  }

  bool view(const Input& input, void* data) {
    return aoti_torch_create_tensor_from_blob(data, input.dims, input.sizes, input.strides, 0,
                                              static_cast<int32_t>(input.dtype), aoti_torch_device_type_cpu(), 0,
                                              &handle) == 0;
  }
};

// The inputs of the map as tensors, without their memory: z, the other inputs, and z's other buffer. Most of them are
// where they were in the solve before.
class Views {
 public:
  explicit Views(int64_t count) : handles_(count + 1), data_(count + 1) {}

  // Whether all are tensors now.
  bool update(const Loop& loop) {
    bool ok = view(0, loop.inputs[0], loop.z) && view(loop.count, loop.inputs[0], loop.other);
    for (int64_t i = 1; i < loop.count; ++i) ok = ok && view(i, loop.inputs[i], loop.data[i]);
    return ok;
  }

  AtenTensorHandle operator[](int64_t i) const { return handles_[i].handle; }

 private:
  bool view(int64_t i, const Input& input, void* data) {
    Handle& handle = handles_[i];
    if (handle.handle && data_[i] == data) return true;
    handle.reset();
    data_[i] = data;
    return handle.view(input, data);
  }

  std::vector<Handle> handles_;
  std::vector<void*> data_;
};

// The images of a compiled map.
class Map {
 public:
  explicit Map(Loop& loop) : loop_(loop), given_(loop.count) {
    if (!loop.views) loop.views = new Views(loop.count);
    ok_ = loop.views->update(loop);
  }

  // The image of the iterate of step k, valid until the next call; null if the map fails.
  const void* at(int64_t k) {
    image_.reset();
    for (int64_t i = 0; ok_ && i < loop_.count; ++i) {
      const AtenTensorHandle from = (*loop_.views)[i == 0 && k % 2 == 1 ? loop_.count : i];
      ok_ = aoti_torch_new_tensor_handle(from, &given_[i]) == 0;
      if (!ok_) {
        while (i-- > 0) aoti_torch_delete_tensor_object(given_[i]);
      }
    }
    void* data = nullptr;
    ok_ = ok_ && loop_.run(loop_.model, given_.data(), loop_.count, &image_.handle, 1, nullptr, nullptr) == 0 &&
          aoti_torch_get_data_ptr(image_.handle, &data) == 0;
    if (!ok_) return nullptr;
    return data ? data : this;  // an empty tensor has no memory
  }

 private:
  const Loop& loop_;
  std::vector<AtenTensorHandle> given_;
  Handle image_;
  bool ok_;
};

// One solve. `take` runs the solver's step with the shared arguments that it gets.
template <class Take>
class Solve {
 public:
  Solve(Loop& loop, Take take) : loop_(loop), take_(take), parallel_(torch_parallel()), map_(loop) {}

  // Returns the number of evaluations, or -1 if the map failed.
  int64_t run() {
    using namespace constants;
    const int64_t batch = loop_.batch;
    std::memcpy(loop_.z, loop_.data[0], batch * loop_.state * loop_.item());
    std::memset(loop_.scalars, 0, batch * SCALAR_SIZE * sizeof(double));
    std::memset(loop_.counters, 0, batch * COUNTER_SIZE * sizeof(int32_t));
    progress_[PROGRESS_RUNNING] = batch;
    bool staggered = false, looked = false;
    const void* f = nullptr;
    int64_t k = 0;
    for (; k < loop_.max_steps; ++k) {
      staggered |= 0 < running() && running() < batch;
      if (running() == 0) {
        if (!f || looked || !staggered) break;
        looked = true;
        look_back(f, k, false);
        if (running() == 0) break;
        loop_.woken += running();
        unfreeze(k);
      }
      f = map_.at(k);
      if (!f) return -1;
      take_(step(f, k, k + 1 == loop_.max_steps), k);
    }
    if (k == loop_.max_steps && f && staggered && !looked) {
      look_back(f, k, true);
      for (int64_t b = 0; b < batch; ++b) {
        loop_.woken += counter(b, COUNTER_STATUS) == STATUS_MAX_STEPS && counter(b, COUNTER_EVALUATIONS) < k;
      }
    }
    return k;
  }

 private:
  int64_t running() const { return progress_[constants::PROGRESS_RUNNING]; }
  int32_t& counter(int64_t b, int column) const { return loop_.counters[b * constants::COUNTER_SIZE + column]; }

  StepArgs step(const void* f, int64_t k, bool last) {
    void *z = k % 2 ? loop_.other : loop_.z, *next = k % 2 ? loop_.z : loop_.other;
    const Rules rules{loop_.rtol, loop_.atol, loop_.eps, freeze_, loop_.stall != 0, last, 0};
    return {loop_.batch,
            loop_.state,
            loop_.single ? Dtype::float32 : Dtype::float64,
            z,
            f,
            next,
            loop_.best,
            loop_.scalars,
            loop_.counters,
            progress_,
            k,
            rules,
            parallel_};
  }

  // Checks the samples that were done before evaluation k by their images in it.
  void look_back(const void* f, int64_t k, bool last) {
    PicardStepArgs args{step(f, k - 1, last), loop_.damping};
    args.step.step = k;
    args.step.rules.look_back = k;
    PYDEQ_CALL_KERNEL(picard_step, args);
  }

  // After k evaluations, iterates all samples that are not lost, each from its value.
  void unfreeze(int64_t k) {
    using namespace constants;
    freeze_ = false;
    for (int64_t b = 0; b < loop_.batch; ++b) {
      const int32_t status = counter(b, COUNTER_STATUS);
      if (status == RUNNING || status == STATUS_CONVERGED || status == STATUS_STALLED) {
        counter(b, COUNTER_EVALUATIONS) = static_cast<int32_t>(k);
      }
      if (status == STATUS_STALLED) counter(b, COUNTER_COUNT) = 0;  // its history does not end at the value
    }
  }

  Loop& loop_;
  Take take_;
  const Parallel parallel_;
  Map map_;
  int64_t progress_[constants::PROGRESS_SIZE] = {};
  bool freeze_ = true;
};

template <class Take>
int64_t solve(Loop* loop, Take take) {
  if (loop->bytes != sizeof(Loop)) return -2;
  loop->woken = 0;
  try {
    const int64_t evaluations = Solve<Take>(*loop, take).run(), bytes = loop->batch * loop->state * loop->item();
    std::memcpy(loop->value, loop->best, bytes);
    std::memcpy(loop->image, static_cast<const char*>(loop->best) + bytes, bytes);
    return evaluations;
  } catch (...) {  // no exception may reach ctypes
    return -1;
  }
}

}  // namespace
}  // namespace pydeq

// Frees what a Loop keeps from solve to solve.
PYDEQ_EXPORT void pydeq_forget_views(pydeq::Views* views) { delete views; }

// Each returns the number of evaluations, -1 if the map failed, or -2 if Loop is another one than here.

PYDEQ_EXPORT int64_t pydeq_solve_picard(pydeq::Loop* loop) {
  return pydeq::solve(loop, [loop](const pydeq::StepArgs& step, int64_t) {
    const pydeq::PicardStepArgs args{step, loop->damping};
    PYDEQ_CALL_KERNEL(picard_step, args);
  });
}

// residuals, values: [B, slots, D]; gram: [B, slots, slots].
PYDEQ_EXPORT int64_t pydeq_solve_anderson(pydeq::Loop* loop, void* residuals, void* values, double* gram, int64_t slots,
                                          int64_t memory, double ridge) {
  std::memset(gram, 0, loop->batch * slots * slots * sizeof(double));
  return pydeq::solve(loop, [=](const pydeq::StepArgs& step, int64_t) {
    const pydeq::AndersonStepArgs args{step, residuals, values, gram, slots, memory, loop->damping, ridge};
    PYDEQ_CALL_KERNEL(anderson_step, args);
  });
}

// steps: [capacity, B, D]; restart: [B, D], or null where no restart can come; gram: [B, capacity, capacity]; thetas:
// [B, capacity].
PYDEQ_EXPORT int64_t pydeq_solve_broyden(pydeq::Loop* loop, void* steps, void* restart, double* gram, double* thetas,
                                         int64_t capacity, int64_t memory) {
  const int64_t batch = loop->batch, row = batch * loop->state * loop->item();
  std::vector<void*> rows(capacity);
  for (int64_t i = 0; i < capacity; ++i) rows[i] = static_cast<char*>(steps) + i * row;
  return pydeq::solve(loop, [&](const pydeq::StepArgs& step, int64_t k) {
    const int64_t stored = k < capacity ? k + 1 : capacity;
    // Row k is first written in this step. Zeroed one by one, rows that no step reaches take no memory.
    for (int64_t b = 0; k < capacity && b < batch; ++b) {
      std::memset(gram + (b * capacity + k) * capacity, 0, stored * sizeof(double));
      thetas[b * capacity + k] = 0.0;
    }
    const pydeq::BroydenStepArgs args{step, nullptr, rows.data(), stored, k < memory ? nullptr : restart,
                                      gram, thetas,  capacity,    memory};
    PYDEQ_CALL_KERNEL(broyden_step, args);
  });
}
