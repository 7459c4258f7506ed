"""pydeq and its peers on the GPU, alternating in one process.

overhead <solver>   (time of a solve - time of as many calls of f) / calls, each waited for at its end
solve <solver>      a forward solve of a small cell, to a tolerance
training            a step of training a small DEQ: forward, backward, optimizer
<model>             a training step and an inference of a reference model
launches            kernels, waits and copies per iteration, counted by torch's profiler
optimistix          plain iteration and optimistix's, where JAX is: overhead, and a forward solve
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.device import maps
from benchmarks.device.clock import DEVICE, count, finished
from benchmarks.device.worker import Case, Row
from benchmarks.peers.base import METHODS, LayerSettings, Method, Peer
from benchmarks.timing import Map, alternate, ratios, relative_residual, spread

# torchdeq fills 62 vectors for Broyden's method.
LARGEST_BROYDEN = 1 << 21
COUNTED = ((32, 512), (8, 65536))
MODELS = ("mdeq_tiny", "transformer")  # keys in benchmarks/suites/models.py


def cases() -> list[Case]:
    peers = maps.load_peers()
    return [
        maps.environment(),
        *(Case(f"overhead {m.solver}", lambda m=m: overhead(peers, m)) for m in METHODS),
        *(Case(f"solve {m.solver}", lambda m=m: solve(peers, m)) for m in METHODS),
        Case("training", lambda: training(peers)),
        *(Case(key, lambda k=key: model(peers, k), 40.0) for key in MODELS),
        Case("launches", lambda: launches(peers)),
        Case("optimistix", lambda: optimistix(peers), 60.0),
    ]


def overhead(peers: dict[str, Peer], method: Method) -> Iterator[Row]:
    for batch, dim in maps.SHAPES:
        if method.solver == "broyden" and batch * dim > LARGEST_BROYDEN:
            continue
        fn, z0 = maps.on_device(batch, dim)
        sides = {
            name: finished(lambda p=peer: maps.run(p, fn, z0, method, maps.CALLS))  # noqa: B023
            for name, peer in peers.items()
        }
        sides["f"] = finished(lambda: maps.repeat(fn, z0, maps.CALLS))  # noqa: B023
        measured = alternate(sides, repeats=11, warmup=2, seconds=1.0)
        alone = spread(measured.pop("f")).median
        row: Row = {"shape": [batch, dim], "f us": alone / maps.CALLS * 1e6}
        for name, values in measured.items():
            row[f"{name} us"] = (spread(values).median - alone) / maps.CALLS * 1e6
        if "torchdeq us" in row and row["pydeq us"] > 0.0:
            row["torchdeq / pydeq"] = row["torchdeq us"] / row["pydeq us"]
        yield row


def solve(peers: dict[str, Peer], method: Method) -> Iterator[Row]:
    for batch, dim in maps.SOLVED:
        weight, x = maps.dense(batch, dim)
        fn, z0 = maps.dense_map(weight, x), torch.zeros(batch, dim, device=DEVICE)
        sides = {
            name: finished(lambda p=peer: p.solve(fn, z0, method, maps.RTOL, maps.CAP))  # noqa: B023
            for name, peer in peers.items()
        }
        yield {"shape": [batch, dim], **compare(alternate(sides, 15, 3, seconds=1.0))}


def compare(measured: dict[str, list[float]]) -> Row:
    """Milliseconds of each side, and the ratio of torchdeq's to pydeq's."""
    row: Row = {f"{name} ms": spread(values).median * 1e3 for name, values in measured.items()}
    if "torchdeq" in measured:
        row["torchdeq / pydeq"] = ratios(measured["torchdeq"], measured["pydeq"]).median
    return row


def training(peers: dict[str, Peer]) -> Iterator[Row]:
    for batch, dim in maps.TRAINED:
        settings = LayerSettings(METHODS[1], rtol=1e-3, max_calls=30, adjoint_rtol=1e-3, adjoint_max_calls=30)
        sides: dict[str, Callable[[], float]] = {}
        for name, peer in peers.items():
            torch.manual_seed(0)
            linear = torch.nn.Linear(dim, dim).to(DEVICE)
            with torch.no_grad():
                linear.weight.mul_(0.8)
            layer = peer.layer(lambda z, x, linear=linear: torch.tanh(linear(z) + x), settings)
            optimizer = torch.optim.SGD(linear.parameters(), lr=1e-3)
            x = torch.randn(batch, dim, device=DEVICE)

            def step(layer: Any = layer, optimizer: Any = optimizer, x: Tensor = x) -> None:
                optimizer.zero_grad()
                layer.solve(torch.zeros_like(x), x).square().mean().backward()
                optimizer.step()

            sides[name] = finished(step)
        yield {"shape": [batch, dim], **compare(alternate(sides, 15, 3, seconds=3.0))}


def model(peers: dict[str, Peer], key: str) -> Iterator[Row]:
    """A reference model with its own solves, and with solves by the other peers.

    Raises:
        ImportError: If a package is missing that the suites need.
    """
    from benchmarks.suites import models

    (case,) = (case for case in models.CASES if case.key == key)
    torch.manual_seed(0)
    made, loss = case.make(DEVICE)
    for what in ("train", "inference"):
        made.train(what == "train")

        def side(peer: Peer, what: str = what) -> Callable[[], float]:
            def step() -> None:
                with models.solved_by(peer, made):
                    models.step(made, loss, what)

            return finished(step)

        sides = {name: side(peer) for name, peer in peers.items()}
        yield {"what": what, **compare(alternate(sides, 9, 2, seconds=3.0))}


def launches(peers: dict[str, Peer]) -> Iterator[Row]:
    for name, peer in peers.items():
        for method in METHODS:
            for batch, dim in COUNTED:
                fn, z0 = maps.on_device(batch, dim)
                counts = [count(lambda c=calls: maps.run(peer, fn, z0, method, c)) for calls in (11, 31)]  # noqa: B023
                alone = [count(lambda c=calls: maps.repeat(fn, z0, c)) for calls in (11, 31)]  # noqa: B023
                row: Row = {"peer": name, "solver": method.solver, "shape": [batch, dim]}
                for what in counts[0]:  # per iteration, without f's own
                    row[what] = (counts[1][what] - counts[0][what] - alone[1][what] + alone[0][what]) / 20
                yield row


def optimistix(peers: dict[str, Peer]) -> Iterator[Row]:
    """Compare plain iteration, the only method that both libraries have.

    Raises:
        ImportError: If JAX or optimistix is not installed.
    """
    from benchmarks import optimistix_sides as sides

    method, ours = METHODS[0], peers["pydeq"]
    yield dict(sides.versions())
    for batch, dim in maps.SHAPES[:3]:
        slopes, x = (part.numpy() for part in maps.elementwise(batch, dim))
        theirs, alone = sides.elementwise(slopes, x, maps.CALLS)
        made = int(theirs()[1])
        if made != maps.CALLS:
            raise RuntimeError(f"optimistix made {made} calls, not {maps.CALLS}")
        fn, z0 = maps.on_device(batch, dim)
        measured = alternate(
            {
                "pydeq": finished(lambda: maps.run(ours, fn, z0, method, maps.CALLS)),  # noqa: B023
                "f": finished(lambda: maps.repeat(fn, z0, maps.CALLS)),  # noqa: B023
                "optimistix": sides.timed(theirs),
                "jax f": sides.timed(alone),
            },
            repeats=11,
            warmup=2,
            seconds=2.0,
        )
        per_call = {name: spread(values).median / maps.CALLS * 1e6 for name, values in measured.items()}
        yield {
            "what": "overhead",
            "shape": [batch, dim],
            "pydeq us": per_call["pydeq"] - per_call["f"],
            "optimistix us": per_call["optimistix"] - per_call["jax f"],
            "f us": per_call["f"],
            "jax f us": per_call["jax f"],
        }
    for batch, dim in maps.SOLVED:
        weight, x = maps.dense(batch, dim)
        fn, z0 = maps.dense_map(weight, x), torch.zeros(batch, dim, device=DEVICE)
        outcome = ours.solve(fn, z0, method, maps.RTOL, maps.CAP)
        scale = float(outcome.value.square().mean().sqrt())
        theirs = sides.dense(weight.numpy(), x.numpy(), maps.RTOL, scale, maps.CAP)
        ours_timed = finished(lambda: ours.solve(fn, z0, method, maps.RTOL, maps.CAP))  # noqa: B023
        measured = alternate({"pydeq": ours_timed, "optimistix": sides.timed(theirs)}, 15, 3, seconds=2.0)
        yield {
            "what": "solve",
            "shape": [batch, dim],
            **{f"{name} ms": spread(values).median * 1e3 for name, values in measured.items()},
            "optimistix / pydeq": ratios(measured["optimistix"], measured["pydeq"]).median,
            "pydeq residual": worst_residual(fn, outcome.value),
            "optimistix residual": worst_residual(fn, torch.from_numpy(np.array(theirs())).to(DEVICE)),
        }


def worst_residual(fn: Map, z: Tensor) -> float:
    return float(relative_residual(z, fn(z)).max())
