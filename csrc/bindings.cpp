// The Python module pydeq._C: facts of this build, and the choice of instruction set. No torch header: the operations
// in csrc/ops register themselves with torch when this library is loaded.
#include <pybind11/pybind11.h>

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
}
