// The Python module pydeq._C: how the libraries were built, for pydeq.kernels(). This is the only file with
// Python's C API.
#include <pybind11/pybind11.h>

namespace {

#if defined(__clang__)
constexpr const char* compiler = "Clang " __clang_version__;
#else
constexpr const char* compiler = "GCC " __VERSION__;
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "How pydeq's libraries were built.";
  module.attr("abi_target") = PYDEQ_ABI_TARGET;
  module.attr("torch_built") = PYDEQ_TORCH_VERSION;
  module.attr("compiler") = compiler;
}
