"""Times and counts of work on the device."""

from __future__ import annotations

import ctypes
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

DEVICE = torch.device("cuda")
# Their names in csrc/cuda/step.cuh.
STEP_KERNEL = re.compile("step_(fused|reduce|apply)_kernel")
ROUNDS = 7  # of a replay; the first ones are not counted
UNCOUNTED = 2

Work = Callable[[], Any]


def is_broken() -> bool:
    """Whether a kernel has faulted, after which nothing runs on a GPU in this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def finished(work: Work) -> Callable[[], float]:
    """A function that measures the seconds until the device is done with ``work``."""

    def measure() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    return measure


def returned(work: Work) -> Callable[[], float]:
    """A function that measures the seconds until ``work`` returns: the host's part. Before that the device is idle."""

    def measure() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return measure


def median(measure: Callable[[], float], repeats: int, warmup: int = 3) -> float:
    """The median of ``repeats`` measurements, after some that are not counted."""
    return statistics.median([measure() for _ in range(warmup + repeats)][warmup:])


@dataclass(frozen=True)
class Captured:
    """Work in a CUDA graph.

    Args:
        graph: Replays it.
        result: What the work returned while it was captured; a replay writes its tensors again.
        nodes: Kernels and copies in the graph; None if the driver cannot be asked.
    """

    graph: torch.cuda.CUDAGraph
    result: Any
    nodes: int | None

    def seconds(self) -> float:
        """The time of a replay on the device; the median of several."""
        return median(self._replay, ROUNDS - UNCOUNTED, UNCOUNTED)

    def _replay(self) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3


def capture(work: Work, repeats: int = 1) -> Captured:
    """Capture ``repeats`` calls of ``work`` into one graph, after one that is not captured."""
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    result = None
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            result = work()
    return Captured(graph, result, _count_nodes(graph))


def _count_nodes(graph: torch.cuda.CUDAGraph) -> int | None:
    count = ctypes.c_size_t(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        status = driver.cuGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
    except (OSError, AttributeError, RuntimeError):
        return None
    return None if status else count.value


def replay_seconds(work: Work, repeats: int) -> float:
    """Seconds of ``work`` on the device, from a graph of ``repeats``, without the host's part."""
    return capture(work, repeats).seconds() / repeats


def count(work: Work) -> dict[str, int]:
    """Counts while ``work`` runs: kernels, kernels of pydeq's steps, waits of the host, copies to it, allocations."""
    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        work()
    names = [event.name for event in recorded.events() or ()]
    return {
        "kernels": sum("LaunchKernel" in name for name in names),
        "step kernels": sum(bool(STEP_KERNEL.search(name)) for name in names),
        "waits": sum("StreamSynchronize" in name or "EventSynchronize" in name for name in names),
        "copies to host": sum("DtoH" in name for name in names),
        "allocations": sum("cudaMalloc" in name for name in names),
    }
