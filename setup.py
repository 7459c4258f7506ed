"""Compiles the kernels by CMake; everything else is in pyproject.toml.

Two libraries hold the kernels and serve every Python version; they are compiled again only if a source or an option has
changed. The module pydeq._C, for one Python version, takes seconds.

Switches, from the environment:

    PYDEQ_WITH_KERNELS=0        install without compiled kernels; pydeq then runs its plain-torch references
    PYDEQ_REQUIRE_KERNELS=1     a missing compiler or build tool is an error, not an install without kernels
    PYDEQ_WERROR=1              compiler warnings are errors
    PYDEQ_SANITIZE=address,...  build with sanitizers
    PYDEQ_MANYLINUX=1           link for manylinux_2_28, as `make wheels` does
    PYDEQ_WITH_CUDA, TORCH_CUDA_ARCH_LIST, CUDACXX, CUDA_HOME   see csrc/cuda_toolkit.py
    CXX, CXXFLAGS, CMAKE_BUILD_PARALLEL_LEVEL   are CMake's own
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
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

# A build without isolation does not check pyproject.toml's requirements, and older setuptools cannot read its license
# field.
NEEDED = re.search(r"setuptools>=(\d+)", (ROOT / "pyproject.toml").read_text())
if NEEDED and int(setuptools.__version__.split(".")[0]) < int(NEEDED[1]):
    raise SystemExit(f"pydeq needs {NEEDED[0]} to build, found {setuptools.__version__}: pip install -U setuptools")


def folder_of(package: str) -> Path | None:
    """Return the folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0]).resolve() if spec and spec.submodule_search_locations else None


def find_tool(name: str) -> str | None:
    """Return the path of a build tool: from its package in this environment, else from PATH."""
    if folder_of(name):
        module = importlib.import_module(name)
        return str(Path(getattr(module, "CMAKE_BIN_DIR", None) or module.BIN_DIR) / name)
    return shutil.which(name)


def why_no_kernels() -> str:
    """Return why no kernels can be compiled here; empty if they can."""
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
    """Return why no CUDA kernels can be compiled here; empty if they can."""
    try:
        TOOLKIT["choose"](os.environ, local=False)
    except TOOLKIT["CudaError"] as error:
        return str(error)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    return ""


CUDA_REASON = REASON or why_no_cuda()
CPU_LIBRARY, CUDA_LIBRARY = "libpydeq_cpu.so", "libpydeq_cuda.so"
LIBRARY_NAMES = [name for name, reason in ((CPU_LIBRARY, REASON), (CUDA_LIBRARY, CUDA_REASON)) if not reason]
LIBRARIES = ROOT / "build" / "libraries"


class BuildPython(build_py):
    """Write the reason for missing kernels into the package, for the warning at import: pip hides this output."""

    def run(self):
        if REASON and os.environ.get("PYDEQ_REQUIRE_KERNELS") == "1":
            raise CompileError(f"PYDEQ_REQUIRE_KERNELS=1, but no kernels can be compiled: {REASON}")
        if CUDA_REASON and os.environ.get("PYDEQ_WITH_CUDA") == "1":
            raise CompileError(f"PYDEQ_WITH_CUDA=1, but no CUDA kernels can be compiled: {CUDA_REASON}")
        if not self.editable_mode:  # files of an earlier build would be packed
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        package = ROOT / "pydeq" if self.editable_mode else Path(self.build_lib, "pydeq")
        reason_file = package / "no_kernels.txt"
        reason_file.unlink(missing_ok=True)
        for pattern, reason in ((CPU_LIBRARY, REASON), (CUDA_LIBRARY, CUDA_REASON), ("_C.*.so", REASON)):
            if reason:  # libraries of an earlier build would be loaded
                for library in package.glob(pattern):
                    library.unlink()
        if REASON:
            reason_file.write_text(REASON + "\n")
            print(f"pydeq is installed without compiled kernels: {REASON}", file=sys.stderr)
        elif CUDA_REASON:
            print(f"pydeq is installed without CUDA kernels: {CUDA_REASON}", file=sys.stderr)


