"""Timing two sides fairly, and functions that watch how they are called.

A machine slows down and speeds up while a benchmark runs. So the sides alternate, in an order that flips every round.
The result is the median with its quartiles.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float
    samples: int

    def scaled(self, factor: float) -> Spread:
        return Spread(self.median * factor, self.low * factor, self.high * factor, self.samples)


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of ``values``, at least one."""
    ordered = sorted(values)
    if len(ordered) == 1:
        return Spread(ordered[0], ordered[0], ordered[0], 1)
    low, median, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return Spread(median, low, high, len(ordered))


def alternate(
    sides: Mapping[str, Callable[[], float]],
    repeats: int,
    warmup: int = 1,
    seconds: float = math.inf,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Call the sides alternately.

    Args:
        sides: By name, functions that do the work and return their measurement.
        repeats: Measurements to keep of each side, at least 1.
        warmup: Rounds to discard first.
        seconds: After this time, three measurements of each side are enough.
        tick: Called after every round.

    Returns:
        The measurements by name, in the order in which they were taken.
    """
    measured: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides.items())
    with collected():
        start = time.perf_counter()
        for turn in range(warmup + repeats):
            if turn >= warmup + 3 and time.perf_counter() - start > seconds:
                break
            for name, side in order if turn % 2 == 0 else reversed(order):
                value = side()
                if turn >= warmup:
                    measured[name].append(value)
            tick()
    return measured


@contextmanager
def collected() -> Iterator[None]:
    """Collect garbage first, and not during what is timed."""
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """The ratio of the medians, with the quartiles of the ratios of neighbouring measurements."""
    paired = spread([a / b for a, b in zip(numerators, denominators, strict=True)])
    ratio = statistics.median(numerators) / statistics.median(denominators)
    return Spread(ratio, min(paired.low, ratio), max(paired.high, ratio), paired.samples)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch on ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_core() -> Iterator[None]:
    """Run this thread, and those that it starts, on one core: JAX's threads cannot be limited otherwise.

    Does nothing where the system has no affinities.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Timed:
    """A map that sums the time spent inside itself, in seconds, and counts its calls."""

    def __init__(self, fn: Map) -> None:
        self.fn, self.calls, self.seconds = fn, 0, 0.0

    def __call__(self, z: Tensor) -> Tensor:
        start = time.perf_counter()
        result = self.fn(z)
        self.seconds += time.perf_counter() - start
        self.calls += 1
        return result


class WatchedCell:
    """A cell(z, x) that counts its calls, and the products with its Jacobian from the left.

    A product is counted when a gradient reaches z, also in the pass that forms the gradients of the parameters.
    """

    def __init__(self, cell: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.cell, self.calls, self.products = cell, 0, 0

    def __call__(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        if z.requires_grad:
            z = z.view_as(z)  # each call of its own, and none after another
            z.register_hook(self._count)
        return self.cell(z, x)

    def _count(self, gradient: Tensor) -> None:
        self.products += 1


class Counted:
    """A map that counts its calls: the one count of evaluations that treats every library alike."""

    def __init__(self, fn: Map) -> None:
        self.fn, self.calls = fn, 0

    def __call__(self, z: Tensor) -> Tensor:
        self.calls += 1
        return self.fn(z)


class Recorded:
    """A map that keeps the relative residuals of its calls, and when they were known.

    Attributes:
        residuals: ||f(z) - z|| / ||f(z)|| of each call, [B].
        seconds: The time from the start to the end of each call, without the time that recording took.
    """

    def __init__(self, fn: Map) -> None:
        self.fn = fn
        self.start()

    def start(self) -> None:
        """Forget all calls, and start to measure time."""
        self.residuals: list[Tensor] = []
        self.seconds: list[float] = []
        self._begin = time.perf_counter()

    def __call__(self, z: Tensor) -> Tensor:
        result = self.fn(z)
        end = time.perf_counter()
        self.seconds.append(end - self._begin)
        self.residuals.append(relative_residual(z, result))
        self._begin += time.perf_counter() - end
        return result


def relative_residual(z: Tensor, image: Tensor) -> Tensor:
    """||image - z|| / ||image|| of each sample, [B] in float64; 0 for 0/0."""
    z, image = z.detach().flatten(1).double(), image.detach().flatten(1).double()
    return ((image - z).norm(dim=1) / image.norm(dim=1)).nan_to_num(0.0)
