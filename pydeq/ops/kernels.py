"""Load the compiled kernels, report which of them run, and warn or raise if there are none.

Environment:

    PYDEQ_KERNELS=off         run the references in Python, without a warning
    PYDEQ_REQUIRE_KERNELS=1   missing kernels are an ImportError, not a warning
    PYDEQ_ISA=avx2            run the kernels compiled for this instruction set, not for the CPU's best one
    PYDEQ_CUDA_PATH=split     take every step on a GPU by this path (auto, block, cluster, split; read at import), see
                              select_cuda_path

CPU kernels are in ``libpydeq_cpu.so``, CUDA kernels in ``libpydeq_cuda.so``, which is loaded only if torch has CUDA and
the driver is new enough. Kernels need only these two files, under any Python. The module ``_C`` has the facts of the
build; it works only under one Python version.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.machinery
import os
import platform
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pydeq.ops import constants
from pydeq.ops.compiled_loop import Loop
from pydeq.ops.constants import Answer, CudaPath
from pydeq.ops.interface import interface
from pydeq.ops.libraries import CPU, CUDA, CpuLibrary, CudaLibrary
from pydeq.ops.registry import schemas

_PACKAGE = Path(__file__).parent.parent

_library: CpuLibrary | None = None
_cpu_reason = "not loaded yet"
_cuda_library: CudaLibrary | None = None
_cuda_reason = "not loaded yet"
_cuda_path = CudaPath.AUTO
_missed_cuda = False  # whether a solve on a GPU has warned about missing CUDA kernels


@dataclass(frozen=True)
class Kernels:
    """The compiled kernels that are loaded, and the versions that they were built with and run on."""

    cpu: bool
    """Whether compiled CPU kernels are loaded; the plain-torch references run otherwise."""
    cpu_reason: str
    """Why there are no CPU kernels; empty if there are some."""
    instruction_set: str | None
    """The instruction set whose CPU kernels run."""
    instruction_sets: tuple[str, ...]
    """The instruction sets that CPU kernels were compiled for, from the most basic to the best."""
    cuda: bool
    """Whether compiled CUDA kernels are loaded, and a GPU is here to run them."""
    cuda_reason: str
    """Why no CUDA kernels run; empty if they run."""
    cuda_archs: tuple[str, ...]
    """The GPU architectures that CUDA kernels were compiled for, such as "9.0", or "9.0+PTX" if newer GPUs can run
    them, too."""
    cuda_built: str | None
    """The version of CUDA that CUDA kernels were compiled with."""
    cuda_driver: str | None
    """The newest version of CUDA that the NVIDIA driver on this machine supports; None without a driver."""
    pydeq: str
    """The version of pydeq."""
    torch: str
    """The version of torch in use."""
    torch_built: str | None
    """The version of torch that the kernels were compiled with; None if it is not known."""
    abi_target: str | None
    """The version of torch's stable ABI that the kernels use: they run with this version of torch and later ones. None
    if it is not known."""
    compiler: str | None
    """The C++ compiler of the CPU kernels; None if it is not known."""
    unknown_reason: str
    """Why the three attributes above are not known although there are kernels; empty if they are known."""

    def __str__(self) -> str:
        sets = f"{self.instruction_set} (compiled: {', '.join(self.instruction_sets)})"
        built = f" (kernels compiled with {self.torch_built}, for {self.abi_target} and later)"
        unknown = f"unknown, as is the torch that kernels were compiled with: {self.unknown_reason}"
        rows = {
            "pydeq": self.pydeq,
            "CPU kernels": sets if self.cpu else f"none, the references run: {self.cpu_reason}",
            "CUDA kernels": self._cuda(),
            "torch": self.torch + (built if self.torch_built else ""),
            "compiler": self.compiler or (unknown if self.cpu else "none"),
        }
        return "\n".join(f"{name:<14}{value}" for name, value in rows.items())

    def _cuda(self) -> str:
        if self.cuda_built is None:
            return f"none: {self.cuda_reason}"
        compiled = f"compiled with CUDA {self.cuda_built} for {', '.join(self.cuda_archs)}"
        driver = f", driver up to CUDA {self.cuda_driver}" if self.cuda_driver else ""
        return f"{compiled}{driver}" if self.cuda else f"do not run: {self.cuda_reason} ({compiled}{driver})"


def package_version() -> str:
    """The installed version of pydeq; "0+unknown" in a checkout that is not installed."""
    try:
        return version("pydeq")
    except PackageNotFoundError:
        return "0+unknown"


def kernels() -> Kernels:
    """Describe the loaded kernels, their instruction set and torch, and why other kernels are not loaded.

    Examples:
        >>> print(pydeq.kernels())
        pydeq         ...
        CPU kernels   ...
        CUDA kernels  ...
        torch         ...
        compiler      ...
    """
    # Only this function looks for a GPU: at import, it would cost time and could start CUDA in a process that forks.
    reason = _cuda_reason or ("" if torch.cuda.is_available() else "torch finds no GPU here")
    driver = cuda_driver() if torch.version.cuda else None
    compiled = _cuda_library or _library  # with CUDA
    facts, unknown = _build_facts() if _library else (None, "")
    return Kernels(
        cpu=_library is not None,
        cpu_reason=_cpu_reason,
        instruction_set=_library.instruction_set() if _library else None,
        instruction_sets=_library.instruction_sets if _library else (),
        cuda=not reason,
        cuda_reason=reason,
        cuda_archs=_compiled_archs(),
        cuda_built=(compiled.cuda_version or None) if compiled else None,
        cuda_driver=_dotted(driver) if driver else None,
        pydeq=package_version(),
        torch=str(torch.__version__),
        torch_built=facts.torch_built if facts else None,
        abi_target=facts.abi_target if facts else None,
        compiler=facts.compiler if facts else None,
        unknown_reason=unknown,
    )


def _build_facts() -> tuple[Any, str]:
    """The module with the facts of the build, or None with the reason."""
    if any((_PACKAGE / f"_C{suffix}").exists() for suffix in importlib.machinery.EXTENSION_SUFFIXES):
        try:
            return importlib.import_module("pydeq._C"), ""
        except ImportError as error:
            why = f"it does not load: {error}"
    else:
        others = ", ".join(path.name for path in sorted(_PACKAGE.glob("_C.*.so")))
        why = f"{others} is for another Python than {platform.python_version()}" if others else "it is missing"
    return None, f"they are in the module pydeq._C, and {why}"


def load() -> None:
    """Load the compiled kernels, which register themselves with torch. Call it after all schemas are defined.

    Raises:
        ImportError: If there are none and PYDEQ_REQUIRE_KERNELS=1, or if they were built from other sources.
        ValueError: If PYDEQ_KERNELS, PYDEQ_ISA or PYDEQ_CUDA_PATH names something that does not exist here.
    """
    global _library, _cpu_reason, _cuda_reason
    switch = os.environ.get("PYDEQ_KERNELS", "on")
    if switch not in ("on", "off"):
        raise ValueError(f"PYDEQ_KERNELS must be on or off, got {switch!r}")
    if name := os.environ.get("PYDEQ_CUDA_PATH"):
        try:
            select_cuda_path(name)
        except ValueError as error:
            raise ValueError(f"PYDEQ_CUDA_PATH={name}: {error}; unset it to run the fastest one") from None
    required = os.environ.get("PYDEQ_REQUIRE_KERNELS") == "1"
    if switch == "off":
        if required:
            raise ImportError("PYDEQ_KERNELS=off contradicts PYDEQ_REQUIRE_KERNELS=1: unset one of them")
        _cpu_reason = _cuda_reason = "PYDEQ_KERNELS=off"
        return
    try:
        _library = CpuLibrary(_PACKAGE / CPU, _interface())
    except OSError as error:
        _cpu_reason = _cuda_reason = _why_missing(error)
        message = (
            f"pydeq has no compiled kernels ({_cpu_reason}). Results are the same without them, solves are slower. "
            "To compile them, put a C++ compiler on PATH and run, in pydeq's source folder, "
            "PYDEQ_REQUIRE_KERNELS=1 pip install --no-build-isolation --no-deps --force-reinstall . "
        )
        if required:
            raise ImportError(message + "To run without them, unset PYDEQ_REQUIRE_KERNELS.") from error
        warnings.warn(message + "PYDEQ_KERNELS=off silences this warning.", RuntimeWarning, stacklevel=2)
        return
    _cpu_reason = ""
    if name := os.environ.get("PYDEQ_ISA"):
        try:
            select_instruction_set(name)
        except ValueError as error:
            raise ValueError(f"PYDEQ_ISA={name}: {error}; unset it to run the best one") from None
    _load_cuda(_library, required)


def _interface() -> str:
    """The interface that the libraries must have been built for."""
    return interface(schemas, vars(constants))


def _load_cuda(library: CpuLibrary, required: bool) -> None:
    """Load the CUDA kernels of this build if torch has CUDA.

    Raises:
        ImportError: If they were built from other sources; with ``required``, also if they do not load although they
            should.
    """
    global _cuda_library, _cuda_reason
    _cuda_library = None
    if not library.cuda_version:
        _cuda_reason = library.cuda_reason
        return
    if torch.version.cuda is None:
        _cuda_reason = f"torch {torch.__version__} is built without CUDA"
        return
    driver, built = cuda_driver(), tuple(map(int, library.cuda_version.split(".")))
    # Within a major version every driver runs the machine code of every toolkit.
    if driver and driver[0] < built[0]:
        _cuda_reason = (
            f"the NVIDIA driver supports CUDA {_dotted(driver)} at most, and the kernels were compiled with CUDA"
            f" {library.cuda_version}: update the driver, or compile pydeq with CUDA {driver[0]}"
        )
    else:
        try:
            _cuda_library = CudaLibrary(_PACKAGE / CUDA, _interface())
        except OSError as error:
            _cuda_reason = f"the library {CUDA} does not load: {error}"
        else:
            _cuda_reason = ""
            _cuda_library.select_path(_cuda_path)
            return
    message = f"pydeq's CUDA kernels do not run ({_cuda_reason}). "
    if required:
        raise ImportError(message + "To run without them, unset PYDEQ_REQUIRE_KERNELS.")
    warnings.warn(message + "Solves on a GPU run the plain-torch references.", RuntimeWarning, stacklevel=3)


def check_capability(capability: tuple[int, int], name: str) -> None:
    """Raise if the CUDA kernels were not compiled for this GPU.

    Args:
        capability: Its compute capability, such as (9, 0).
        name: Its name, such as "cuda:0, NVIDIA H100".

    Raises:
        RuntimeError: If the GPU can run none of the kernels.
    """
    archs = _compiled_archs()
    if any(_runs(arch, capability) for arch in archs):
        return
    has = _dotted(capability)
    raise RuntimeError(
        f"{name} has compute capability {has}, and pydeq's CUDA kernels were compiled for {', '.join(archs)}: compile"
        f" them with TORCH_CUDA_ARCH_LIST={has}, in pydeq's source folder, by PYDEQ_WITH_CUDA=1 pip install"
        " --no-build-isolation --no-deps --force-reinstall . or run the plain-torch references with PYDEQ_KERNELS=off"
    )


def _runs(arch: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU runs code for ``arch``: machine code within its major version, PTX also on later ones."""
    match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
    if not match:
        return True  # unknown; a launch will show
    made_for, kind, ptx = (int(match[1]), int(match[2])), match[3], match[4]
    if kind == "a":
        return capability == made_for
    return capability >= made_for and (capability[0] == made_for[0] or (bool(ptx) and not kind))


