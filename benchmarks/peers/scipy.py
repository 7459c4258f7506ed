"""SciPy 1.17: ``scipy.optimize.root`` on NumPy arrays of the problem's dtype, over the torch map."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import root

from benchmarks.peers.calling import Calls, ExhaustedError, allowed, change, uniform
from benchmarks.peers.contender import Claim, Contender, Counts, Grids
from benchmarks.problems.base import Problem

# The Jacobian of these has as many columns as the whole batch has entries.
_DENSE_METHODS, _DENSE = ("hybr", "lm"), 2_000
# Their tolerance by default.
_XTOL = 1.49012e-8


@dataclass(frozen=True, kw_only=True)
class _Contender(Contender):
    """One method of ``root``, on the batch as one vector.

    The methods by an approximate Jacobian start along F = f(z) - z.

    Tolerance: the norm (``tol_norm``, ``fnorm``) is the largest norm of a sample's F, over the one that solves the
    sample. hybr has only a tolerance of the iterate's relative change: rtol, or its default if the problem has none. lm
    has one of the relative change of ||F||, too.
    """

    method: str
    library: str = "scipy"
    language: Literal["torch", "numpy", "jax"] = "numpy"

    def refusal(self, problem: Problem) -> str | None:
        if self.method in _DENSE_METHODS and problem.z0.numel() > _DENSE:
            return f"it forms a dense Jacobian of {problem.z0.numel()} columns"
        return super().refusal(problem)

    def prepare(self, problem: Problem, tighten: float = 1.0, counts: Counts | None = None) -> Callable[[], Claim]:
        shape, fn = problem.z0.shape, change(problem)
        start = problem.z0.numpy().ravel()
        scale = 1.0 / (tighten * allowed(problem).numpy())
        options = self._options(problem, tighten, lambda f: _largest(f, scale))

        @torch.no_grad()
        def solve() -> Claim:
            calls = Calls(fn, self.most_calls(problem), counts)

            def residual(x: np.ndarray) -> np.ndarray:
                z = torch.from_numpy(np.asarray(x, dtype=start.dtype)).reshape(shape)
                return calls(z).numpy().ravel()

            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                try:
                    result = root(residual, start.copy(), method=self.method, options=options)
                except ExhaustedError:
                    return uniform(calls.last, False, problem)
            if self.method == "lm":  # success may be a minimum of ||F||
                return Claim(lambda: uniform(result.x, False, problem).value, None)
            return uniform(result.x, result.success, problem)

        return solve

    def _options(self, problem: Problem, tighten: float, norm: Callable[[np.ndarray], float]) -> dict[str, Any]:
        settings = dict(self.settings)
        if self.method in _DENSE_METHODS:
            eps, xtol = torch.finfo(problem.z0.dtype).eps, tighten * (problem.rtol or _XTOL)
            if self.method == "hybr":
                return {"xtol": xtol, "eps": eps, "maxfev": self.most_calls(problem), **settings}
            return {"xtol": xtol, "ftol": xtol, "eps": eps, "maxiter": self.most_calls(problem), **settings}
        if self.method == "df-sane":
            return {"ftol": 0.0, "fatol": 1.0, "fnorm": norm, "maxfev": problem.max_calls, **settings}
        search = {"line_search": settings.pop("line_search")} if "line_search" in settings else {}
        return {
            "fatol": 1.0,
            "tol_norm": norm,
            "maxiter": problem.max_calls,
            "jac_options": settings,
            **search,
        }


def _largest(f: np.ndarray, scale: np.ndarray) -> float:
    """The largest norm of a sample, each times its scale."""
    return float((np.linalg.norm(f.reshape(len(scale), -1), axis=1) * scale).max())


# Those named ``best`` are chosen by ``python -m benchmarks.peers.search`` from GRIDS.
CONTENDERS: tuple[Contender, ...] = (
    _Contender(key="scipy.anderson.default", title="anderson", method="anderson"),
    _Contender(key="scipy.anderson.best", title="anderson", method="anderson", settings={"alpha": 1.0, "M": 10}),
    _Contender(key="scipy.broyden1.default", title="broyden1", method="broyden1"),
    _Contender(
        key="scipy.broyden1.best",
        title="broyden1",
        method="broyden1",
        settings={"alpha": 1.0, "line_search": None},
    ),
    _Contender(key="scipy.diagbroyden.default", title="diagbroyden", method="diagbroyden"),
    _Contender(key="scipy.diagbroyden.best", title="diagbroyden", method="diagbroyden", settings={"alpha": 1.0}),
    _Contender(key="scipy.krylov.default", title="newton_krylov", method="krylov", differences=True),
    _Contender(
        key="scipy.krylov.best",
        title="newton_krylov",
        method="krylov",
        differences=True,
        settings={"method": "gmres", "inner_maxiter": 5},
    ),
    _Contender(key="scipy.df_sane", title="df-sane", method="df-sane"),
    _Contender(key="scipy.hybr", title="hybr", method="hybr", differences=True),
    _Contender(key="scipy.lm", title="lm", method="lm", differences=True),
)

_SEARCHES = ("armijo", None)
_ALPHAS = (None, 1.0, 0.5)
GRIDS: Grids = {
    "scipy.anderson": [
        {"alpha": alpha, "M": memory, "line_search": search}
        for alpha in _ALPHAS
        for memory in (5, 3, 10)
        for search in _SEARCHES
    ],
    "scipy.broyden1": [
        {"alpha": alpha, "max_rank": rank, "line_search": search}
        for alpha in _ALPHAS
        for rank in (None, 10)
        for search in _SEARCHES
    ],
    "scipy.diagbroyden": [{"alpha": alpha, "line_search": search} for alpha in _ALPHAS for search in _SEARCHES],
    "scipy.krylov": [
        {"method": method, "inner_maxiter": steps, "line_search": search}
        for method in ("lgmres", "gmres")
        for steps in (20, 5)
        for search in _SEARCHES
    ],
}
