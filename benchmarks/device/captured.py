"""Solves in a CUDA graph, replayed: their time if the host did nothing.

<solver> elementwise   a solve of STEPS steps on the map that overhead is measured on
<solver> dense         the same on a small cell, z -> tanh(z weight + x)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.device import maps
from benchmarks.device.clock import capture, finished, median
from benchmarks.device.worker import Case, Row
from benchmarks.peers.base import METHODS, Method
from benchmarks.timing import Map

KINDS = ("dense", "elementwise")


def cases() -> list[Case]:
    return [
        maps.environment(),
        *(Case(f"{m.solver} {kind}", lambda m=m, k=kind: replayed(m, k)) for kind in KINDS for m in METHODS),
    ]


def replayed(method: Method, kind: str) -> Iterator[Row]:
    for batch, dim in maps.SOLVED if kind == "dense" else maps.SHAPES:
        fn, z0 = maps.on_device(batch, dim)
        if kind == "dense":
            fn = maps.dense_map(*maps.dense(batch, dim))
        yield {"shape": [batch, dim], **row(fn, z0, method)}


def row(fn: Map, z0: Tensor, method: Method) -> Row:
    """Times of a solve of ``CALLS`` calls and of as many calls of ``fn``, with the host and without.

    Raises:
        ArithmeticError: If a replay gives other bits than the solve.
    """
    solver = maps.solver_of(method, maps.CALLS)

    def solve() -> Tensor:
        image = maps.run_all(fn, z0, solver, maps.CALLS).image
        assert isinstance(image, Tensor)
        return image

    graph, alone = capture(solve), capture(lambda: maps.repeat(fn, z0, maps.CALLS))
    eager = median(finished(solve), 7)
    without_host, f = graph.seconds(), alone.seconds()
    if not torch.equal(graph.result, solve()):
        raise ArithmeticError(f"a replay of {method.solver} gives other bits than a solve")
    return {
        "eager ms": eager * 1e3,
        "replayed ms": without_host * 1e3,
        "eager / replayed": eager / without_host,
        "f replayed ms": f * 1e3,
        "us per iteration without host": (without_host - f) / maps.CALLS * 1e6,
        "nodes": graph.nodes,
    }