def _compiled_archs() -> tuple[str, ...]:
    compiled = _cuda_library or _library
    return tuple(filter(None, compiled.cuda_archs.split(", "))) if compiled else ()


def cuda_loaded() -> bool:
    """Whether operations on CUDA tensors run compiled kernels."""
    return _cuda_library is not None


def miss_cuda() -> None:
    """Warn once that a solve on a GPU runs without CUDA kernels.

    Raises:
        ImportError: If PYDEQ_REQUIRE_KERNELS=1.
    """
    global _missed_cuda
    if os.environ.get("PYDEQ_KERNELS") == "off":
        return
    message = (
        f"a solve on a GPU runs pydeq's plain-torch references: there are no CUDA kernels ({_cuda_reason}). Results are"
        " the same, solves are slower and wait for the GPU in every step. To compile them, put nvcc on PATH and run, in"
        " pydeq's source folder, PYDEQ_WITH_CUDA=1 pip install --no-build-isolation --no-deps --force-reinstall . "
    )
    if os.environ.get("PYDEQ_REQUIRE_KERNELS") == "1":
        raise ImportError(message + "To run without them, unset PYDEQ_REQUIRE_KERNELS.")
    if not _missed_cuda:
        _missed_cuda = True
        warnings.warn(message + "PYDEQ_KERNELS=off silences this warning.", RuntimeWarning, stacklevel=2)


