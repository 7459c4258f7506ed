// The Python module pydeq._C: facts of this build, the choice of instruction set, and advice to the kernel about
// memory. No torch header: the operations in csrc/ops register themselves with torch when this library is loaded.
#include <pybind11/pybind11.h>

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "common/isa.h"

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

// Asks for huge pages behind [address, address + bytes). A fresh buffer costs a page fault for every page of 4 KiB that
// is first written, 1 to 2 us each on a virtual machine; a huge page replaces 512 of them. Only advice: nothing can
// fail.
void advise_huge_pages(uintptr_t address, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096;
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled CPU kernels of pydeq.";
  module.attr("abi_target") = PYDEQ_ABI_TARGET;
  module.attr("torch_built") = PYDEQ_TORCH_VERSION;
  module.attr("compiler") = compiler;
  module.attr("instruction_sets") = instruction_sets(false);
  module.attr("supported_instruction_sets") = instruction_sets(true);
  module.def("instruction_set", [] { return pydeq::isa_name(pydeq::active_isa()); });
  module.def("select_instruction_set", &pydeq::select_isa, py::arg("name"));
  module.def("advise_huge_pages", &advise_huge_pages, py::arg("address"), py::arg("bytes"));
}
