"""xitorch 0.5 (Kasim and Vinko 2020): ``rootfinder`` where a problem states r(z) = 0, otherwise ``equilibrium``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from xitorch._utils.exceptions import ConvergenceWarning
from xitorch.optimize import equilibrium, rootfinder

from benchmarks.peers.calling import COMPILER, Calls, ExhaustedError, allowed, change, passes, uniform
from benchmarks.peers.contender import Claim, Contender, Counts, Grids
from benchmarks.problems.base import Problem


class _Terminator:
    """Stop when all samples pass; for ``custom_terminator``."""

    def __init__(self, test: Callable[[Tensor, Tensor], Tensor], shape: torch.Size) -> None:
        self.test, self.shape = test, shape

    def check(self, x: Tensor, y: Tensor, dx: Tensor) -> bool:
        return bool(self.test(x.reshape(self.shape), y.reshape(self.shape)).all())


@dataclass(frozen=True, kw_only=True)
class _Contender(Contender):
    """One method.

    By default its Broyden methods start along F, and linearmixing goes along -F. So ``rootfinder`` is given
    F = f(z) - z, or z - f(z). ``equilibrium`` makes z - f(z) of the map: there, Broyden's best ``alpha`` is negative.

    Tolerance: its option ``custom_terminator`` takes the problem's own test. For r(z) = 0, the norm of F at which each
    sample is solved.
    """

    method: str
    library: str = "xitorch"

    @property
    def separate(self) -> bool:
        return self.method == "anderson_acc"

    def refusal(self, problem: Problem) -> str | None:
        if self.separate and problem.root is not None:
            return "it takes only fixed points"
        return super().refusal(problem)

    def prepare(self, problem: Problem, tighten: float = 1.0, counts: Counts | None = None) -> Callable[[], Claim]:
        settings = dict(self.settings)
        if problem.root is None:
            run, fn = equilibrium, COMPILER.map(problem) if self.compiled and counts is None else problem.fn
            sign = 1.0 if self.separate else -1.0

            def test(x: Tensor, y: Tensor) -> Tensor:
                return passes(y, x + sign * y, problem, tighten)  # y is f(x) - x for anderson_acc, else x - f(x)
        else:
            run, along = rootfinder, change(problem)
            tolerance = tighten * allowed(problem)
            fn = (lambda z: -along(z)) if self.method == "linearmixing" else along
            if "alpha" in settings and self.method != "linearmixing":
                settings["alpha"] *= -1.0

            def test(x: Tensor, y: Tensor) -> Tensor:
                return y.flatten(1).norm(dim=1) <= tolerance

        if self.separate:
            settings["feat_ndims"] = problem.z0.dim() - 1
        terminator = _Terminator(test, problem.z0.shape)

        @torch.no_grad()
        def solve() -> Claim:
            calls = Calls(fn, problem.max_calls, counts)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    # A method of the interpreter's caller would be taken for one of a torch module, so a function.
                    value = run(
                        lambda z: calls(z),
                        problem.z0,
                        method=self.method,
                        maxiter=problem.max_calls,
                        custom_terminator=terminator,
                        **settings,
                    )
                except ExhaustedError:
                    return uniform(calls.last, False, problem)
            return uniform(value, not any(issubclass(w.category, ConvergenceWarning) for w in caught), problem)

        return solve


# Those named ``best`` are chosen by ``python -m benchmarks.peers.search`` from GRIDS.
CONTENDERS: tuple[Contender, ...] = (
    _Contender(key="xitorch.broyden1.default", title="broyden1", method="broyden1"),
    _Contender(
        key="xitorch.broyden1.best",
        title="broyden1",
        method="broyden1",
        settings={"alpha": -1.0, "line_search": False},
    ),
    _Contender(key="xitorch.broyden2.default", title="broyden2", method="broyden2"),
    _Contender(key="xitorch.broyden2.best", title="broyden2", method="broyden2", settings={"alpha": -1.0}),
    _Contender(key="xitorch.linearmixing.default", title="linearmixing", method="linearmixing"),
    _Contender(key="xitorch.anderson_acc.default", title="anderson_acc", method="anderson_acc"),
    _Contender(
        key="xitorch.anderson_acc.best",
        title="anderson_acc",
        method="anderson_acc",
        settings={"msize": 10, "lmbda": 1e-8},
    ),
    _Contender(
        key="xitorch.anderson_acc.compiled.best",
        title="anderson_acc, compiled map",
        method="anderson_acc",
        settings={"msize": 10, "lmbda": 1e-8},
        compiled=True,
    ),
)

_BROYDEN = [
    {"alpha": alpha, "line_search": search, "max_rank": rank}
    for alpha in (None, -1.0)
    for search in (True, False)
    for rank in (None, 10)
]
GRIDS: Grids = {
    "xitorch.broyden1": _BROYDEN,
    "xitorch.broyden2": _BROYDEN,
    "xitorch.linearmixing": [
        {"alpha": alpha, "line_search": search} for alpha in (-1.0, -0.5) for search in (True, False)
    ],
    "xitorch.anderson_acc": [
        {"msize": msize, "lmbda": lmbda, "beta": beta}
        for msize in (5, 3, 10)
        for lmbda in (1e-4, 1e-8)
        for beta in (1.0, 0.5)
    ],
}