def cuda_driver() -> tuple[int, int] | None:
    """The newest version of CUDA that the NVIDIA driver supports; None without a driver."""
    version = ctypes.c_int(0)
    try:
        # It does not start CUDA: a process may still fork after it.
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def compiled_solve(name: str) -> Callable[..., int]:
    """The C function of this name of :mod:`pydeq.ops.compiled_loop`.

    Raises:
        RuntimeError: If there are no CPU kernels.
    """
    if _library is None:
        raise RuntimeError(f"CompiledSolve needs pydeq's compiled kernels, and there are none ({_cpu_reason})")
    return _library.compiled_solves[name]


def forget_views(loop: Loop) -> None:
    """Free what a solve of :mod:`pydeq.ops.compiled_loop` keeps for the next one."""
    if _library is not None and loop.views:
        _library.forget_views(loop.views)


def trust_region_search() -> Callable[..., int] | None:
    """The kernel of :class:`pydeq.ops.trust_region_search.TrustRegionSearch`; None without CPU kernels."""
    return None if _library is None else _library.search_trust_region


def await_report(address: int, steps: int, stream: int, device: int, idle: bool) -> int:
    """Wait until ``steps`` steps have reported at ``address``; return how many samples run.

    Args:
        stream, device: The stream and the device of the steps; checked for errors from time to time, never waited for.
        idle: Whether the device has nothing to do after these steps: then the wait does not sleep.

    Raises:
        RuntimeError: If the stream has an error, or has finished all its work without this report.
    """
    assert _library is not None and _cuda_library is not None, "only where CUDA kernels run"  # noqa: PT018
    return check_report(
        _library.await_report(address, steps, _cuda_library.query_stream, stream, device, idle),
        steps,
        _cuda_library.describe_error,
    )


