"""What a GPU makes of it: ``python -m benchmarks.device --out DIR``, run by ``benchmarks/gpu_check.sh``.

Each part writes its figures as it finds them, so that what comes later, or fails, loses nothing. After a kernel's fault
nothing runs on a GPU in that process any more: the parts that are left run in another.

    kernels    a step alone, replayed from a graph, against a copy of as many bytes
    launches   kernels, waits and copies per iteration, counted by the profiler
    overhead   (time of a solve - time of as many calls of f alone) / calls, everything run and waited for at the end
    solve      a forward solve of a small cell, to a tolerance
    training   a step of training a small DEQ: forward, backward, optimizer
    optimistix plain iteration beside optimistix's, where JAX is: overhead, and a forward solve
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import pydeq
from benchmarks.peers.base import METHODS, LayerSettings, Method, Peer
from benchmarks.timing import Map, alternate, ratios, relative_residual, spread
from pydeq.protocol import Scalar
from pydeq.solvers import Solver
from pydeq.termination import Rules

Part = Callable[[dict[str, Peer]], Iterable[dict[str, Any]]]

DEVICE = torch.device("cuda")
MEMORY = 6
STORED = 15  # steps in Broyden's history, the mean over a solve of 30
STEPS = 30
# The state of a batch is 64 KB, 1 MB, 2 MB, 4 MB (few samples and many) and 32 MB.
SHAPES = ((32, 512), (32, 8192), (8, 65536), (8, 131072), (128, 8192), (32, 262144))
# What csrc/common/step.cuh calls them.
STEP_KERNEL = re.compile("step_(fused|reduce|apply)_kernel")
# Forward solves, to this tolerance in at most so many calls; and training steps.
SOLVED, RTOL, CAP = ((32, 128), (32, 512), (128, 1024)), 1e-4, 60
TRAINED = ((64, 256), (256, 1024))
# solver -> the solver, steps before the one that is timed, vectors of D read and written per sample in one launch and
# in two: what the step must move there where every residual is the smallest so far.
STEPS_TIMED: dict[str, tuple[Solver, int, tuple[int, int]]] = {
    "picard": (pydeq.Picard(), 2, (2 + 1, 3 + 1)),
    "anderson": (pydeq.Anderson(memory=MEMORY), MEMORY + 1, (2 * MEMORY + 3, 2 * MEMORY + 1 + 3)),
    "broyden": (pydeq.Broyden(memory=2 * STORED), STORED, (STORED + 2 + 3, 2 * STORED + 3 + 3)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=140.0, help="nothing is measured after this")
    parser.add_argument("--resume", action="store_true", help="leave out the parts that are in OUT already")
    arguments = parser.parse_args()
    if not pydeq.kernels().cuda:
        print(f"no CUDA kernels run here: {pydeq.kernels().cuda_reason}", file=sys.stderr)
        return 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "device.json"
    end = time.perf_counter() + arguments.seconds
    peers = load_peers()
    figures: dict[str, Any] = json.loads(path.read_text()) if arguments.resume else {"environment": environment(peers)}
    for part in PARTS:
        name, start = part.__name__, time.perf_counter()
        if name in figures:
            continue
        figures[name] = rows = []
        for row in measure(part, peers, end):
            rows.append(row)
            show(name, row)
            path.write_text(json.dumps(figures, indent=1) + "\n")
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
        if rows and "failed" in rows[-1] and is_broken():
            left = ["--out", str(arguments.out), "--seconds", str(end - time.perf_counter()), "--resume"]
            return subprocess.call([sys.executable, "-m", "benchmarks.device", *left])
    return 1 if any("failed" in row for part in PARTS for row in figures[part.__name__]) else 0


def measure(part: Part, peers: dict[str, Peer], end: float) -> Iterator[dict[str, Any]]:
    """The rows of a part; where there would be more of them, a last one says why they are not there."""
    try:
        found = iter(part(peers))
        while time.perf_counter() < end:
            row = next(found, None)
            if row is None:
                return
            yield row
        yield {"not run": "no time was left"}
    except ImportError as error:
        yield {"not run": str(error)}
    except Exception as error:  # what other parts find is not to be lost
        traceback.print_exc()
        yield {"failed": f"{type(error).__name__}: {error}"}


def is_broken() -> bool:
    """Whether a kernel has faulted in this process."""
    try:
        synchronize()
    except RuntimeError:
        return True
    return False


def load_peers() -> dict[str, Peer]:
    found: dict[str, Peer] = {}
    for name in ("pydeq", "torchdeq"):
        try:
            found[name] = importlib.import_module(f"benchmarks.peers.{name}").PEER
        except ImportError as error:
            print(f"{name} is not compared: {error}")
    return found


def environment(peers: dict[str, Peer]) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "torch": str(torch.__version__),
        "kernels": dataclasses.asdict(pydeq.kernels()),
        "peers": list(peers),
        "python": sys.version.split()[0],
    }


def show(name: str, row: dict[str, Any]) -> None:
    cells = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
    print(f"  {name}: " + ", ".join(cells), flush=True)


# A step alone


def replay_time(work: Callable[[], Any], repeats: int) -> float:
    """Seconds of ``work`` on the device, of ``repeats`` in a graph: the host's part is not in it. Median of several."""
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            work()
    times = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / repeats)
    return spread(times[2:]).median


