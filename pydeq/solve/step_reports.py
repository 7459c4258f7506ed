"""Reports of a solver's steps, which the loop reads without waiting for the device.

A step writes a report, (steps done, samples running, samples far from their tolerance), to host memory when it ends:
``progress``, int64 [len(Progress)]. On the CPU, and if a reference runs, the report is complete when the step returns.
A CUDA kernel writes it later, into pinned memory, while the host continues. Before the loop calls fn for step k + 1, it
waits for the report of step k - 1, so one step is always under way. If no sample was far from its tolerance in that
report, step k may be the last one. Then the loop waits for the report of step k, too: a call of fn costs more than the
device's idle time between the report and the next launch. The loop also waits for the first step, which is the last one
if z0 is already a solution. So a solve rarely calls fn once more than needed, and never more often. The number of calls
is the same in every run on the same input.

Two reports of a solve can be under way at once, so it has two places and alternates between them: a place is written
again only after it was read. Places come from a pool, and return to it once the last step of their solve has reported.
After an exception, launched steps of the solve still write their reports.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pydeq.ops import kernels
from pydeq.ops.capture import capturing
from pydeq.ops.constants import RUNNING, Counter, Progress

# Reports under way at once, and the bytes of one solve's places: a cache line, so that solves do not share one.
_TURNS, _BYTES = 2, 64
_BLOCK = 64  # solves for which places are allocated at once: a page of memory
# A place's memory, read as a ctypes array: its entries are Python ints, and NumPy's arrays take longer.
_SIZE = len(Progress)
_Entries = ctypes.c_int64 * _SIZE
_STEP, _RUNNING = int(Progress.STEP), int(Progress.RUNNING)


class Reports(ABC):
    """The reports of one solve; a context manager, not to be used after its end."""

    @abstractmethod
    def place(self, k: int) -> Tensor:
        """The place for the report of step ``k``, which is launched next; int64 [len(Progress)] on the CPU."""

    @abstractmethod
    def running(self, k: int) -> int:
        """The number of running samples before step ``k``, from the newest report that has come."""

    def staggered(self, exhausted: bool = False) -> bool:
        """Whether some samples were done before the last step while others still ran.

        Args:
            exhausted: Whether the solve took all its steps. The last step may not have reported yet;
                then the result is True, to be safe.
        """
        return self._staggered

    _staggered = False

    @abstractmethod
    def woken(self, k: int) -> int:
        """The number of running samples after step ``k`` has looked back."""

    def resume(self, k: int) -> None:  # noqa: B027  # most have nothing to do
        """Continue with step ``k``, although a step with this number has already reported. No steps are under way."""

    def close(self) -> None:  # noqa: B027  # most have nothing to do
        """End: no step follows."""

    def __enter__(self) -> Reports:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class HostReports(Reports):
    """Reports of steps that are complete when the step returns.

    Args:
        batch: Samples at the start.
        place: Where the steps report, int64 [len(Progress)] on the CPU.
    """

    def __init__(self, batch: int, place: Tensor) -> None:
        self._batch, self._place = batch, place
        self._values = _Entries.from_address(place.data_ptr())  # valid as long as ``place``
        self._values[_STEP] = 0

    def place(self, k: int) -> Tensor:
        return self._place

    def running(self, k: int) -> int:
        if k == 0:
            return self._batch
        running = self._after(k)
        self._staggered |= 0 < running < self._batch
        return running

    def woken(self, k: int) -> int:
        return self._after(k + 1)

    def _after(self, steps: int) -> int:
        """The number of running samples after ``steps`` steps."""
        if self._values[_STEP] != steps:
            raise RuntimeError(
                f"step {steps - 1} of the solver did not report: write a solver of your own as a pydeq.CustomSolver,"
                " whose steps do"
            )
        return self._values[_RUNNING]


class CapturedReports(Reports):
    """Reports of steps that are captured into a CUDA graph: every replay writes them, and nothing reads them.

    All graphs share one place, which lives as long as the process.
    """

    def __init__(self, batch: int, place: Tensor) -> None:
        self._batch, self._place = batch, place

    def place(self, k: int) -> Tensor:
        return self._place

    def running(self, k: int) -> int:
        return self._batch

    def staggered(self, exhausted: bool = False) -> bool:
        return self._batch > 1

    def woken(self, k: int) -> int:
        raise AssertionError("a captured solve takes all its steps")


class Stream(Protocol):
    """A device's queue of work."""

    def await_report(self, address: int, steps: int, idle: bool) -> int:
        """Wait until ``steps`` steps have reported at ``address``; return the number of running samples.

        Args:
            idle: Whether the device has nothing to do after these steps.

        Raises:
            RuntimeError: If the reports will never come.
        """
        ...


