"""The compiled library: what it links to, what it leaves behind of its builder, what it says of itself, and what
happens where it is missing.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import FrozenInstanceError
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch

import pydeq
from pydeq import compiled

ROOT = Path(pydeq.__file__).parent.parent

needs_kernels = pytest.mark.skipif(not pydeq.kernels().cpu, reason=pydeq.kernels().cpu_reason)
needs_binutils = pytest.mark.skipif(not shutil.which("readelf"), reason="readelf is not on PATH")


def library() -> Path:
    return Path(sys.modules["pydeq._C"].__file__ or "")


def output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter where a warning is an error, with only these PYDEQ_ variables set."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYDEQ_")}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**inherited, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@needs_kernels
@needs_binutils
def test_links_to_torch_and_the_system_only():
    dynamic = output("readelf", "--dynamic", "--wide", library())
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0"}
    assert "libtorch_cpu.so" in needed
    assert {name for name in needed if not name.startswith("ld-linux")} <= system | {"libtorch_cpu.so"}
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


@needs_kernels
@needs_binutils
def test_exports_its_python_module_only():
    symbols = output("readelf", "--dyn-syms", "--wide", library()).splitlines()
    defined = [line.split() for line in symbols if re.search(r"\b(GLOBAL|WEAK|UNIQUE)\b", line)]
    own = {row[7] for row in defined if row[6] != "UND" and "pydeq" in row[7]}
    assert not own
    assert "PyInit__C" in {row[7] for row in defined if row[6] != "UND"}


@needs_kernels
def test_leaves_no_path_of_the_builder():
    paths = re.findall(rb"(?<![\w.])/[\w.+-]+/[\w.+/-]+", library().read_bytes())
    assert not paths


@needs_kernels
def test_kernel_objects_share_no_code_between_instruction_sets():
    """A weak symbol would be merged across instruction sets, and AVX-512 code could run where there is none."""
    objects = list(ROOT.glob(f"build/cmake-{sys.implementation.cache_tag}/**/pydeq_kernels.dir/generated/*.o"))
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
    assert facts.instruction_set in compiled.supported_instruction_sets()
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
        for name in compiled.supported_instruction_sets():
            compiled.select_instruction_set(name)
            assert pydeq.kernels().instruction_set == name
        with pytest.raises(ValueError, match="got 'sse9'"):
            compiled.select_instruction_set("sse9")
    finally:
        compiled.select_instruction_set(before)


@needs_kernels
def test_environment_forces_the_instruction_set():
    plainest = compiled.supported_instruction_sets()[0]
    result = python("import pydeq; print(pydeq.kernels().instruction_set)", PYDEQ_ISA=plainest)
    assert result.stdout.strip() == plainest, result.stderr


@needs_kernels
def test_unknown_instruction_set_is_an_error_at_import():
    result = python("import pydeq", PYDEQ_ISA="sse9")
    assert result.returncode == 1
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ValueError: PYDEQ_ISA=sse9: expected an instruction set that is compiled")
    assert "got 'sse9'" in message


def test_switched_off_runs_the_references_silently():
    code = "import pydeq; k = pydeq.kernels(); print(k.cpu, k.cpu_reason, k.instruction_set)"
    result = python(code, PYDEQ_KERNELS="off")
    assert result.stdout.strip() == "False PYDEQ_KERNELS=off None", result.stderr


def test_unknown_switch_is_an_error(monkeypatch):
    monkeypatch.setenv("PYDEQ_KERNELS", "maybe")
    with pytest.raises(ValueError, match="PYDEQ_KERNELS must be on or off, got 'maybe'"):
        compiled.load()


def test_off_contradicts_require(monkeypatch):
    monkeypatch.setenv("PYDEQ_KERNELS", "off")
    monkeypatch.setenv("PYDEQ_REQUIRE_KERNELS", "1")
    with pytest.raises(ImportError, match="PYDEQ_KERNELS=off contradicts PYDEQ_REQUIRE_KERNELS=1"):
        compiled.load()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that load() believes to be the package: empty, and nothing is loaded."""
    monkeypatch.setattr(compiled, "_PACKAGE", tmp_path)
    monkeypatch.setattr(compiled, "_library", None)
    monkeypatch.setattr(compiled, "_cpu_reason", "")
    monkeypatch.setitem(sys.modules, "pydeq._C", None)  # importing it fails
    for name in ("PYDEQ_KERNELS", "PYDEQ_REQUIRE_KERNELS", "PYDEQ_ISA"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_install_without_a_compiler_warns_once_and_says_why(package):
    (package / "no_kernels.txt").write_text("not found when pydeq was installed: a C++ compiler\n")
    with pytest.warns(RuntimeWarning) as warned:
        compiled.load()
    (warning,) = warned
    assert "no compiled kernels (not found when pydeq was installed: a C++ compiler)" in str(warning.message)
    assert "PYDEQ_KERNELS=off silences" in str(warning.message)
    assert "none, the references run: not found when pydeq was installed" in str(compiled.kernels())
    assert not compiled.kernels().cpu
    with pytest.raises(RuntimeError, match="no compiled kernels to choose from: not found when"):
        compiled.select_instruction_set("baseline")


def test_missing_kernels_are_an_error_where_required(package, monkeypatch):
    monkeypatch.setenv("PYDEQ_REQUIRE_KERNELS", "1")
    with pytest.raises(ImportError, match=r"no compiled kernels .no library _C.* unset PYDEQ_REQUIRE_KERNELS"):
        compiled.load()


def test_library_that_does_not_load_says_why(package):
    (package / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    with pytest.warns(RuntimeWarning, match="does not load: "):
        compiled.load()


def test_library_of_another_python_says_so(package):
    (package / "_C.cpython-399-x86_64-linux-gnu.so").write_bytes(b"")
    with pytest.warns(RuntimeWarning, match="_C.cpython-399-x86_64-linux-gnu.so is there, which Python"):
        compiled.load()


# The CUDA library, on machines without CUDA: what load() makes of what it finds.


class Library:
    """A CPU library as _load_cuda sees it."""

    cuda_version, cuda_archs, cuda_reason = "13.0", "9.0+PTX", ""


@pytest.fixture
def cuda_torch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A torch with CUDA, and a driver as new as the kernels."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(compiled, "cuda_driver", lambda: (13, 0))
    monkeypatch.setattr(compiled, "_cuda_library", None)
    monkeypatch.setattr(compiled, "_cuda_reason", "")
    monkeypatch.setitem(sys.modules, "pydeq._C_cuda", None)  # importing it fails
    return monkeypatch


def load_cuda(required: bool = False) -> None:
    compiled._load_cuda(Library, required)  # type: ignore[arg-type]


def test_a_build_without_cuda_kernels_says_why(cuda_torch):
    cuda_torch.setattr(Library, "cuda_version", "")
    cuda_torch.setattr(Library, "cuda_reason", "no nvcc was found")
    load_cuda()
    assert compiled._cuda_reason == "no nvcc was found"
    assert not compiled.cuda_loaded()


def test_a_torch_without_cuda_leaves_the_cuda_library_alone(cuda_torch):
    cuda_torch.setattr(torch.version, "cuda", None)
    load_cuda()
    assert compiled._cuda_reason == f"torch {torch.__version__} is built without CUDA"


def test_an_old_driver_is_told_apart(cuda_torch):
    cuda_torch.setattr(compiled, "cuda_driver", lambda: (12, 4))
    expected = r"driver supports CUDA 12\.4 at most, and the kernels were compiled with CUDA 13\.0: update the driver"
    with pytest.warns(RuntimeWarning, match=expected):
        load_cuda()
    assert not compiled.cuda_loaded()
    with pytest.raises(ImportError, match=expected):
        load_cuda(required=True)


@pytest.mark.parametrize("driver", [None, (13, 0), (13, 4), (14, 1)], ids=str)
def test_a_driver_of_the_same_major_version_or_later_will_do(cuda_torch, driver):
    library = type(sys)("pydeq._C_cuda")
    cuda_torch.setattr(compiled, "cuda_driver", lambda: driver)
    cuda_torch.setitem(sys.modules, "pydeq._C_cuda", library)
    load_cuda(required=True)
    assert compiled._cuda_library is library
    assert compiled._cuda_reason == ""


def test_a_cuda_library_that_does_not_load_says_why(cuda_torch):
    with pytest.warns(
        RuntimeWarning, match=r"CUDA kernels do not run .the library _C_cuda does not load: .* references"
    ):
        load_cuda()
    with pytest.raises(ImportError, match="unset PYDEQ_REQUIRE_KERNELS"):
        load_cuda(required=True)


def cuda_library() -> Path:
    found = sorted((ROOT / "pydeq").glob(f"_C_cuda{EXTENSION_SUFFIXES[0]}"))
    if not found or not pydeq.kernels().cuda_built:
        pytest.skip("this build has no CUDA kernels")
    return found[0]


@needs_kernels
@needs_binutils
def test_the_cuda_library_links_to_torch_and_the_system_only():
    dynamic = output("readelf", "--dynamic", "--wide", cuda_library())
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    system = {
        "libstdc++.so.6",
        "libm.so.6",
        "libgcc_s.so.1",
        "libc.so.6",
        "libpthread.so.0",
        "libdl.so.2",
        "librt.so.1",
    }
    assert "libtorch.so" in needed
    assert {name for name in needed if not name.startswith("ld-linux")} <= system | {"libtorch.so"}
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


@needs_kernels
def test_the_cuda_library_leaves_no_path_of_the_builder():
    content = cuda_library().read_bytes()
    for path in (str(ROOT), str(Path(torch.__file__).parent), "/tmp/tmpxft"):
        assert path.encode() not in content


@needs_kernels
@needs_binutils
def test_every_operation_has_a_cuda_kernel():
    """Registered under its name, in a library that need not be loaded to see it."""
    content = cuda_library().read_bytes()
    names = [
        name.removeprefix("pydeq::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("pydeq:")
    ]
    missing = [name for name in names if name.encode() + b"\0" not in content]
    assert not missing
