"""The two libraries of compiled kernels and their C functions, called by ctypes, which releases the GIL during a call.

Their operations register themselves with torch when a library is loaded. They hold no Python symbol, so that the same
files serve every Python version. A call of a C function costs less than half of an operation's dispatch, and no
dispatch mode sees it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch  # before a library is loaded: it finds torch's symbols only where torch is loaded already

from pydeq.ops.constants import Answer
from pydeq.ops.interface import differences

CPU = "libpydeq_cpu.so"
CUDA = "libpydeq_cuda.so"
_PENDING = int(Answer.PENDING)


class StaleLibraryError(ImportError):
    """A library was built from other sources than the package that loads it."""


class CpuLibrary:
    """The CPU kernels, and what the loop needs of the host.

    Args:
        path: The file.
        interface: The interface of this package, see ``pydeq/ops/interface.py``.

    Raises:
        OSError: If it does not load.
        StaleLibraryError: If it does not agree.
    """

    def __init__(self, path: Path, interface: str) -> None:
        library = _load(path, interface)
        self.instruction_sets = tuple(_text(library, "pydeq_instruction_sets").split())
        """The compiled ones, from the plainest to the best."""
        supports = _function(library, "pydeq_supports_instruction_set", c_bool, c_int)
        self.supported_instruction_sets = tuple(
            name for index, name in enumerate(self.instruction_sets) if supports(index)
        )
        """Those of them that this CPU has."""
        self.cuda_version = _text(library, "pydeq_cuda_version")
        """Of the CUDA kernels that were built along; empty where there are none."""
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

    def instruction_set(self) -> str:
        """The one whose kernels run."""
        return self.instruction_sets[self._active()]

    def select_instruction_set(self, name: str) -> None:
        """Run the kernels of another one from now on.

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
            query: The address of a C function of ``stream`` and ``device`` that says how the stream is.
            idle: Whether the device has nothing to do after these steps: then the wait takes no naps.

        Returns:
            How many samples run; or a number of ``pydeq.ops.constants.Answer`` where they will never report.
        """
        # The wait returns now and then, and Python handles signals before the next one.
        while (answer := self._await(progress, steps, query, stream, device, idle)) == _PENDING:
            pass
        return answer


class CudaLibrary:
    """The CUDA kernels, and what the loop needs of a device; arguments and errors as for ``CpuLibrary``."""

    def __init__(self, path: Path, interface: str) -> None:
        library = _load(path, interface)
        self.cuda_version = _text(library, "pydeq_cuda_version")
        self.cuda_archs = _text(library, "pydeq_cuda_archs")
        self.query_stream = ctypes.cast(library.pydeq_query_stream, c_void_p).value
        """The address of the function that ``CpuLibrary.await_report`` asks how a stream is."""
        self._describe = _function(library, "pydeq_describe_error", c_char_p, c_int)
        self.select_path = _function(library, "pydeq_select_cuda_path", None, c_int)
        """Take steps by this ``pydeq.ops.constants.CudaPath`` from now on."""
        self._allocate = _function(library, "pydeq_allocate_pinned", c_int, c_size_t, ctypes.POINTER(c_void_p))

    def describe_error(self, code: int) -> str:
        """Explain the code of an error."""
        return self._describe(code).decode()

    def allocate_pinned(self, size: int) -> int:
        """The address of ``size`` bytes of host memory that every device can write to; they are never freed.

        Raises:
            RuntimeError: If there are none.
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
        raise StaleLibraryError(
            f"{path} was built from other sources than this pydeq (different: {', '.join(changed)}). Build it again,"
            " in pydeq's source folder, by python setup.py build_ext --inplace, or by pip install --no-build-isolation"
            " --no-deps --force-reinstall . or run the plain-torch references with PYDEQ_KERNELS=off"
        )
    return library


def _function(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    return function


def _text(library: ctypes.CDLL, name: str) -> str:
    return _function(library, name, c_char_p)().decode()
