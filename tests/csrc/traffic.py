"""What a step reads and writes of global memory, counted by the emulator, beside what the design allows it.

Unit: vectors of D entries per sample, in the type that histories are kept in. The solves are recorded from the
references; the emulator runs their steps with the tiles, blocks and clusters that a GPU has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import test_anderson_step
import test_broyden_step
import test_gmres_step
import test_picard_step
import torch
from check_op import record
from emulated import Case, Limits, Result, emulate

import pydeq
from pydeq.solvers import Solver

MEMORY = 6  # of Anderson's method
STEPS = 8  # the last one, which only judges, is not counted


@dataclass(frozen=True)
class Method:
    """A solver, and the vectors that step k of a solve may read and write.

    Args:
        design: In the mean, with the best iterate and its image saved whenever they must be.
        once: Reads where one launch reads every vector once, and the residual falls in every step.
        twice: Reads of two launches, likewise.
        writes: Likewise.
    """

    solver: Solver
    names: list[str]
    wide: bool  # histories of half states are float32
    design: Callable[[int], tuple[int, int]]
    once: Callable[[int], int]
    twice: Callable[[int], int]
    writes: Callable[[int], int]


def _columns(k: int) -> int:
    return min(k + 1, MEMORY)


METHODS = {
    # z and f; next. Saving the best iterate, which is z of the step before, and its image: two reads, two writes.
    "picard_step": Method(
        pydeq.Picard(),
        test_picard_step.NAMES,
        False,
        design=lambda k: (4, 3),
        once=lambda k: 2,
        twice=lambda k: 3,
        writes=lambda k: 1,
    ),
    # z, f, m - 1 residuals and m - 1 values; a residual, a value, next.
    "anderson_step": Method(
        pydeq.Anderson(memory=MEMORY),
        test_anderson_step.NAMES,
        False,
        design=lambda k: (2 * _columns(k) + 2, 4),
        once=lambda k: 2 * _columns(k),
        twice=lambda k: 2 * _columns(k) + 1,
        writes=lambda k: 3,
    ),
    # z, f and k steps; a step, next, the image.
    "broyden_step": Method(
        pydeq.Broyden(memory=50),
        test_broyden_step.NAMES,
        True,
        design=lambda k: (2 * k + 6, 4),
        once=lambda k: k + 2,
        twice=lambda k: max(2 * k + 3, 4),
        writes=lambda k: 3,
    ),
    # z, f, k vectors of the basis and the start; a vector, next, the image; the first step writes the start.
    "gmres_step": Method(
        pydeq.GMRES(restart=50),
        test_gmres_step.NAMES,
        True,
        design=lambda k: (2 * k + 6, 4),
        once=lambda k: k + 3,
        twice=lambda k: 2 * k + 5,
        writes=lambda k: 4 if k == 0 else 3,
    ),
}

# What a GPU with clusters grants, one without, and two launches.
PATHS = {
    "cluster": Limits(shared_bytes=227 << 10, cluster_blocks=8, tile_threads=256),
    "block": Limits(shared_bytes=227 << 10, tile_threads=256),
    "two launches": Limits(shared_bytes=163 << 10, block_state=-1, tile_threads=256),
}
STATES = {"cluster": 8192, "block": 1024, "two launches": 8192}
# How the map scales differences: the residual falls in every step, or rises under Picard's method and does both under
# the others.
MAPS = {"falling": (0.5, 0.6), "rising": (-1.2, 1.2)}


@dataclass(frozen=True)
class Count:
    """A step of a solve: vectors read and written, and how it ran."""

    step: int
    reads: float
    writes: float
    result: Result


def count(name: str, dtype: torch.dtype, path: str, kind: str) -> list[Count]:
    """The steps of a solve of one sample that starts at zero and never stops."""
    method, batch, state = METHODS[name], 1, STATES[path]
    x = torch.randn(batch, state, generator=torch.Generator().manual_seed(0)).to(dtype)
    rates = torch.linspace(*MAPS[kind], state).to(dtype)
    samples = record(method.solver, lambda z, k: rates * z.roll(1, 1) + x, torch.zeros_like(x), STEPS, rtol=0.0)
    tests = [Case(name, dict(zip(method.names, sample, strict=True)), PATHS[path]) for sample in samples[:-1]]
    vector = batch * state * (4 if method.wide else dtype.itemsize)
    return [Count(k, r.loaded / vector, r.stored / vector, r) for k, r in enumerate(emulate(tests))]
