"""deepinv 0.5 (Tachella et al. 2025): its module of fixed-point iterations, with and without Anderson acceleration.

Only this module is loaded, from its file: the package imports torchvision and much else, of which the module needs
nothing but tqdm.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.calling import map_of, passes
from benchmarks.peers.contender import Claim, Contender, Counts, Grids
from benchmarks.problems.base import Problem


def _load() -> ModuleType:
    package = importlib.util.find_spec("deepinv")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'deepinv'")
    path = Path(package.submodule_search_locations[0], "optim", "fixed_point.py")
    spec = importlib.util.spec_from_file_location("deepinv_fixed_point", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_FixedPoint = _load().FixedPoint

# Of deepinv.optim.AndersonAccelerationConfig, except full_backprop, which only matters for gradients.
_ANDERSON = {"history_size": 10, "beta": 0.9, "eps": 0.1}


class _Iterator:
    """The map as an iterator of deepinv. It remembers which samples passed, for the check of convergence.

    The check is given two iterates, and under Anderson acceleration their distance is no residual.
    """

    cost_fn = None

    def __init__(self, fn: Callable[[Tensor], Tensor], problem: Problem, tighten: float) -> None:
        self.fn, self.problem, self.tighten = fn, problem, tighten
        self.passed = torch.zeros(len(problem.z0), dtype=torch.bool)

    def __call__(self, state: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        z = state["est"][0]
        image = self.fn(z)
        self.passed = passes(image - z, image, self.problem, self.tighten)
        return {"est": (image,), "cost": None}

    def converged(self, *_: Any) -> bool:
        return bool(self.passed.all())


@dataclass(frozen=True, kw_only=True)
class _Contender(Contender):
    """``FixedPoint``, which hands on the iterate after the one that passed.

    Tolerance: the check of convergence, a function, is the problem's own test. It is first made after three iterations.
    """

    anderson: bool
    library: str = "deepinv"

    def prepare(self, problem: Problem, tighten: float = 1.0, counts: Counts | None = None) -> Callable[[], Claim]:
        config = SimpleNamespace(**{**_ANDERSON, **self.settings}, full_backprop=False) if self.anderson else None

        iterator = _Iterator(map_of(problem, self.compiled, counts), problem, tighten)
        loop = _FixedPoint(
            iterator,
            init_iterate_fn=lambda *_, **__: {"est": (problem.z0,), "cost": None},
            check_conv_fn=iterator.converged,
            max_iter=problem.max_calls,
            anderson_acceleration_config=config,
        )

        @torch.no_grad()
        def solve() -> Claim:
            state, _ = loop()
            return Claim(state["est"][0], iterator.passed)

        return solve


# Those named ``best`` are chosen by ``python -m benchmarks.peers.search`` from GRIDS.
CONTENDERS: tuple[Contender, ...] = (
    _Contender(key="deepinv.fixed_point", title="fixed point", anderson=False),
    _Contender(key="deepinv.anderson.default", title="fixed point with Anderson acceleration", anderson=True),
    _Contender(
        key="deepinv.anderson.best",
        title="fixed point with Anderson acceleration",
        anderson=True,
        settings={"beta": 1.0, "eps": 1e-8},
    ),
    _Contender(
        key="deepinv.anderson.compiled.best",
        title="fixed point with Anderson acceleration, compiled map",
        anderson=True,
        settings={"beta": 1.0, "eps": 1e-8},
        compiled=True,
    ),
)

GRIDS: Grids = {
    "deepinv.anderson": [
        {},
        *(
            {"history_size": memory, "eps": eps, "beta": beta}
            for memory in (5, 3, 10)
            for eps in (1e-4, 1e-8)
            for beta in (1.0, 0.5)
        ),
    ],
}
