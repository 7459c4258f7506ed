"""Timings of single operations, by pytest-benchmark:

    python -m pytest benchmarks/test_kernels.py --benchmark-enable

Each step of a solver is timed by itself, as a compiled kernel and as its reference in plain torch, in the state of a
solve that is under way: the history is full, and every residual is the smallest so far. ``copy`` shows what the memory
system can do: it copies as many bytes as Anderson's step touches at that shape. PYDEQ_BENCH_PROFILE chooses the shapes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import pydeq
from benchmarks.environment import thread_counts
from benchmarks.profiles import BEYOND_CACHE, PROFILES
from pydeq.ops.anderson_step import anderson_step
from pydeq.ops.broyden_step import broyden_step
from pydeq.ops.constants import Counter, Scalar
from pydeq.ops.picard_step import picard_step
from pydeq.ops.termination import Rules
from pydeq.solvers import Solver

PROFILE = PROFILES[os.environ.get("PYDEQ_BENCH_PROFILE", "quick")]
MEMORY = 6
STORED = 15  # steps in Broyden's history, the mean over a solve of 30

# operation -> solver, steps before the one that is timed, reference
OPERATIONS: dict[str, tuple[Solver, int, Callable[..., None]]] = {
    "picard_step": (pydeq.Picard(), 1, picard_step.reference),
    "anderson_step": (pydeq.Anderson(memory=MEMORY), MEMORY, anderson_step.reference),
    "broyden_step": (pydeq.Broyden(memory=2 * STORED), STORED, broyden_step.reference),
}
# operation -> vectors of D read and written per sample
VECTORS = {
    "copy": (MEMORY + 2, MEMORY + 2),
    "picard_step": (2, 1),  # it reads both twice, the second time from cache
    "anderson_step": (2 * MEMORY + 1, 3),
    "broyden_step": (2 * STORED + 4, 3),
}


class Step:
    """One step of a solver in the middle of a solve, ready to be taken again and again.

    The residuals f - z are random and independent: every history of them is well conditioned.
    """

    def __init__(self, operation: str, batch: int, dim: int) -> None:
        self.solver, self.before, self.reference = OPERATIONS[operation]
        generator = torch.Generator().manual_seed(0)
        self.residuals = [torch.randn(batch, dim, generator=generator) for _ in range(self.before + 2)]
        self.f = torch.empty(batch, dim)
        self.turn = 0
        rules = Rules(rtol=0.0, atol=0.0, eps=torch.finfo(torch.float32).eps, freeze=False, stall=False)
        self.workspace = self.solver.start(torch.zeros(batch, dim), rules, 4 * STORED)
        for k in range(self.before):
            self.prepare(k)
            self.workspace.step(self.f, k)
        self.count = self.workspace.counters[:, Counter.COUNT].clone()
        self.prepare(self.before)
        # The arguments as the solver puts them, without a second list of them here.
        with mock.patch(f"pydeq.solvers.{operation.removesuffix('_step')}.{operation}") as recorder:
            self.workspace.step(self.f, self.before)
        self.arguments: tuple[Any, ...] = recorder.run.call_args.args

    def prepare(self, k: int) -> None:
        """New images in ``f``, written just before, as fn's would be; and any residual is to be the smallest so far."""
        torch.add(self.workspace.z[k % 2], self.residuals[self.turn % len(self.residuals)], out=self.f)
        self.turn += 1
        self.workspace.scalars[:, Scalar.BEST] = torch.inf

    def again(self) -> None:
        """Back to the state before the timed step: Broyden would otherwise have stored one more."""
        self.prepare(self.before)
        if isinstance(self.solver, pydeq.Broyden):
            self.workspace.counters[:, Counter.COUNT] = self.count

    @property
    def next(self) -> Tensor:
        return self.workspace.z[1 - self.before % 2]


@pytest.fixture(params=thread_counts(PROFILE), ids="t{}".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=PROFILE.kernel_shapes, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def shape(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


def note(benchmark: Any, operation: str, implementation: str, shape: tuple[int, int], threads: int) -> None:
    """Note what the summary needs in addition to the times."""
    reads, writes = VECTORS[operation]
    benchmark.extra_info.update(
        operation=operation,
        implementation=implementation,
        batch=shape[0],
        dim=shape[1],
        threads=threads,
        reads=reads,
        writes=writes,
        bytes=(reads + writes) * 4 * shape[0] * shape[1],
    )


def rounds_of(implementation: str, shape: tuple[int, int]) -> int:
    rounds = PROFILE.kernel_rounds
    if shape == BEYOND_CACHE:
        rounds = max(3, rounds // 5)
    if implementation == "reference":  # hundreds of times slower: enough to place it
        rounds = 1 if shape == BEYOND_CACHE else max(3, rounds // 10)
    return rounds


def test_copy(benchmark: Any, shape: tuple[int, int], threads: int) -> None:
    reads, _ = VECTORS["copy"]
    source = torch.randn(reads, *shape)
    target = torch.empty_like(source)
    benchmark.pedantic(target.copy_, (source,), rounds=rounds_of("copy", shape), warmup_rounds=2)
    note(benchmark, "copy", "torch", shape, threads)


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_step(benchmark: Any, operation: str, implementation: str, shape: tuple[int, int], threads: int) -> None:
    if implementation == "kernel" and not pydeq.kernels().cpu:
        pytest.skip(f"no compiled kernels: {pydeq.kernels().cpu_reason}")
    if implementation == "reference" and shape == BEYOND_CACHE and threads < max(thread_counts(PROFILE)):
        pytest.skip("seconds a call: once is enough, on all threads")
    step = Step(operation, *shape)
    function = step.reference if implementation == "reference" else getattr(pydeq.ops, operation)
    if implementation == "kernel" and shape != BEYOND_CACHE:
        check(step, function)
    rounds = rounds_of(implementation, shape)
    benchmark.pedantic(function, step.arguments, setup=step.again, rounds=rounds, warmup_rounds=2 if rounds > 1 else 0)
    note(benchmark, operation, implementation, shape, threads)
    assert step.next.isfinite().all()


def check(step: Step, function: Callable[..., None]) -> None:
    """Right first: the kernel's next iterates are the reference's."""
    saved = [argument.clone() for argument in tensors(step.arguments)]
    step.reference(*step.arguments)
    expected = step.next.clone()
    for argument, value in zip(tensors(step.arguments), saved, strict=True):
        argument.copy_(value)
    function(*step.arguments)
    # Sums in another order: compare with the length of the vector, which every entry's error scales with.
    error = (step.next.double() - expected.double()).norm() / expected.double().norm()
    assert error < 1e-5, f"the kernel's next iterates must be the reference's, got a relative difference of {error:.1e}"


def tensors(arguments: tuple[Any, ...]) -> list[Tensor]:
    flat = []
    for argument in arguments:
        flat += [argument] if isinstance(argument, Tensor) else argument if isinstance(argument, list) else []
    return flat
