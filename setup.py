"""Has CMake compile the kernels; everything else stands in pyproject.toml.

Switches, from the environment:

    PYDEQ_WITH_KERNELS=0        install without compiled kernels; pydeq then runs its plain-torch references
    PYDEQ_REQUIRE_KERNELS=1     a missing compiler or build tool is an error, not an install without kernels
    PYDEQ_WERROR=1              compiler warnings are errors
    PYDEQ_SANITIZE=address,...  build with sanitizers
    PYDEQ_WITH_CUDA, TORCH_CUDA_ARCH_LIST, CUDACXX, CUDA_HOME   see csrc/cuda_toolkit.py
    CXX, CXXFLAGS, CMAKE_BUILD_PARALLEL_LEVEL   are CMake's own
"""

import importlib.metadata
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent

# A build without isolation is not checked against pyproject.toml, whose license field older ones cannot read.
NEEDED = re.search(r"setuptools>=(\d+)", (ROOT / "pyproject.toml").read_text())
if NEEDED and int(setuptools.__version__.split(".")[0]) < int(NEEDED[1]):
    raise SystemExit(f"pydeq needs {NEEDED[0]} to build, found {setuptools.__version__}: pip install -U setuptools")


def folder_of(package: str) -> Path | None:
    """Where an installed package lies, found without importing it."""
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def find_tool(name: str) -> str | None:
    """A build tool from its package in this environment, whether or not that is on PATH; else from PATH."""
    if folder_of(name):
        module = importlib.import_module(name)
        return str(Path(getattr(module, "CMAKE_BIN_DIR", None) or module.BIN_DIR) / name)
    return shutil.which(name)


def why_no_kernels() -> str:
    """What keeps the kernels from being compiled here; empty where nothing does."""
    if os.environ.get("PYDEQ_WITH_KERNELS") == "0":
        return "PYDEQ_WITH_KERNELS=0 was set when pydeq was installed"
    missing = [f"the package {name}" for name in ("torch", "pybind11") if not folder_of(name)]
    missing += [name for name in ("cmake", "ninja") if not find_tool(name)]
    compiler = os.environ.get("CXX", "").split()[:1]
    if not any(map(shutil.which, compiler or ("c++", "g++", "clang++"))):
        missing.append(f"a C++ compiler (CXX={compiler[0]})" if compiler else "a C++ compiler (such as g++)")
    return f"not found when pydeq was installed: {', '.join(missing)}" if missing else ""


REASON = why_no_kernels()
TOOLKIT = runpy.run_path(str(ROOT / "csrc" / "cuda_toolkit.py"))


def why_no_cuda() -> str:
    """What keeps the CUDA kernels from being compiled here; empty where nothing does."""
    try:
        TOOLKIT["choose"](os.environ, local=False)
    except TOOLKIT["CudaError"] as error:
        return str(error)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    return ""


CUDA_REASON = REASON or why_no_cuda()


class BuildPython(build_py):
    """Leaves in the package why it has no kernels, so that the warning at import can say so: pip hides this output."""

    def run(self):
        if REASON and os.environ.get("PYDEQ_REQUIRE_KERNELS") == "1":
            raise CompileError(f"PYDEQ_REQUIRE_KERNELS=1, but no kernels can be compiled: {REASON}")
        if CUDA_REASON and os.environ.get("PYDEQ_WITH_CUDA") == "1":
            raise CompileError(f"PYDEQ_WITH_CUDA=1, but no CUDA kernels can be compiled: {CUDA_REASON}")
        if not self.editable_mode:  # what an earlier build left there would be packed
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        package = ROOT / "pydeq" if self.editable_mode else Path(self.build_lib, "pydeq")
        reason_file = package / "no_kernels.txt"
        reason_file.unlink(missing_ok=True)
        for name, reason in (("_C", REASON), ("_C_cuda", CUDA_REASON)):
            if reason:  # what an earlier build left there would be loaded
                for library in package.glob(f"{name}.*.so"):
                    library.unlink()
        if REASON:
            reason_file.write_text(REASON + "\n")
            print(f"pydeq is installed without compiled kernels: {REASON}", file=sys.stderr)
        elif CUDA_REASON:
            print(f"pydeq is installed without CUDA kernels: {CUDA_REASON}", file=sys.stderr)


class BuildKernels(build_ext):
    """Has CMake build one library per extension, into pydeq/."""

    def run(self):
        # setuptools clears the first of these while it builds.
        self.local = bool(self.inplace or self.editable_mode)
        super().run()

    def build_extension(self, ext):
        library = Path(self.get_ext_fullpath(ext.name))
        target = ext.name.rpartition(".")[2]
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        cmake = str(find_tool("cmake"))
        toolkit, archs = (None, "") if CUDA_REASON else TOOLKIT["choose"](os.environ, self.local)
        options = {
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": f"{folder_of('pybind11')}/share/cmake/pybind11",
            "PYDEQ_TORCH_ROOT": folder_of("torch"),
            "PYDEQ_TORCH_VERSION": importlib.metadata.version("torch"),
            "PYDEQ_WERROR": os.environ.get("PYDEQ_WERROR", "0"),
            "PYDEQ_SANITIZE": os.environ.get("PYDEQ_SANITIZE", ""),
            "PYDEQ_CUDA_COMPILER": toolkit.nvcc if toolkit else "",
            "PYDEQ_CUDA_ARCHITECTURES": archs,
            "PYDEQ_CUDA_REASON": CUDA_REASON,
        }
        define = [f"-D{name}={value}" for name, value in options.items()]
        try:
            subprocess.run([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *define], check=True)
            subprocess.run([cmake, "--build", build, "--target", target], check=True)
        except subprocess.CalledProcessError as error:
            which, switch = ("CUDA", "PYDEQ_WITH_CUDA") if target == "_C_cuda" else ("CPU", "PYDEQ_WITH_KERNELS")
            raise CompileError(
                f"the {which} kernels did not compile; the messages are above. To install pydeq without them "
                f"(the same results, more slowly), set {switch}=0"
            ) from error
        library.parent.mkdir(parents=True, exist_ok=True)
        # A new file, not new bytes in the old one, which a running process may have mapped.
        library.unlink(missing_ok=True)
        shutil.copy2(build / library.name, library)


setup(
    ext_modules=[
        Extension(f"pydeq.{name}", sources=[])
        for name, reason in (("_C", REASON), ("_C_cuda", CUDA_REASON))
        if not reason
    ],
    cmdclass={"build_py": BuildPython, "build_ext": BuildKernels},
)
