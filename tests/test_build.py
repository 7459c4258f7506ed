"""The compiled libraries: what they link to, what they leave behind of their builder, what they say of themselves, and
what happens where one is missing.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import FrozenInstanceError
from enum import IntEnum
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import requires
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import pydeq
from pydeq.ops import kernels, libraries
from pydeq.ops.constants import CudaPath
from pydeq.ops.interface import differences, interface
from pydeq.ops.libraries import CPU, CUDA, CpuLibrary, StaleLibraryError

ROOT = Path(pydeq.__file__).parent.parent

needs_kernels = pytest.mark.skipif(not pydeq.kernels().cpu, reason=pydeq.kernels().cpu_reason)
needs_binutils = pytest.mark.skipif(not shutil.which("readelf"), reason="readelf is not on PATH")


PACKAGE = Path(pydeq.__file__).parent
BUILD = ROOT / "build" / "libraries"


@pytest.fixture(params=[CPU, CUDA])
def library(request: pytest.FixtureRequest) -> Path:
    """The file of each library in turn."""
    if request.param == CUDA and not pydeq.kernels().cuda_built:
        pytest.skip("this build has no CUDA kernels")
    return PACKAGE / request.param


def output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def python(
    code: str, folder: Path = ROOT, executable: str = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter where a warning is an error, with only these PYDEQ_ variables set.

    The package is imported from ``folder``.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYDEQ_")}
    return subprocess.run(
        [executable, "-W", "error", "-c", code],
        env={**inherited, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def carried(tmp_path: Path) -> Path:
    """A folder with a copy of the package and its libraries, as for a machine with another Python: without _C."""
    ignored = shutil.ignore_patterns("_C.*", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "pydeq", ignore=ignored)
    return tmp_path


SYSTEM = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1"}


@needs_kernels
@needs_binutils
def test_links_to_torch_and_the_system_only(library):
    dynamic = output("readelf", "--dynamic", "--wide", library)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    torch_library = "libtorch_cpu.so" if library.name == CPU else "libtorch.so"
    assert torch_library in needed
    assert {name for name in needed if not name.startswith("ld-linux")} <= SYSTEM | {torch_library}
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def symbols(library: Path) -> tuple[set[str], set[str]]:
    """The dynamic symbols that a library defines, and those that it needs."""
    lines = output("readelf", "--dyn-syms", "--wide", library).splitlines()
    rows = [line.split() for line in lines if re.search(r"\b(GLOBAL|WEAK|UNIQUE)\b", line)]
    return {row[7] for row in rows if row[6] != "UND"}, {row[7].split("@")[0] for row in rows if row[6] == "UND"}


@needs_kernels
@needs_binutils
def test_shows_the_functions_that_are_called_and_nothing_else(library):
    defined, _ = symbols(library)
    own = {name for name in defined if "pydeq" in name}
    assert all(name.startswith("pydeq_") for name in own)
    # All that is called: the CUDA library cannot be loaded where torch has no CUDA.
    before, after = (PACKAGE / "ops" / "libraries.py").read_text().split("class CudaLibrary")
    called = set(re.findall(r"\bpydeq_\w+", before if library.name == CPU else after))
    assert called - {"pydeq_cpu", "pydeq_cuda"} <= own


@needs_kernels
@needs_binutils
def test_holds_no_python_symbol(library):
    defined, needed = symbols(library)
    assert len(needed) > 20
    assert not [name for name in defined | needed if re.match(r"_?Py|pybind11", name) or "pybind11" in name]


@needs_kernels
@needs_binutils
def test_a_kernel_is_compiled_in_one_place_only():
    """Of two copies one would be launched, and nobody could say which (nvcc on -static-global-template-stub)."""
    objects = list(BUILD.glob("CMakeFiles/pydeq_cuda*.dir/**/*.cu.o"))
    if not objects or not shutil.which("nm"):
        pytest.skip("no object files of CUDA kernels, or no nm on PATH")
    found = [
        line.split(maxsplit=2)[2]
        for file in objects
        for line in output("nm", "-C", "--defined-only", file).splitlines()
        if re.match(r"\w+ [WT] void pydeq::\w+_kernel<", line)
    ]
    assert len(found) == len(set(found)) > 0


@needs_kernels
def test_leaves_no_path_of_the_builder(library):
    content = library.read_bytes()
    if library.name == CPU:
        assert not re.findall(rb"(?<![\w.])/[\w.+-]+/[\w.+/-]+", content)
    for path in (str(ROOT), str(Path(torch.__file__).parent), sys.prefix, "/tmp/tmpxft"):
        assert path.encode() not in content


@needs_kernels
def test_kernel_objects_share_no_code_between_instruction_sets():
    """A weak symbol would be merged across instruction sets, and AVX-512 code could run where there is none."""
    objects = list(BUILD.glob("**/pydeq_kernels.dir/generated/*.o"))
    if not objects or not shutil.which("nm"):
        pytest.skip("no object files beside this package, or no nm on PATH")
    for file in objects:
        isa = file.name.split(".")[1]
        defined = [line.split(maxsplit=2)[1:] for line in output("nm", "-C", "--defined-only", file).splitlines()]
        for kind, name in defined:
            assert kind not in "WVu", f"{file.name} defines {name} weakly: move it into an anonymous namespace"
            assert kind.islower() or name.startswith(f"pydeq::{isa}::"), f"{file.name} exports {name}"


@needs_kernels
def test_every_operation_has_a_cpu_kernel():
    """The references stand behind the kernels, so one that is missing would be slow but never wrong."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("pydeq::")]
    assert names
    missing = [name for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")]
    assert not missing


@needs_kernels
def test_kernels_say_what_runs():
    facts = pydeq.kernels()
    assert facts.cpu
    assert facts.cpu_reason == ""
    assert facts.instruction_set in kernels.supported_instruction_sets()
    if platform.machine() == "x86_64":
        assert facts.instruction_sets == ("baseline", "avx2", "avx512")
    assert facts.pydeq == pydeq.__version__
    assert facts.torch == torch.__version__
    assert facts.torch_built
    assert re.match(r"(GCC|Clang) \d+", facts.compiler or "")
    for fact in (facts.instruction_set, facts.pydeq, facts.torch, facts.torch_built, facts.abi_target):
        assert fact
        assert fact in str(facts)
    with pytest.raises(FrozenInstanceError):
        facts.cpu = False  # type: ignore[misc]


@needs_kernels
def test_abi_target_is_the_oldest_torch_that_installs():
    (bound,) = (line for line in requires("pydeq") or [] if line.startswith("torch"))
    assert bound == f"torch>={pydeq.kernels().abi_target}"


def test_cuda_kernels_give_their_reason():
    facts = pydeq.kernels()
    assert facts.cuda == (not facts.cuda_reason)
    assert facts.cuda_reason in str(facts)
    assert (facts.cuda_built is None) == (not facts.cuda_archs)
    if facts.cuda_built:
        assert f"compiled with CUDA {facts.cuda_built} for {', '.join(facts.cuda_archs)}" in str(facts)


@needs_kernels
def test_select_instruction_set():
    before = pydeq.kernels().instruction_set
    assert before
    try:
        for name in kernels.supported_instruction_sets():
            kernels.select_instruction_set(name)
            assert pydeq.kernels().instruction_set == name
        with pytest.raises(ValueError, match="got 'sse9'"):
            kernels.select_instruction_set("sse9")
    finally:
        kernels.select_instruction_set(before)


@needs_kernels
def test_environment_forces_the_instruction_set():
    plainest = kernels.supported_instruction_sets()[0]
    result = python("import pydeq; print(pydeq.kernels().instruction_set)", PYDEQ_ISA=plainest)
    assert result.stdout.strip() == plainest, result.stderr


@needs_kernels
def test_unknown_instruction_set_is_an_error_at_import():
    result = python("import pydeq", PYDEQ_ISA="sse9")
    assert result.returncode == 1
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ValueError: PYDEQ_ISA=sse9: expected an instruction set that is compiled")
    assert "got 'sse9'" in message


class Chooser:
    """Stands in for the library of CUDA kernels."""

    def __init__(self):
        self.paths = []

    def select_path(self, path):
        self.paths.append(path)


def test_a_path_on_a_gpu_can_be_forced_between_solves(monkeypatch):
    library = Chooser()
    monkeypatch.setattr(kernels, "_cuda_library", library)
    monkeypatch.setattr(kernels, "_cuda_path", CudaPath.AUTO)
    for path in CudaPath:
        kernels.select_cuda_path(path.name.lower())
    assert library.paths == list(CudaPath)
    with pytest.raises(ValueError, match=r"a path of steps on a GPU \(auto, block, cluster, split\), got 'SPLIT'"):
        kernels.select_cuda_path("SPLIT")
    assert library.paths == list(CudaPath)


def test_environment_forces_the_path_on_a_gpu():
    code = "import pydeq.ops.kernels as c; print(c._cuda_path.name)"
    result = python(code, PYDEQ_CUDA_PATH="cluster")
    assert result.stdout.strip() == "CLUSTER", result.stderr
    result = python("import pydeq", PYDEQ_CUDA_PATH="warp")
    assert result.returncode == 1
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ValueError: PYDEQ_CUDA_PATH=warp: expected a path of steps on a GPU (auto, block,")
    assert message.endswith("got 'warp'; unset it to run the fastest one")


def test_switched_off_runs_the_references_silently():
    code = "import pydeq; k = pydeq.kernels(); print(k.cpu, k.cpu_reason, k.instruction_set)"
    result = python(code, PYDEQ_KERNELS="off")
    assert result.stdout.strip() == "False PYDEQ_KERNELS=off None", result.stderr


def test_unknown_switch_is_an_error(monkeypatch):
    monkeypatch.setenv("PYDEQ_KERNELS", "maybe")
    with pytest.raises(ValueError, match="PYDEQ_KERNELS must be on or off, got 'maybe'"):
        kernels.load()


def test_off_contradicts_require(monkeypatch):
    monkeypatch.setenv("PYDEQ_KERNELS", "off")
    monkeypatch.setenv("PYDEQ_REQUIRE_KERNELS", "1")
    with pytest.raises(ImportError, match="PYDEQ_KERNELS=off contradicts PYDEQ_REQUIRE_KERNELS=1"):
        kernels.load()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that load() believes to be the package: empty, and nothing is loaded."""
    monkeypatch.setattr(kernels, "_PACKAGE", tmp_path)
    monkeypatch.setattr(kernels, "_library", None)
    monkeypatch.setattr(kernels, "_cpu_reason", "")
    for name in ("PYDEQ_KERNELS", "PYDEQ_REQUIRE_KERNELS", "PYDEQ_ISA"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_install_without_a_compiler_warns_once_and_says_why(package):
    (package / "no_kernels.txt").write_text("not found when pydeq was installed: a C++ compiler\n")
    with pytest.warns(RuntimeWarning) as warned:
        kernels.load()
    (warning,) = warned
    assert "no compiled kernels (not found when pydeq was installed: a C++ compiler)" in str(warning.message)
    assert "PYDEQ_KERNELS=off silences" in str(warning.message)
    assert "none, the references run: not found when pydeq was installed" in str(kernels.kernels())
    assert not kernels.kernels().cpu
    with pytest.raises(RuntimeError, match="no compiled kernels to choose from: not found when"):
        kernels.select_instruction_set("baseline")


def test_missing_kernels_are_an_error_where_required(package, monkeypatch):
    monkeypatch.setenv("PYDEQ_REQUIRE_KERNELS", "1")
    with pytest.raises(
        ImportError, match=r"no compiled kernels .no library libpydeq_cpu.* unset PYDEQ_REQUIRE_KERNELS"
    ):
        kernels.load()


def test_library_that_does_not_load_says_why(package):
    (package / CPU).write_bytes(b"no library")
    with pytest.warns(RuntimeWarning, match=r"libpydeq_cpu.so does not load: .*(file too short|invalid ELF header)"):
        kernels.load()


# Libraries of other sources


def test_interface_depends_on_schemas_and_numbers_and_on_nothing_else():
    class Counter(IntEnum):
        FIRST = 0

    class Longer(IntEnum):
        FIRST = 0
        SECOND = 1

    numbers = {"LIMIT": 0.5, "Counter": Counter, "_hidden": 1, "IntEnum": IntEnum, "__doc__": "text"}
    ours = interface(["a(int x) -> ()", "b() -> ()"], numbers)
    assert ours == interface(["b() -> ()", "a(int x) -> ()"], {**numbers, "__doc__": "other text", "_hidden": 2})
    assert differences(ours, interface(["a(int y) -> ()", "b() -> ()"], numbers)) == ["a"]
    assert differences(ours, interface(["a(int x) -> ()"], numbers)) == ["b"]
    for changed in ({"LIMIT": 0.25}, {"Counter": Longer}):
        assert differences(ours, interface(["a(int x) -> ()", "b() -> ()"], {**numbers, **changed})) == ["constants"]
    assert not differences(ours, ours)


@needs_kernels
def test_a_library_of_other_sources_is_refused():
    ours = kernels._interface()
    CpuLibrary(PACKAGE / CPU, ours)
    changed = re.sub(r"(gmres_step|constants)=\w+", r"\1=0", ours) + " newton_step=0"
    expected = r"libpydeq_cpu.so was built from other .*different: constants, gmres_step, newton_step.* Build it"
    with pytest.raises(StaleLibraryError, match=expected):
        CpuLibrary(PACKAGE / CPU, changed)


@needs_kernels
def test_a_library_without_a_function_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(libraries, "SOLVERS", {"pydeq_solve_unheard_of": ()})
    with pytest.raises(StaleLibraryError, match=r"different: the functions of the library.* Build it"):
        CpuLibrary(PACKAGE / CPU, kernels._interface())


@needs_kernels
def test_import_refuses_libraries_of_other_sources(carried):
    constants = carried / "pydeq" / "ops" / "constants.py"
    constants.write_text(constants.read_text() + "\nADDED: Final = 3\n")
    result = python("import pydeq", carried)
    assert result.returncode == 1
    message = result.stderr.splitlines()[-1]
    assert message.startswith("pydeq.ops.libraries.StaleLibraryError: ")
    assert "libpydeq_cpu.so was built from other sources than this pydeq (different: constants). Build it" in message
    assert python("import pydeq", carried, PYDEQ_KERNELS="off").returncode == 0


# The module with the facts of the build


SOLVE = """if True:
    import torch, pydeq
    facts = pydeq.kernels()
    assert facts.cpu and facts.instruction_set in facts.instruction_sets, facts
    for solver in (pydeq.Picard(), pydeq.Anderson(), pydeq.Broyden(), pydeq.GMRES()):
        solution = pydeq.fixed_point(lambda z: 0.5 * torch.tanh(z) + 1, torch.zeros(4, 9), solver=solver)
        assert solution.converged.all()
    print(facts.unknown_reason)
    print(facts.torch_built, facts.abi_target, facts.compiler)
    print(facts)
"""


@needs_kernels
def test_kernels_run_without_the_module_and_say_what_is_unknown(carried):
    result = python(SOLVE, carried, PYDEQ_REQUIRE_KERNELS="1")
    assert result.returncode == 0, result.stderr
    reason, built, *rows = result.stdout.splitlines()
    assert reason == "they are in the module pydeq._C, and it is missing"
    assert built == "None None None"
    assert f"compiler      unknown, as is the torch that kernels were compiled with: {reason}" in rows
    assert f"torch         {torch.__version__}" in rows


@needs_kernels
def test_the_same_libraries_serve_every_python_that_is_here(carried):
    for executable in (sys.executable, *other_pythons()):
        result = python(SOLVE, carried, executable, PYDEQ_REQUIRE_KERNELS="1")
        assert result.returncode == 0, f"{executable}: {result.stderr}"


def other_pythons() -> list[str]:
    """Interpreters of other versions that have torch: those that PYTHONS names, and those on PATH."""
    named = os.environ.get("PYTHONS", "").split()
    minors = [minor for minor in range(10, 20) if minor != sys.version_info.minor]
    found = [*named, *(path for minor in minors if (path := shutil.which(f"python3.{minor}")))]
    probe = "import torch; assert tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 11)"
    return [path for path in found if subprocess.run([path, "-c", probe], capture_output=True).returncode == 0]


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("_C.cpython-399-x86_64-linux-gnu.so", r"_C.cpython-399-x86_64-linux-gnu.so is for another Python than \d"),
        (None, "it is missing"),
    ],
    ids=["of another Python", "missing"],
)
def test_a_module_that_is_not_to_be_had_says_why(package, file, reason):
    if file:
        (package / file).write_bytes(b"")
    facts, unknown = kernels._build_facts()
    assert facts is None
    assert re.fullmatch(rf"they are in the module pydeq._C, and {reason}.*", unknown)


def test_a_module_that_does_not_load_says_why(package, monkeypatch):
    (package / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pydeq._C", None)  # importing it fails
    assert kernels._build_facts()[1].startswith("they are in the module pydeq._C, and it does not load: ")


# The CUDA library, on machines without CUDA: what load() makes of what it finds.


class Library:
    """A CPU library as _load_cuda sees it."""

    cuda_version, cuda_archs, cuda_reason = "13.0", "9.0+PTX", ""
    path: ClassVar[int | None] = None

    @classmethod
    def select_path(cls, path: int) -> None:
        cls.path = path


@pytest.fixture
def cuda_torch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A torch with CUDA, and a driver as new as the kernels."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(kernels, "cuda_driver", lambda: (13, 0))
    monkeypatch.setattr(kernels, "_cuda_library", None)
    monkeypatch.setattr(kernels, "_cuda_reason", "")
    return monkeypatch


def load_cuda(required: bool = False) -> None:
    kernels._load_cuda(Library, required)  # type: ignore[arg-type]


def test_a_build_without_cuda_kernels_says_why(cuda_torch):
    cuda_torch.setattr(Library, "cuda_version", "")
    cuda_torch.setattr(Library, "cuda_reason", "no nvcc was found")
    load_cuda()
    assert kernels._cuda_reason == "no nvcc was found"
    assert not kernels.cuda_loaded()


def test_a_torch_without_cuda_leaves_the_cuda_library_alone(cuda_torch):
    cuda_torch.setattr(torch.version, "cuda", None)
    load_cuda()
    assert kernels._cuda_reason == f"torch {torch.__version__} is built without CUDA"


def test_an_old_driver_is_told_apart(cuda_torch):
    cuda_torch.setattr(kernels, "cuda_driver", lambda: (12, 4))
    expected = r"driver supports CUDA 12\.4 at most, and the kernels were compiled with CUDA 13\.0: update the driver"
    with pytest.warns(RuntimeWarning, match=expected):
        load_cuda()
    assert not kernels.cuda_loaded()
    with pytest.raises(ImportError, match=expected):
        load_cuda(required=True)


@pytest.mark.parametrize("driver", [None, (13, 0), (13, 4), (14, 1)], ids=str)
def test_a_driver_of_the_same_major_version_or_later_will_do(cuda_torch, driver):
    opened = []
    cuda_torch.setattr(kernels, "cuda_driver", lambda: driver)
    cuda_torch.setattr(kernels, "CudaLibrary", lambda path, interface: opened.append((path, interface)) or Library)
    load_cuda(required=True)
    assert opened == [(PACKAGE / CUDA, kernels._interface())]
    assert kernels._cuda_library is Library
    assert Library.path == kernels._cuda_path
    assert kernels._cuda_reason == ""


def test_a_cuda_library_that_does_not_load_says_why(cuda_torch, tmp_path):
    cuda_torch.setattr(kernels, "_PACKAGE", tmp_path)
    expected = r"CUDA kernels do not run .the library libpydeq_cuda.so does not load: .*No such file.* references"
    with pytest.warns(RuntimeWarning, match=expected):
        load_cuda()
    with pytest.raises(ImportError, match="unset PYDEQ_REQUIRE_KERNELS"):
        load_cuda(required=True)


@needs_kernels
@needs_binutils
def test_every_operation_has_a_cuda_kernel():
    """Registered under its name, in a library that need not be loaded to see it."""
    if not pydeq.kernels().cuda_built:
        pytest.skip("this build has no CUDA kernels")
    content = (PACKAGE / CUDA).read_bytes()
    names = [
        name.removeprefix("pydeq::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("pydeq:")
    ]
    missing = [name for name in names if name.encode() + b"\0" not in content]
    assert not missing
