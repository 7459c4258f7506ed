// The Python module pydeq._C: facts of this build, the choice of instruction set, advice to the kernel about memory,
// and the wait for a device. No torch header: the operations in csrc/ops register themselves with torch when this
// library is loaded.
#include <pybind11/pybind11.h>

#include <chrono>
#include <cstdint>
#include <limits>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "common/await_report.h"
#include "common/isa.h"
#include "pydeq_cuda_facts.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* compiler = "Clang " __clang_version__;
#else
constexpr const char* compiler = "GCC " __VERSION__;
#endif

py::tuple instruction_sets(bool supported_only) {
  py::list names;
#define PYDEQ_APPEND(isa, ...) \
  if (!supported_only || pydeq::cpu_supports(pydeq::Isa::isa)) names.append(#isa);
  PYDEQ_FOR_EACH_ISA(PYDEQ_APPEND, )
#undef PYDEQ_APPEND
  return py::tuple(names);
}

// Asks for memory behind [address, address + bytes), of a buffer about to be written. A fresh page of 4 KiB costs a
// fault when it is first written, 1 to 2 us each on a virtual machine; a huge page replaces 512 of them, and the edges
// that fill none are asked for at once. Only advice: nothing can fail.
void advise_huge_pages(uintptr_t address, size_t bytes) {
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

// Samples that run after `steps` steps, once that is reported; lost_report where it never will be, and -1 - code for an
// error of the stream. Other threads run meanwhile, and an interrupt ends the wait.
constexpr int64_t lost_report = std::numeric_limits<int64_t>::min();

int64_t await_report(uintptr_t progress, int64_t steps, uintptr_t query, uintptr_t stream, int device) {
  constexpr std::chrono::milliseconds patience(20);
  const int64_t* address = reinterpret_cast<const int64_t*>(progress);
  for (;;) {
    pydeq::Report report;
    {
      const py::gil_scoped_release released;
      report = pydeq::await_report(address, steps, reinterpret_cast<pydeq::StreamQuery>(query),
                                   reinterpret_cast<void*>(stream), device, patience);
    }
    switch (report.kind) {
      case pydeq::Report::reported:
        return report.value;
      case pydeq::Report::lost:
        return lost_report;
      case pydeq::Report::failed:
        return -1 - report.value;
      case pydeq::Report::pending:
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
  }
}

bool has_reported(uintptr_t progress, int64_t steps) {
  return pydeq::has_reported(reinterpret_cast<const int64_t*>(progress), steps);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled CPU kernels of pydeq.";
  module.attr("abi_target") = PYDEQ_ABI_TARGET;
  module.attr("torch_built") = PYDEQ_TORCH_VERSION;
  module.attr("compiler") = compiler;
  module.attr("cuda_version") = PYDEQ_CUDA_VERSION;
  module.attr("cuda_archs") = PYDEQ_CUDA_ARCHS;
  module.attr("cuda_reason") = PYDEQ_CUDA_REASON;
  module.attr("instruction_sets") = instruction_sets(false);
  module.attr("supported_instruction_sets") = instruction_sets(true);
  module.def("instruction_set", [] { return pydeq::isa_name(pydeq::active_isa()); });
  module.def("select_instruction_set", &pydeq::select_isa, py::arg("name"));
  module.attr("lost_report") = lost_report;
  module.def("await_report", &await_report, py::arg("progress"), py::arg("steps"), py::arg("query"), py::arg("stream"),
             py::arg("device"));
  module.def("has_reported", &has_reported, py::arg("progress"), py::arg("steps"));
  module.def("advise_huge_pages", &advise_huge_pages, py::arg("address"), py::arg("bytes"));
}