class BuildKernels(build_ext):
    """Builds the libraries and the module by CMake, into pydeq/."""

    def run(self):
        # setuptools clears the first of these while it builds, and copies modules itself, but no libraries.
        self.local = bool(self.inplace or self.editable_mode)
        super().run()
        if self.local and self.extensions:
            for name in LIBRARY_NAMES:
                replace(LIBRARIES / name, ROOT / "pydeq" / name)

    def get_outputs(self):
        return list(dict.fromkeys([*super().get_outputs(), *self.libraries_from().values()]))

    def get_output_mapping(self):
        mapping = super().get_output_mapping()
        if mapping:  # for a build in place
            mapping.update({path: f"pydeq/{name}" for name, path in self.libraries_from().items()})
        return mapping

    def libraries_from(self) -> dict:
        """The libraries in the folder that is installed, by name."""
        return {name: str(Path(self.build_lib, "pydeq", name)) for name in LIBRARY_NAMES if self.extensions}

    def build_extension(self, ext):
        module = Path(self.get_ext_fullpath(ext.name))
        toolkit, archs = (None, "") if CUDA_REASON else TOOLKIT["choose"](os.environ, self.local)
        common = {
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "PYDEQ_TORCH_VERSION": importlib.metadata.version("torch"),
            "PYDEQ_WERROR": os.environ.get("PYDEQ_WERROR", "0"),
            "PYDEQ_SANITIZE": os.environ.get("PYDEQ_SANITIZE", ""),
            "PYDEQ_MANYLINUX": os.environ.get("PYDEQ_MANYLINUX", "0"),
        }
        libraries = {
            **common,
            "PYDEQ_PYTHON": sys.executable,
            "PYDEQ_TORCH_ROOT": folder_of("torch"),
            "PYDEQ_CUDA_COMPILER": toolkit.nvcc if toolkit else "",
            "PYDEQ_CUDA_ARCHITECTURES": archs,
            "PYDEQ_CUDA_REASON": CUDA_REASON,
        }
        state = build_state(libraries)
        if not all((LIBRARIES / name).exists() for name in LIBRARY_NAMES) or read(LIBRARIES / "state.txt") != state:
            (LIBRARIES / "state.txt").unlink(missing_ok=True)
            self.cmake(LIBRARIES, libraries)
            (LIBRARIES / "state.txt").write_text(state)
        build = ROOT / "build" / f"module-{sys.implementation.cache_tag}"
        python = {"Python_EXECUTABLE": sys.executable, "pybind11_DIR": f"{folder_of('pybind11')}/share/cmake/pybind11"}
        self.cmake(build, {**common, **python, "PYDEQ_MODULE": "1"})
        module.parent.mkdir(parents=True, exist_ok=True)
        for built in [*(LIBRARIES / name for name in LIBRARY_NAMES), build / module.name]:
            replace(built, module.parent / built.name)

    def cmake(self, build: Path, options: dict) -> None:
        """Configure a folder and build all its targets."""
        cmake = str(find_tool("cmake"))
        define = [f"-D{name}={value}" for name, value in options.items()]
        try:
            subprocess.run([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *define], check=True)
            subprocess.run([cmake, "--build", build], check=True)
        except subprocess.CalledProcessError as error:
            without = "PYDEQ_WITH_KERNELS=0, without those for GPUs PYDEQ_WITH_CUDA=0"
            raise CompileError(
                "pydeq's kernels did not compile; the messages are above. To install pydeq without any (the same"
                f" results, more slowly), set {without}"
            ) from error


def build_state(options: dict) -> str:
    """Return a text that changes whenever the libraries must be built again, for any Python."""
    interface = runpy.run_path(str(ROOT / "csrc" / "generate_interface.py"))["package_interface"](ROOT / "pydeq")
    digest = hashlib.sha256(interface.encode())
    for path in [ROOT / "CMakeLists.txt", *sorted((ROOT / "csrc").rglob("*"))]:
        if path.is_file() and path.suffix != ".pyc":
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    local = ("CMAKE_MAKE_PROGRAM", "PYDEQ_PYTHON", "PYDEQ_TORCH_ROOT")  # places of tools in an environment
    chosen = {name: value for name, value in options.items() if name not in local}
    for name in ("CXX", "CXXFLAGS", "LDFLAGS", "CUDAFLAGS"):
        chosen[name] = os.environ.get(name, "")
    return f"{digest.hexdigest()}\n{platform.machine()}\n{chosen}\n"


def replace(source: Path, target: Path) -> None:
    """Copy to a new file. Do not overwrite the old file's bytes: a running process may have mapped it."""
    target.unlink(missing_ok=True)
    shutil.copy2(source, target)


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


setup(
    ext_modules=[] if REASON else [Extension("pydeq._C", sources=[])],
    cmdclass={"build_py": BuildPython, "build_ext": BuildKernels},
)