class StreamReports(Reports):
    """Reports of steps on a device, which arrive while the host continues.

    Args:
        batch: Samples at the start.
        pool: The source of places.
        stream: The stream that the steps run on.
        lag: Steps that may be under way when the next one is launched, 0 or 1.
    """

    def __init__(self, batch: int, pool: Pool, stream: Stream, lag: int) -> None:
        self._batch, self._pool, self._stream, self._lag = batch, pool, stream, lag
        self._slot = pool.take()
        self._launched = 0
        self._first = 0  # the first step whose report counts

    def place(self, k: int) -> Tensor:
        # Count the step before its launch: if the launch fails halfway, it may not report; the slot is then never
        # reused.
        self._launched = k + 1
        return self._slot.places[k % _TURNS]

    def running(self, k: int) -> int:
        if k == self._first:
            return self._batch
        if self._lag and k > 1:
            running, far = self._await(k - 1, idle=False)
            if running == 0 or far > 0:
                return running
        return self._await(k, idle=True)[0]

    def _await(self, steps: int, idle: bool) -> tuple[int, int]:
        """Wait for ``steps`` steps; return the number of running samples and of samples far from their tolerance."""
        turn = (steps - 1) % _TURNS
        running = self._stream.await_report(self._slot.addresses[turn], steps, idle)
        self._staggered |= 0 < running < self._batch
        return running, int(self._slot.values[turn, Progress.FAR])

    def staggered(self, exhausted: bool = False) -> bool:
        return self._staggered or (exhausted and self._batch > 1)

    def woken(self, k: int) -> int:
        return self._await(k + 1, idle=True)[0]

    def resume(self, k: int) -> None:
        # All steps have reported: nothing is written there until the next one.
        self._slot.clear()
        self._lag, self._first, self._launched = 0, k, 0

    def close(self) -> None:
        self._pool.give_back(self._slot, self._launched)


class Slot:
    """The places of one solve, in memory at ``address``."""

    def __init__(self, address: int) -> None:
        step = 8 * _SIZE
        self.addresses = [address + turn * step for turn in range(_TURNS)]
        memory = (ctypes.c_int64 * (_TURNS * _SIZE)).from_address(address)
        with torch.inference_mode(False):  # steps of every mode write there
            entries = torch.frombuffer(memory, dtype=torch.int64).view(_TURNS, _SIZE)
            self.places = tuple(entries.unbind())
        self.values = entries.numpy()

    def clear(self) -> None:
        self.values.fill(0)


class Pool:
    """Slots that are reused once the last step of their solve has reported. Threads may share a pool.

    Args:
        allocate: allocate(bytes) -> address of memory that lives as long as the process.
        has_reported: has_reported(address of a place, steps) -> whether that many steps have reported there.
    """

    def __init__(self, allocate: Callable[[int], int], has_reported: Callable[[int, int], bool]) -> None:
        self._allocate, self._has_reported = allocate, has_reported
        self._lock = threading.Lock()
        self._free: list[Slot] = []
        self._busy: deque[tuple[Slot, int]] = deque()  # each with the number of steps that must report

    def take(self) -> Slot:
        with self._lock:
            if not self._free:
                self._collect()
            if not self._free:
                address = self._allocate(_BLOCK * _BYTES)
                self._free = [Slot(address + i * _BYTES) for i in range(_BLOCK)]
            slot = self._free.pop()
        slot.clear()
        return slot

    def give_back(self, slot: Slot, launched: int) -> None:
        with self._lock:
            self._busy.append((slot, launched))

    def _collect(self) -> None:
        """Free the slots whose steps have all reported."""
        for _ in range(len(self._busy)):
            slot, launched = self._busy.popleft()
            if launched == 0 or self._has_reported(slot.addresses[(launched - 1) % _TURNS], launched):
                self._free.append(slot)
            else:
                self._busy.append((slot, launched))


class CudaStream:
    """torch's current stream of the current CUDA device."""

    def __init__(self) -> None:
        self._stream = torch.cuda.current_stream().cuda_stream
        self._device = torch.cuda.current_device()

    def await_report(self, address: int, steps: int, idle: bool) -> int:
        return kernels.await_report(address, steps, self._stream, self._device, idle)


def any_running(counters: Tensor) -> bool:
    """Whether a sample runs, by counters [B, len(Counter)]. Waits for the device; True while a graph is captured."""
    return capturing(counters.device) or bool((counters[:, Counter.STATUS] == RUNNING).any())


_pool: Pool | None = None
_sink: Tensor | None = None
_lock = threading.Lock()


def open_reports(device: torch.device, batch: int, place: Tensor, lag: int) -> Reports:
    """Open the reports of a solve on ``device`` that starts now.

    Args:
        batch: Samples at the start.
        place: Where steps report that have reported when they return, int64 [len(Progress)] on the CPU.
        lag: Steps that may be under way when the next one is launched, 0 or 1.
    """
    if device.type != "cuda" or batch == 0:  # without samples, no kernel runs
        return HostReports(batch, place)
    if not kernels.cuda_loaded():
        kernels.miss_cuda()
        return HostReports(batch, place)
    _check_device(torch.cuda.current_device() if device.index is None else device.index)
    with torch.cuda.device(device):
        if capturing(device):
            return CapturedReports(batch, _shared_sink())
        return StreamReports(batch, _shared_pool(), CudaStream(), lag)


@functools.cache
def _check_device(index: int) -> None:
    kernels.check_capability(
        torch.cuda.get_device_capability(index), f"cuda:{index}, {torch.cuda.get_device_name(index)},"
    )


def _shared_pool() -> Pool:
    global _pool
    with _lock:
        if _pool is None:
            _pool = Pool(kernels.allocate_pinned, kernels.has_reported)
        return _pool


def _shared_sink() -> Tensor:
    global _sink
    pool = _shared_pool()
    with _lock:
        if _sink is None:
            _sink = pool.take().places[0]
        return _sink
