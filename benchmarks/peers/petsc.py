"""PETSc's nonlinear solvers (SNES), by petsc4py: on vectors in double precision, over the torch map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.peers.calling import Calls, ExhaustedError, allowed, change, uniform
from benchmarks.peers.contender import Claim, Contender, Counts, Grids
from benchmarks.problems.base import Problem

try:
    import petsc4py  # pyright: ignore[reportMissingImports]

    petsc4py.init(["petsc", "-no_signal_handler"])
    from petsc4py import PETSc  # pyright: ignore[reportMissingImports]
except ValueError as error:  # of sizes that changed
    raise ImportError(f"petsc4py was built for another version of numpy than {np.__version__}") from error


@dataclass(frozen=True, kw_only=True)
class _Contender(Contender):
    """A type of SNES, on the batch as one vector: it steps along -F, so F is z - f(z).

    Tolerance: SNES tests the norm of the whole batch; it is to be below the smallest residual that solves a sample.
    """

    type: str
    library: str = "petsc"
    language: Literal["torch", "numpy", "jax"] = "numpy"

    def prepare(self, problem: Problem, tighten: float = 1.0, counts: Counts | None = None) -> Callable[[], Claim]:
        start, fn = problem.z0, change(problem)
        tolerance = tighten * allowed(problem).min().item()
        # Steps of differences are for the dtype that the map computes in.
        options = {"mat_mffd_err": torch.finfo(start.dtype).eps ** 0.5, **self.settings}

        @torch.no_grad()
        def solve() -> Claim:
            calls = Calls(fn, self.most_calls(problem), counts)

            def residual(snes: Any, x: Any, r: Any) -> None:
                z = torch.from_numpy(x.getArray(readonly=True).copy()).to(start.dtype).reshape(start.shape)
                r.setArray(-calls(z).double().numpy().ravel())

            # A solver that solves twice starts with what it learned the first time.
            snes: Any = PETSc.SNES().create(PETSc.COMM_SELF)
            snes.setType(self.type)
            x = PETSc.Vec().createWithArray(start.double().numpy().flatten())
            snes.setFunction(residual, x.duplicate())
            if self.type == "newtonls":
                snes.setUseMF(True)
                snes.getKSP().getPC().setType("none")
            snes.setTolerances(rtol=0.0, atol=tolerance, stol=0.0, max_it=problem.max_calls)
            database: Any = PETSc.Options()
            for name, value in options.items():
                database[name] = value
            try:
                snes.setFromOptions()
                snes.solve(None, x)
                value = torch.from_numpy(x.getArray().copy()).to(start.dtype)
                return uniform(value, snes.getConvergedReason() > 0, problem)
            except ExhaustedError:
                return uniform(calls.last, False, problem)
            finally:
                for name in options:
                    database.delValue(name)
                snes.destroy()

        return solve


# Those named ``best`` are chosen by ``python -m benchmarks.peers.search`` from GRIDS.
CONTENDERS: tuple[Contender, ...] = (
    _Contender(key="petsc.anderson.default", title="Anderson", type="anderson"),
    _Contender(key="petsc.ngmres.default", title="NGMRES", type="ngmres"),
    _Contender(key="petsc.qn.default", title="quasi-Newton", type="qn"),
    _Contender(
        key="petsc.qn.best", title="quasi-Newton", type="qn", settings={"snes_qn_type": "broyden", "snes_qn_m": 30}
    ),
    _Contender(key="petsc.newtonls", title="Newton-Krylov", type="newtonls", differences=True),
)

GRIDS: Grids = {
    "petsc.anderson": [
        {"snes_anderson_m": memory, "snes_anderson_beta": beta} for memory in (30, 5, 10) for beta in (1.0, 0.5)
    ],
    "petsc.ngmres": [{"snes_ngmres_m": memory} for memory in (30, 5, 10)],
    "petsc.qn": [{"snes_qn_type": kind, "snes_qn_m": memory} for kind in ("lbfgs", "broyden") for memory in (10, 30)],
}