def check_report(answer: int, steps: int, describe: Callable[[int], str]) -> int:
    """Return a wait's answer, or raise its failure; ``describe`` explains the code of an error."""
    if answer >= 0:
        return answer
    if answer == Answer.LOST:
        raise RuntimeError(f"step {steps - 1} never reported, and the stream has nothing left to do")
    error = describe(Answer.FAILED - answer)
    raise RuntimeError(
        f"the GPU failed while step {steps - 1} of a solve, or fn, was running: {error}. To find the"
        " kernel, run with CUDA_LAUNCH_BLOCKING=1 or under compute-sanitizer"
    )


def has_reported(address: int, steps: int) -> bool:
    """Whether ``steps`` steps have reported at ``address``."""
    return _library is not None and _library.has_reported(address, steps)


def allocate_pinned(size: int) -> int:
    """Allocate ``size`` bytes of host memory that every GPU can write to; return the address. It is never freed.

    Raises:
        RuntimeError: If there is no such memory, or there are no CUDA kernels.
    """
    if _cuda_library is None:
        raise RuntimeError(f"there are no CUDA kernels to report there: {_cuda_reason}")
    return _cuda_library.allocate_pinned(size)


def select_instruction_set(name: str) -> None:
    """Run the CPU kernels compiled for ``name`` from now on; for tests and timings. Do not call it while an operation
    runs.

    Raises:
        RuntimeError: If no compiled kernels are loaded.
        ValueError: If ``name`` was not compiled or this CPU lacks it.
    """
    if _library is None:
        raise RuntimeError(f"there are no compiled kernels to choose from: {_cpu_reason}")
    _library.select_instruction_set(name)


def select_cuda_path(name: str) -> None:
    """Use this path for steps on a GPU from now on; for tests and timings. All paths give the same bits.

    Args:
        name: "block" is one launch, with a block of threads for each sample; "cluster" one launch, with up to 8 blocks
            for each sample, on GPUs from 9.0 on; "split" two launches, with a block for each tile of a sample. One
            launch is used only if its data of a sample fits in shared memory; otherwise there are two. "auto" chooses
            by the GPU's multiprocessors, the batch and the state.

    Raises:
        ValueError: If there is no such path.
    """
    global _cuda_path
    names = [path.name.lower() for path in CudaPath]
    if name not in names:
        raise ValueError(f"expected a path of steps on a GPU ({', '.join(names)}), got {name!r}")
    _cuda_path = CudaPath[name.upper()]
    if _cuda_library is not None:
        _cuda_library.select_path(_cuda_path)


def advise_huge_pages(address: int, size: int) -> None:
    """Ask the system for huge pages behind ``size`` bytes of fresh memory; does nothing without compiled kernels."""
    if _library is not None:
        _library.advise_huge_pages(address, size)


def supported_instruction_sets() -> tuple[str, ...]:
    """The compiled instruction sets that this CPU has, from the most basic to the best."""
    return _library.supported_instruction_sets if _library else ()


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _why_missing(error: OSError) -> str:
    if (_PACKAGE / CPU).exists():
        return f"{_PACKAGE / CPU} does not load: {error}"
    if (_PACKAGE / "no_kernels.txt").exists():  # written by the install
        return (_PACKAGE / "no_kernels.txt").read_text().strip()
    return f"no library {CPU} in {_PACKAGE}: was this source folder built?"