def kernels(peers: dict[str, Peer]) -> Iterator[dict[str, Any]]:
    for solver, (made, before, vectors) in STEPS_TIMED.items():
        for batch, dim in SHAPES:
            for dtype in (torch.float32, torch.bfloat16) if dim > 8192 else (torch.float32,):
                yield kernel_row(solver, made, before, vectors, batch, dim, dtype)


def kernel_row(
    solver: str, made: Solver, before: int, vectors: tuple[int, int], batch: int, dim: int, dtype: torch.dtype
) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(0)
    rules = Rules(rtol=0.0, atol=0.0, eps=torch.finfo(dtype).eps, freeze=False, stall=False)
    residual = torch.randn(before + 1, batch, dim, generator=generator, device="cuda", dtype=dtype)
    workspace = made.start(torch.zeros(batch, dim, device="cuda", dtype=dtype), rules, 4 * STORED)
    workspace.progress = workspace.progress.pin_memory()
    f = torch.empty_like(residual[0])
    for k in range(before):
        torch.add(workspace.z[k % 2], residual[k], out=f)
        workspace.step(f, k)
    torch.add(workspace.z[before % 2], residual[before], out=f)
    workspace.scalars[:, Scalar.BEST] = torch.inf  # any residual is the smallest so far
    scalars, counters = workspace.scalars.clone(), workspace.counters.clone()
    # Broyden makes room for a step outside of it, and a graph must not: this call does.
    workspace.step(f, before)

    def reset() -> None:
        workspace.scalars.copy_(scalars)
        workspace.counters.copy_(counters)

    def step() -> None:
        reset()
        workspace.step(f, before)

    launched = count(step)["step kernels"]
    # Broyden keeps the steps of half states in float32.
    size = 4 if solver == "broyden" else dtype.itemsize
    moved = vectors[min(launched, 2) - 1] * batch * dim * max(size, dtype.itemsize)
    source = torch.randn(max(1, moved // 8), device="cuda")
    target = torch.empty_like(source)
    repeats = 20
    copied = replay_time(lambda: target.copy_(source), repeats)
    seconds = max(replay_time(step, repeats) - replay_time(reset, repeats), 1e-9)
    bandwidth, floor = moved / seconds, 2 * source.numel() * 4 / copied
    return {
        "solver": solver,
        "shape": [batch, dim],
        "dtype": str(dtype).removeprefix("torch."),
        "launches": launched,
        "us": seconds * 1e6,
        "MB": moved * 1e-6,
        "GB/s": bandwidth * 1e-9,
        "copy GB/s": floor * 1e-9,
        "share of copy": bandwidth / floor,
    }


# A solve


def run(peer: Peer, fn: Map, z0: Tensor, method: Method, calls: int) -> None:
    if peer.name == "pydeq":  # on a GPU without freezing each step is waited for; here no sample is ever done anyway
        solvers = {
            "picard": pydeq.Picard(),
            "anderson": pydeq.Anderson(memory=method.memory or 5),
            "broyden": pydeq.Broyden(memory=max(1, calls - 1)),
        }
        pydeq.fixed_point(fn, z0, solver=solvers[method.solver], rtol=0.0, max_steps=calls, stall=False)
    else:
        peer.run(fn, z0, method, calls)


def elementwise(batch: int, dim: int) -> tuple[Tensor, Tensor]:
    """Slopes, [D], and x, [B, D], of the map of benchmarks.problems.maps.elementwise, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    slopes = torch.empty(dim).uniform_(-0.999, 0.999, generator=generator)
    return slopes, 0.01 * torch.randn(batch, dim, generator=generator)


def on_gpu(batch: int, dim: int) -> tuple[Map, Tensor]:
    """The map z -> tanh(slopes z + x), and a start."""
    slopes, x = (part.to(DEVICE) for part in elementwise(batch, dim))
    return lambda z: torch.addcmul(x, slopes, z).tanh_(), torch.zeros_like(x)


def launches(peers: dict[str, Peer]) -> Iterator[dict[str, Any]]:
    for name, peer in peers.items():
        for method in METHODS:
            for batch, dim in ((32, 512), (8, 65536)):
                fn, z0 = on_gpu(batch, dim)
                counts = [count(lambda c=calls: run(peer, fn, z0, method, c)) for calls in (11, 31)]  # noqa: B023
                alone = [count(lambda c=calls: repeat(fn, z0, c)) for calls in (11, 31)]  # noqa: B023
                row: dict[str, Any] = {"peer": name, "solver": method.solver, "shape": [batch, dim]}
                for what in counts[0]:  # per iteration, beside f's own
                    row[what] = (counts[1][what] - counts[0][what] - alone[1][what] + alone[0][what]) / 20
                yield row


def repeat(fn: Map, z: Tensor, calls: int) -> None:
    with torch.no_grad():
        for _ in range(calls):
            fn(z)


def count(work: Callable[[], Any]) -> dict[str, int]:
    """Kernels, those of pydeq's steps, waits of the host and copies to it while ``work`` runs."""
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


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def finished(work: Callable[[], Any]) -> Callable[[], float]:
    """Seconds until the device is done with ``work``."""

    def measure() -> float:
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        return time.perf_counter() - start

    return measure


def overhead(peers: dict[str, Peer]) -> Iterator[dict[str, Any]]:
    calls = STEPS + 1
    for method in METHODS:
        for batch, dim in SHAPES:
            if method.solver == "broyden" and batch * dim > 1 << 21:
                continue  # torchdeq fills 62 vectors
            fn, z0 = on_gpu(batch, dim)
            sides = {
                name: finished(lambda p=peer: run(p, fn, z0, method, calls))  # noqa: B023
                for name, peer in peers.items()
            }
            sides["f"] = finished(lambda: repeat(fn, z0, calls))  # noqa: B023
            measured = alternate(sides, repeats=11, warmup=2, seconds=4.0)
            alone = spread(measured.pop("f")).median
            row: dict[str, Any] = {"solver": method.solver, "shape": [batch, dim], "f us": alone / calls * 1e6}
            for name, values in measured.items():
                row[f"{name} us"] = (spread(values).median - alone) / calls * 1e6
            if "torchdeq us" in row and row["pydeq us"] > 0.0:
                row["torchdeq / pydeq"] = row["torchdeq us"] / row["pydeq us"]
            yield row


def dense(batch: int, dim: int) -> tuple[Tensor, Tensor]:
    """The weight, [D, D], and x, [B, D], of a small cell z -> tanh(z weight + x), on the CPU."""
    weight = 0.8 / dim**0.5 * torch.randn(dim, dim, generator=torch.Generator().manual_seed(0))
    return weight, torch.randn(batch, dim, generator=torch.Generator().manual_seed(1))


def dense_map(weight: Tensor, x: Tensor) -> Map:
    weight, x = weight.to(DEVICE), x.to(DEVICE)
    return lambda z: torch.tanh(torch.addmm(x, z, weight))


def solve(peers: dict[str, Peer]) -> Iterator[dict[str, Any]]:
    for method in METHODS:
        for batch, dim in SOLVED:
            weight, x = dense(batch, dim)
            fn, z0 = dense_map(weight, x), torch.zeros(batch, dim, device=DEVICE)
            sides = {
                name: finished(lambda p=peer: p.solve(fn, z0, method, RTOL, CAP))  # noqa: B023
                for name, peer in peers.items()
            }
            yield {"solver": method.solver, "shape": [batch, dim], **compare(alternate(sides, 15, 3, seconds=4.0))}


def compare(measured: dict[str, list[float]]) -> dict[str, Any]:
    row: dict[str, Any] = {f"{name} ms": spread(values).median * 1e3 for name, values in measured.items()}
    if "torchdeq" in measured:
        row["torchdeq / pydeq"] = ratios(measured["torchdeq"], measured["pydeq"]).median
    return row


def training(peers: dict[str, Peer]) -> Iterator[dict[str, Any]]:
    for batch, dim in TRAINED:
        settings = LayerSettings(METHODS[1], rtol=1e-3, max_calls=30, adjoint_rtol=1e-3, adjoint_max_calls=30)
        sides = {}
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
        yield {"shape": [batch, dim], **compare(alternate(sides, 15, 3, seconds=6.0))}


def optimistix(peers: dict[str, Peer]) -> Iterator[dict[str, Any]]:
    """Plain iteration, the one method that both have.

    Raises:
        ImportError: Where JAX or optimistix is not installed.
    """
    from benchmarks import optimistix_sides as sides

    method, ours = METHODS[0], peers["pydeq"]
    yield dict(sides.versions())
    calls = STEPS + 1
    for batch, dim in SHAPES[:3]:
        slopes, x = (part.numpy() for part in elementwise(batch, dim))
        theirs, alone = sides.elementwise(slopes, x, calls)
        made = int(theirs()[1])
        if made != calls:
            raise RuntimeError(f"optimistix made {made} calls, not {calls}")
        fn, z0 = on_gpu(batch, dim)
        measured = alternate(
            {
                "pydeq": finished(lambda: run(ours, fn, z0, method, calls)),  # noqa: B023
                "f": finished(lambda: repeat(fn, z0, calls)),  # noqa: B023
                "optimistix": sides.timed(theirs),
                "jax f": sides.timed(alone),
            },
            repeats=11,
            warmup=2,
            seconds=3.0,
        )
        per_call = {name: spread(values).median / calls * 1e6 for name, values in measured.items()}
        yield {
            "what": "overhead",
            "shape": [batch, dim],
            "pydeq us": per_call["pydeq"] - per_call["f"],
            "optimistix us": per_call["optimistix"] - per_call["jax f"],
            "f us": per_call["f"],
            "jax f us": per_call["jax f"],
        }
    for batch, dim in SOLVED:
        weight, x = dense(batch, dim)
        fn, z0 = dense_map(weight, x), torch.zeros(batch, dim, device=DEVICE)
        outcome = ours.solve(fn, z0, method, RTOL, CAP)
        scale = float(outcome.value.square().mean().sqrt())
        theirs = sides.dense(weight.numpy(), x.numpy(), RTOL, scale, CAP)
        measured = alternate(
            {"pydeq": finished(lambda: ours.solve(fn, z0, method, RTOL, CAP)), "optimistix": sides.timed(theirs)},  # noqa: B023
            repeats=15,
            warmup=3,
            seconds=3.0,
        )
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


PARTS = (kernels, launches, overhead, solve, training, optimistix)

if __name__ == "__main__":
    sys.exit(main())
