"""The sizes and maps that stages share, and the row about the machine that starts every stage."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import pydeq
from benchmarks.device.clock import DEVICE
from benchmarks.device.worker import Case, Row
from benchmarks.peers.base import Method, Peer
from benchmarks.timing import Map
from pydeq.solvers import Solver

STEPS = 30
CALLS = STEPS + 1  # the last one measures the residual of the last step
# The states of a batch take 64 KB, 1 MB, 2 MB, 4 MB (with few and with many samples) and 32 MB.
SHAPES = ((32, 512), (32, 8192), (8, 65536), (8, 131072), (128, 8192), (32, 262144))
# Forward solves, to this tolerance in at most this number of calls; and training steps.
SOLVED, RTOL, CAP = ((32, 128), (32, 512), (128, 1024)), 1e-4, 60
TRAINED = ((64, 256), (256, 1024))


def load_peers() -> dict[str, Peer]:
    """The peers that can be imported here."""
    found: dict[str, Peer] = {}
    for name in ("pydeq", "torchdeq"):
        try:
            found[name] = importlib.import_module(f"benchmarks.peers.{name}").PEER
        except ImportError as error:
            print(f"{name} is not compared: {error}")
    return found


def environment() -> Case:
    """The machine and the versions; every stage begins with it."""

    def run() -> Iterator[Row]:
        properties = torch.cuda.get_device_properties(0)
        yield {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory GiB": round(properties.total_memory / 2**30, 1),
            "torch": str(torch.__version__),
            "python": sys.version.split()[0],
            "peers": list(load_peers()),
            "kernels": dataclasses.asdict(pydeq.kernels()),
        }

    return Case("environment", run)


def elementwise(batch: int, dim: int) -> tuple[Tensor, Tensor]:
    """Slopes, [D], and x, [B, D], of the map of benchmarks.problems.maps.elementwise, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    slopes = torch.empty(dim).uniform_(-0.999, 0.999, generator=generator)
    return slopes, 0.01 * torch.randn(batch, dim, generator=generator)


def on_device(batch: int, dim: int) -> tuple[Map, Tensor]:
    """The map z -> tanh(slopes z + x), and a start."""
    slopes, x = (part.to(DEVICE) for part in elementwise(batch, dim))
    return lambda z: torch.addcmul(x, slopes, z).tanh_(), torch.zeros_like(x)


def dense(batch: int, dim: int) -> tuple[Tensor, Tensor]:
    """The weight, [D, D], and x, [B, D], of a small cell z -> tanh(z weight + x), on the CPU."""
    weight = 0.8 / dim**0.5 * torch.randn(dim, dim, generator=torch.Generator().manual_seed(0))
    return weight, torch.randn(batch, dim, generator=torch.Generator().manual_seed(1))


def dense_map(weight: Tensor, x: Tensor) -> Map:
    weight, x = weight.to(DEVICE), x.to(DEVICE)
    return lambda z: torch.tanh(torch.addmm(x, z, weight))


def repeat(fn: Map, z: Tensor, calls: int) -> None:
    """Call ``fn`` on ``z``, ``calls`` times."""
    with torch.no_grad():
        for _ in range(calls):
            fn(z)


def solver_of(method: Method, calls: int) -> Solver:
    """pydeq's solver for a method; Broyden's memory holds every step of that number of calls."""
    if method.solver == "picard":
        return pydeq.Picard()
    if method.solver == "anderson":
        return pydeq.Anderson(memory=method.memory or 5)
    return pydeq.Broyden(memory=max(1, calls - 1))


def run_all(fn: Map, z0: Tensor, solver: Solver, calls: int) -> pydeq.Solution:
    """pydeq's solve of exactly ``calls`` calls.

    Freezing is on: without it the solve waits for each step. No sample is ever done here.
    """
    return pydeq.fixed_point(fn, z0, solver=solver, rtol=0.0, max_steps=calls, stall=False)


def run(peer: Peer, fn: Map, z0: Tensor, method: Method, calls: int) -> None:
    """A solve by ``peer`` of exactly ``calls`` calls."""
    if peer.name == "pydeq":
        run_all(fn, z0, solver_of(method, calls), calls)
    else:
        peer.run(fn, z0, method, calls)
