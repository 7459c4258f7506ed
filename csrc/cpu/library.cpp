// The C functions of libpydeq_cpu.so, which pydeq/ops/libraries.py calls by ctypes, without the GIL: waiting for a
// device, choosing the instruction set, advising the operating system about memory, and describing the build. This file
// needs neither torch nor Python. The operations in csrc/cpu register themselves when the library is loaded.
#include <chrono>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu/isa.h"
#include "pydeq_cuda_facts.h"
#include "pydeq_interface.h"
#include "shared/await_report.h"
#include "shared/export.h"

#define PYDEQ_NAME(isa, ...) #isa " "
#define PYDEQ_SUPPORTED(isa, ...) pydeq::cpu_supports(pydeq::Isa::isa),

// The interface that this library and the Python package must agree on; see pydeq/ops/interface.py.
PYDEQ_EXPORT const char* pydeq_interface() { return PYDEQ_INTERFACE; }

// About the CUDA library that was built with this one: its version and architectures, empty if there is none; and the
// reason if there is none.
PYDEQ_EXPORT const char* pydeq_cuda_version() { return PYDEQ_CUDA_VERSION; }
PYDEQ_EXPORT const char* pydeq_cuda_archs() { return PYDEQ_CUDA_ARCHS; }
PYDEQ_EXPORT const char* pydeq_cuda_reason() { return PYDEQ_CUDA_REASON; }

// The compiled instruction sets, from the most basic to the best, a space after each.
PYDEQ_EXPORT const char* pydeq_instruction_sets() { return PYDEQ_FOR_EACH_ISA(PYDEQ_NAME, ); }

// Whether this CPU has the instruction set of that index.
PYDEQ_EXPORT bool pydeq_supports_instruction_set(int index) {
  const bool supported[] = {PYDEQ_FOR_EACH_ISA(PYDEQ_SUPPORTED, )};
  return supported[index];
}

// The index of the instruction set whose kernels run.
PYDEQ_EXPORT int pydeq_instruction_set() { return static_cast<int>(pydeq::active_isa()); }

// Selects another instruction set that this CPU has. Do not call it while an operation runs.
PYDEQ_EXPORT void pydeq_select_instruction_set(int index) { pydeq::select_isa(static_cast<pydeq::Isa>(index)); }

// Returns the number of running samples after `steps` steps, once it is reported; otherwise one of constants::ANSWER_*.
// `query` is a pydeq::StreamQuery; `idle` means that the device has nothing to do after these steps. Returns after
// `patience` at the latest, so that a caller can check for an interrupt.
PYDEQ_EXPORT int64_t pydeq_await_report(const int64_t* progress, int64_t steps, void* query, void* stream, int device,
                                        bool idle) {
  using pydeq::Report;
  constexpr std::chrono::milliseconds patience(20);
  const Report report =
      pydeq::await_report(progress, steps, reinterpret_cast<pydeq::StreamQuery>(query), stream, device, patience, idle);
  switch (report.kind) {
    case Report::reported:
      return report.value;
    case Report::pending:
      return pydeq::constants::ANSWER_PENDING;
    case Report::lost:
      return pydeq::constants::ANSWER_LOST;
    case Report::failed:
      break;
  }
  return pydeq::constants::ANSWER_FAILED - report.value;
}

PYDEQ_EXPORT bool pydeq_has_reported(const int64_t* progress, int64_t steps) {
  return pydeq::has_reported(progress, steps);
}

// Asks for memory for [address, address + bytes), a buffer that will be written soon. A new page of 4 KiB costs a fault
// when it is first written, 1 to 2 us on a virtual machine. A huge page replaces 512 pages. The edges that fill no huge
// page are requested at once. This is only advice, and an error does no harm.
PYDEQ_EXPORT void pydeq_advise_huge_pages(uintptr_t address, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096, huge = 2 << 20;
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (begin >= end) return;
  const auto ask = [](uintptr_t from, uintptr_t to, int advice) {
    if (from < to) madvise(reinterpret_cast<void*>(from), to - from, advice);
  };
  ask(begin, end, MADV_HUGEPAGE);
  constexpr int populate_write = 23;  // MADV_POPULATE_WRITE, Linux 5.14
  const uintptr_t first = (begin + huge - 1) / huge * huge, last = end / huge * huge;
  ask(begin, first < end ? first : end, populate_write);
  ask(last > first ? last : first, end, populate_write);
#else
  (void)address, (void)bytes;
#endif
}
