"""The two libraries of compiled kernels and their C functions, called by ctypes, which releases the GIL during a call.

When a library is loaded, its operations register themselves with torch. The libraries use no Python symbol, so that the
same files serve every Python version. A call of a C function costs less than half of an operation's dispatch, and
dispatch modes do not see it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_bool, c_char_p, c_double, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch  # before a library is loaded: it finds torch's symbols only if torch is loaded already

from pydeq.ops.compiled_loop import SOLVERS, Loop
from pydeq.ops.constants import Answer
from pydeq.ops.interface import differences

CPU = "libpydeq_cpu.so"
CUDA = "libpydeq_cuda.so"
_PENDING = int(Answer.PENDING)
_STALE = (
    "{} was built from other sources than this pydeq (different: {}). Build it again, in pydeq's source folder, by"
    " python setup.py build_ext --inplace, or by pip install --no-build-isolation --no-deps --force-reinstall . or run"
    " the plain-torch references with PYDEQ_KERNELS=off"
)


class StaleLibraryError(ImportError):
    """A library was built from other sources than the package that loads it."""


class CpuLibrary:
    """The CPU kernels, and the host functions that the solver loop needs.

    Args:
        path: The file.
        interface: The interface of this package, see ``pydeq/ops/interface.py``.

    Raises:
        OSError: If it does not load.
        StaleLibraryError: If its interface does not agree.
    """

    def __init__(self, path: Path, interface: str) -> None:
        library = _load(path, interface)
        try:
            self._find_functions(library)
        except AttributeError as error:  # functions that the interface does not name
            raise StaleLibraryError(_STALE.format(path, "the functions of the library")) from error

    def _find_functions(self, library: ctypes.CDLL) -> None:
        self.instruction_sets = tuple(_text(library, "pydeq_instruction_sets").split())
        """The compiled instruction sets, from the most basic to the best."""
        supports = _function(library, "pydeq_supports_instruction_set", c_bool, c_int)
        self.supported_instruction_sets = tuple(
            name for index, name in enumerate(self.instruction_sets) if supports(index)
        )
        """The compiled instruction sets that this CPU has."""
        self.cuda_version = _text(library, "pydeq_cuda_version")
        """The version of CUDA of the CUDA kernels from the same build; empty if there are none."""
        self.cuda_archs = _text(library, "pydeq_cuda_archs")
        self.cuda_reason = _text(library, "pydeq_cuda_reason")
        """Why there are no CUDA kernels."""
        self._active = _function(library, "pydeq_instruction_set", c_int)
        self._select = _function(library, "pydeq_select_instruction_set", None, c_int)
        self._await = _function(
            library, "pydeq_await_report", c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int, c_bool
        )
        self.has_reported = _function(library, "pydeq_has_reported", c_bool, c_void_p, c_int64)
        self.advise_huge_pages = _function(library, "pydeq_advise_huge_pages", None, c_void_p, c_size_t)
        self.search_trust_region = _function(
            library, "pydeq_search_trust_region", c_int64, c_int64, *[c_void_p] * 12, c_int64, c_int64, c_int64,
            c_double, c_bool, c_bool,
        )  # fmt: skip
        """See :meth:`pydeq.ops.trust_region_search.TrustRegionSearch.advance`."""
        self.compiled_solves = {
            name: _function(library, name, c_int64, ctypes.POINTER(Loop), *own) for name, own in SOLVERS.items()
        }
        """See :mod:`pydeq.ops.compiled_loop`."""
        self.forget_views = _function(library, "pydeq_forget_views", None, c_void_p)
        """Free ``Loop.views``."""

    def instruction_set(self) -> str:
        """The instruction set of the kernels that run."""
        return self.instruction_sets[self._active()]

    def select_instruction_set(self, name: str) -> None:
        """Run the kernels of another instruction set from now on.

        Raises:
            ValueError: If it was not compiled or this CPU lacks it.
        """
        if name not in self.supported_instruction_sets:
            raise ValueError(
                f"expected an instruction set that is compiled ({', '.join(self.instruction_sets)}) and that this CPU"
                f" has ({', '.join(self.supported_instruction_sets)}), got {name!r}"
            )
        self._select(self.instruction_sets.index(name))

    def await_report(self, progress: int, steps: int, query: int | None, stream: int, device: int, idle: bool) -> int:
        """Wait until ``steps`` steps have reported at the address ``progress``.

        Args:
            query: The address of a C function of ``stream`` and ``device`` that returns the state of the stream.
            idle: Whether the device has nothing to do after these steps: then the wait does not sleep.

        Returns:
            The number of running samples; or a value of ``pydeq.ops.constants.Answer`` if the steps will never report.
        """
        # The wait returns from time to time. Python handles signals before the next wait.
        while (answer := self._await(progress, steps, query, stream, device, idle)) == _PENDING:
            pass
        return answer


class CudaLibrary:
    """The CUDA kernels, and the device functions that the loop needs; arguments and errors as in ``CpuLibrary``."""

    def __init__(self, path: Path, interface: str) -> None:
        library = _load(path, interface)
        self.cuda_version = _text(library, "pydeq_cuda_version")
        self.cuda_archs = _text(library, "pydeq_cuda_archs")
        self.query_stream = ctypes.cast(library.pydeq_query_stream, c_void_p).value
        """The address of the function that tells ``CpuLibrary.await_report`` the state of a stream."""
        self._describe = _function(library, "pydeq_describe_error", c_char_p, c_int)
        self.select_path = _function(library, "pydeq_select_cuda_path", None, c_int)
        """Take steps by this ``pydeq.ops.constants.CudaPath`` from now on."""
        self._allocate = _function(library, "pydeq_allocate_pinned", c_int, c_size_t, ctypes.POINTER(c_void_p))

    def describe_error(self, code: int) -> str:
        """Explain the code of an error."""
        return self._describe(code).decode()

    def allocate_pinned(self, size: int) -> int:
        """Allocate ``size`` bytes of host memory that every device can write to; return the address. It is never freed.

        Raises:
            RuntimeError: If there is no such memory.
        """
        memory = c_void_p()
        code = self._allocate(size, ctypes.byref(memory))
        if code or not memory.value:
            raise RuntimeError(f"no pinned memory for the progress of solves: {self.describe_error(code)}")
        return memory.value


def _load(path: Path, interface: str) -> ctypes.CDLL:
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise OSError(str(error.__cause__ or error)) from error
    library = ctypes.CDLL(str(path))
    try:
        changed = differences(_text(library, "pydeq_interface"), interface)
    except AttributeError:
        changed = ["the functions of the library"]
    if changed:
        raise StaleLibraryError(_STALE.format(path, ", ".join(changed)))
    return library


def _function(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    return function


def _text(library: ctypes.CDLL, name: str) -> str:
    return _function(library, name, c_char_p)().decode()
