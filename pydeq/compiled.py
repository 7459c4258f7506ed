"""The compiled kernels: loading them, saying what runs, and what to do where there are none.

Environment:

    PYDEQ_KERNELS=off         run the plain-torch references, without a warning
    PYDEQ_REQUIRE_KERNELS=1   missing kernels are an ImportError, not a warning
    PYDEQ_ISA=avx2            run the kernels compiled for this instruction set, not the best this CPU has
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import platform
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch  # before the library: it finds torch's symbols only where torch is loaded already

_PACKAGE = Path(__file__).parent

_library: ModuleType | None = None
_cpu_reason = "not loaded yet"


@dataclass(frozen=True)
class Kernels:
    """What runs: which compiled kernels are loaded, and the versions they stand on."""

    cpu: bool
    """Whether compiled CPU kernels are loaded; the plain-torch references run otherwise."""
    cpu_reason: str
    """Why there are no CPU kernels; empty where there are."""
    instruction_set: str | None
    """The instruction set whose CPU kernels run."""
    instruction_sets: tuple[str, ...]
    """The instruction sets that CPU kernels were compiled for, from the plainest to the best."""
    cuda: bool
    """Whether compiled CUDA kernels are loaded."""
    cuda_reason: str
    """Why there are no CUDA kernels; empty where there are."""
    cuda_archs: tuple[str, ...]
    """The GPU architectures that CUDA kernels were compiled for."""
    pydeq: str
    """The version of pydeq."""
    torch: str
    """The version of torch that runs."""
    torch_built: str | None
    """The version of torch whose headers the kernels were compiled against."""
    abi_target: str | None
    """The oldest torch whose stable ABI the kernels use: they run with every torch from there on."""
    compiler: str | None
    """The C++ compiler of the CPU kernels."""

    def __str__(self) -> str:
        sets = f"{self.instruction_set} (compiled: {', '.join(self.instruction_sets)})"
        built = f" (kernels compiled with {self.torch_built}, for {self.abi_target} and later)"
        rows = {
            "pydeq": self.pydeq,
            "CPU kernels": sets if self.cpu else f"none, the references run: {self.cpu_reason}",
            "CUDA kernels": ", ".join(self.cuda_archs) if self.cuda else f"none: {self.cuda_reason}",
            "torch": self.torch + (built if self.cpu else ""),
            "compiler": self.compiler or "none",
        }
        return "\n".join(f"{name:<14}{value}" for name, value in rows.items())


def kernels() -> Kernels:
    """Say which kernels are loaded, for which instruction set and torch, and why others are not."""
    return Kernels(
        cpu=_library is not None,
        cpu_reason=_cpu_reason,
        instruction_set=_library.instruction_set() if _library else None,
        instruction_sets=_library.instruction_sets if _library else (),
        cuda=False,
        cuda_reason="this build of pydeq has no CUDA kernels",
        cuda_archs=(),
        pydeq=version("pydeq"),
        torch=str(torch.__version__),
        torch_built=_library.torch_built if _library else None,
        abi_target=_library.abi_target if _library else None,
        compiler=_library.compiler if _library else None,
    )


def load() -> None:
    """Load the compiled kernels, which register themselves with torch. The schemas must be defined by now.

    Raises:
        ImportError: If there are none and PYDEQ_REQUIRE_KERNELS=1.
        ValueError: If PYDEQ_KERNELS or PYDEQ_ISA names something that does not exist here.
    """
    global _library, _cpu_reason
    switch = os.environ.get("PYDEQ_KERNELS", "on")
    if switch not in ("on", "off"):
        raise ValueError(f"PYDEQ_KERNELS must be on or off, got {switch!r}")
    required = os.environ.get("PYDEQ_REQUIRE_KERNELS") == "1"
    if switch == "off":
        if required:
            raise ImportError("PYDEQ_KERNELS=off contradicts PYDEQ_REQUIRE_KERNELS=1: unset one of them")
        _cpu_reason = "PYDEQ_KERNELS=off"
        return
    try:
        _library = importlib.import_module("pydeq._C")
    except ImportError as error:
        _cpu_reason = _why_missing(error)
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


def select_instruction_set(name: str) -> None:
    """Run the CPU kernels compiled for ``name`` from now on; for tests and timings. Not while an operation runs.

    Raises:
        RuntimeError: If no compiled kernels are loaded.
        ValueError: If ``name`` was not compiled or this CPU lacks it.
    """
    if _library is None:
        raise RuntimeError(f"there are no compiled kernels to choose from: {_cpu_reason}")
    _library.select_instruction_set(name)


def advise_huge_pages(address: int, size: int) -> None:
    """Ask the system for huge pages behind ``size`` bytes of fresh memory; does nothing without compiled kernels."""
    if _library is not None:
        _library.advise_huge_pages(address, size)


def supported_instruction_sets() -> tuple[str, ...]:
    """The compiled instruction sets that this CPU has, from the plainest to the best."""
    return _library.supported_instruction_sets if _library else ()


def _why_missing(error: ImportError) -> str:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if (_PACKAGE / f"_C{suffix}").exists():
            return f"{_PACKAGE / f'_C{suffix}'} does not load: {error}"
    if (_PACKAGE / "no_kernels.txt").exists():  # written by the install
        return (_PACKAGE / "no_kernels.txt").read_text().strip()
    for other in sorted(_PACKAGE.glob("_C.*.so")):
        return f"{other.name} is there, which Python {platform.python_version()} cannot load"
    return f"no library _C{importlib.machinery.EXTENSION_SUFFIXES[0]} in {_PACKAGE}: was this source folder built?"
