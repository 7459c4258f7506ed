"""``DEQ``: a module whose output is the fixed point of its cell."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn

from pydeq.adjoints import Adjoint, Implicit
from pydeq.adjoints.base import Problem
from pydeq.fixed_point import check_max_steps, check_tolerance, fixed_point
from pydeq.jacobian.penalty import JacobianPenalty
from pydeq.keywords import unknown_keyword
from pydeq.solvers import Anderson, Solver
from pydeq.state import State

_INIT = ("solver", "adjoint", "rtol", "atol", "max_steps", "eval_max_steps")
_CALL = ("return_solution", "rtol", "max_steps", "penalty")


class DEQ(nn.Module):
    """A layer whose output is the fixed point z = cell(z, *context).

    With gradients on, the cell is evaluated once more at the solution, which attaches parameters and context to the
    graph; without, the output is the image that the solve already has.

    Args:
        cell: cell(z, *context) -> like z; usually a module.
        solver: Forward solver; :class:`pydeq.Anderson` by default.
        adjoint: How to differentiate; :class:`pydeq.Implicit` by default.
        rtol, atol: Tolerances, see :func:`pydeq.fixed_point`.
        max_steps: Evaluations of each sample at most, without the one that attaches the graph.
        eval_max_steps: The same in evaluation mode; ``max_steps`` by default. The paper's hard stop.

    Raises:
        TypeError, ValueError: If an argument is of the wrong type or out of range.

    Source: Bai, Kolter and Koltun, Deep Equilibrium Models, NeurIPS 2019.
    """

    def __init__(
        self,
        cell: Any,
        *,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        rtol: float | None = None,
        atol: float = 0.0,
        max_steps: int = 50,
        eval_max_steps: int | None = None,
        **unknown: NoReturn,
    ) -> None:
        super().__init__()
        for name in unknown:
            raise unknown_keyword("DEQ", name, _INIT)
        if not callable(cell):
            raise TypeError(f"cell must be callable, got {type(cell).__name__}")
        self.cell = cell
        self.solver = Anderson() if solver is None else solver
        if not isinstance(self.solver, Solver):
            raise TypeError(f"solver must be a solver like pydeq.Anderson(), got {solver!r}")
        self.adjoint = Implicit() if adjoint is None else adjoint
        if not isinstance(self.adjoint, Adjoint):
            raise TypeError(f"adjoint must be an adjoint like pydeq.Implicit(), got {adjoint!r}")
        self.rtol = None if rtol is None else check_tolerance("rtol", rtol)
        self.atol = check_tolerance("atol", atol)
        self.max_steps = check_max_steps("max_steps", max_steps)
        self.eval_max_steps = None if eval_max_steps is None else check_max_steps("eval_max_steps", eval_max_steps)

    def forward(
        self,
        z0: State,
        *context: Any,
        return_solution: bool = False,
        rtol: float | None = None,
        max_steps: int | None = None,
        penalty: JacobianPenalty | None = None,
        **unknown: NoReturn,
    ) -> Any:
        """Solve from ``z0``.

        Args:
            z0: Initial state, a tensor (batch, *state) or a tuple of them; gets no gradient under Implicit.
            context: Passed on to the cell; gets gradients.
            return_solution: Also return the :class:`pydeq.Solution`.
            rtol, max_steps: Override the layer's for this call.
            penalty: Penalizes the Jacobian at the fixed point: ``solution.penalty`` is then a term for the loss. It
                takes the evaluation that attaches the graph; another one is made with gradients off, and where the
                adjoint evaluates the cell elsewhere (``Phantom(form="unroll")``).

        Returns:
            The fixed point, like z0; with ``return_solution`` the pair (fixed point, solution).
        """
        for name in unknown:
            raise unknown_keyword("DEQ.forward", name, _CALL)
        if penalty is not None:
            if not isinstance(penalty, JacobianPenalty):
                raise TypeError(f"penalty must be a pydeq.JacobianPenalty, got {type(penalty).__name__}")
            if not return_solution:
                raise ValueError("penalty is returned in the solution: it needs return_solution=True")
        steps = self.max_steps if self.training or self.eval_max_steps is None else self.eval_max_steps
        options = {
            "solver": self.solver,
            "rtol": self.rtol if rtol is None else rtol,
            "atol": self.atol,
            "max_steps": steps if max_steps is None else max_steps,
        }
        at = None
        if torch.is_grad_enabled():
            attached = self.adjoint.solve(Problem(self.cell, z0, context, options))
            z, solution = attached.output, attached.solution
            at = attached.linearization
        else:
            solution = fixed_point(self.cell, z0, *context, **options)
            z = solution.image
        if penalty is not None:
            solution.penalty = penalty.evaluate(self.cell, solution.image, context, at)
        return (z, solution) if return_solution else z

    def extra_repr(self) -> str:
        return f"solver={self.solver}, adjoint={self.adjoint}, max_steps={self.max_steps}"
