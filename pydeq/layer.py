"""``DEQ``: a module whose output is the fixed point of its cell."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import nn

from pydeq.adjoints import Adjoint, Implicit
from pydeq.adjoints.base import AdjointResult, Problem
from pydeq.adjoints.convergence_warning import warn_if_layer_unconverged
from pydeq.adjoints.functional import transforms_active
from pydeq.adjoints.learned_start_warning import warn_about_learned_start
from pydeq.arguments import (
    callable_name,
    check_context,
    check_max_steps,
    check_norm,
    check_states_at,
    check_tolerance,
    keywords_for,
    shown,
    unknown_keyword,
)
from pydeq.cell.batched_context import check_compact
from pydeq.cell.prepared import PreparedCell, module_of
from pydeq.cell.replay_rng import RefuseDraws, random_modules
from pydeq.cell.running_statistics import batch_norms
from pydeq.cell.torch_compile import Compiler, skipped
from pydeq.export import exported_steps
from pydeq.jacobian.penalty import JacobianPenalty
from pydeq.ops.capture import exporting
from pydeq.ops.reduction import WHOLE, Reduction
from pydeq.solution import CouplingWarning, Solution
from pydeq.solve.exported import solve_exported
from pydeq.solve.ranks import check_ranks
from pydeq.solvers import Anderson, Solver
from pydeq.state import as_tuple
from pydeq.supervision import differentiable_states

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_INIT = (
    "solver", "adjoint", "rtol", "atol", "max_steps", "eval_max_steps", "freeze_rng", "process_group", "sharded",
    "states_at", "has_aux", "norm",
)  # fmt: skip
_CALL = (
    "return_solution", "solver", "rtol", "atol", "max_steps", "trace", "freeze", "stall", "compact", "batched_context",
    "penalty",
)  # fmt: skip
# Keywords that a call does not take, and advice for each.
_ELSEWHERE = {name: f"it is the layer's: DEQ(cell, {name}=...)" for name in _INIT if name not in _CALL} | {
    "throw": "with return_solution=True, look at solution.converged",
}


class DEQ(nn.Module):
    """A layer whose output is the fixed point z = cell(z, *context, **keywords).

    With gradients on, the cell is evaluated once more, at the solution's image. This evaluation makes the graph with
    parameters and context. Without gradients, the output is the image that the solve already has.
    :class:`pydeq.Solution` says which residual belongs to which state.

    Args:
        cell: cell(z, *context, **keywords) -> like z; usually a module.
        solver: Forward solver; :class:`pydeq.Anderson` by default.
        adjoint: The method to differentiate; :class:`pydeq.Implicit` by default.
        rtol, atol: Tolerances, see :func:`pydeq.fixed_point`.
        max_steps: Maximum number of evaluations of each sample, not counting the one that makes the graph.
        eval_max_steps: The same in evaluation mode; ``max_steps`` by default. The paper's hard stop.
        freeze_rng: Give every evaluation of one call the same random numbers. A cell that draws random numbers, like
            ``nn.Dropout``, has a fixed point only with this; without it there is a warning.
        process_group, sharded: The ranks that solve together, forward and backward, see :func:`pydeq.fixed_point`. All
            of them must call the layer equally often, and differentiate it equally often.
        states_at: Numbers of evaluations, increasing. For each number n, the solution's ``states`` have the output of a
            call with ``max_steps=n``. It has the gradient of one evaluation, or the adjoint's gradient if the solve
            took no more than n evaluations. The last state is the output, so ``states`` has one entry more than
            ``states_at``. See :func:`pydeq.fixed_point_correction`.
        has_aux: The cell returns a pair (state, aux), for example attention maps with the state. ``solution.aux`` is
            the aux at the fixed point, for calls with ``return_solution=True``. With gradients on, the cell is
            evaluated once more at the output, so that aux also has the gradients of the fixed point.
        norm: "parts" for states whose parts have different scales: each part must meet the tolerance, forward and
            backward, see :func:`pydeq.fixed_point`. For ``Implicit`` and ``Phantom``.

    torch.export and ONNX record a layer in evaluation mode with ``eval_max_steps``, see :class:`pydeq.export_mode`.
    Under torch.compile a call is one graph break, and the cell is compiled twice: for the solve, and for the evaluation
    with gradients.

    Raises:
        TypeError, ValueError: If an argument is of the wrong type or out of range.

    Source: Bai, Kolter and Koltun, Deep Equilibrium Models, NeurIPS 2019.

    Examples:
        >>> class Cell(torch.nn.Linear):
        ...     def forward(self, z, x):
        ...         return torch.tanh(super().forward(z) + x)
        >>> deq = pydeq.DEQ(Cell(8, 8))
        >>> z = deq(torch.zeros(4, 8), torch.ones(4, 8))
        >>> z.sum().backward()
        >>> deq.cell.weight.grad.shape
        torch.Size([8, 8])
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
        freeze_rng: bool = False,
        process_group: ProcessGroup | None = None,
        sharded: bool = False,
        states_at: Sequence[int] = (),
        has_aux: bool = False,
        norm: Literal["all", "parts"] = "all",
        **unknown: NoReturn,
    ) -> None:
        super().__init__()
        for name in unknown:
            raise unknown_keyword("DEQ", name, _INIT)
        if not callable(cell) or (isinstance(cell, type) and issubclass(cell, nn.Module)):
            got = shown(cell) if isinstance(cell, type) else type(cell).__name__
            raise TypeError(f"cell must be callable, got {got}")
        self.cell = cell
        self.solver = Anderson() if solver is None else solver
        if not isinstance(self.solver, Solver):
            raise TypeError(f"solver must be a solver like pydeq.Anderson(), got {shown(solver)}")
        self.adjoint = Implicit() if adjoint is None else adjoint
        if not isinstance(self.adjoint, Adjoint):
            raise TypeError(f"adjoint must be an adjoint like pydeq.Implicit(), got {shown(adjoint)}")
        self.adjoint.check(self.solver)
        self.rtol = None if rtol is None else check_tolerance("rtol", rtol)
        self.atol = check_tolerance("atol", atol)
        self.max_steps = check_max_steps("max_steps", max_steps)
        self.eval_max_steps = None if eval_max_steps is None else check_max_steps("eval_max_steps", eval_max_steps)
        self.freeze_rng = bool(freeze_rng)
        self._memory: dict[str, Any] = {}  # state that the adjoint keeps between calls
        if not freeze_rng and (names := random_modules(module_of(cell))):
            warnings.warn(
                f"the cell draws random numbers in training mode ({', '.join(names)}): each evaluation draws"
                " different ones, so there is no fixed point. DEQ(..., freeze_rng=True) draws the same in all"
                " evaluations of a call",
                stacklevel=2,
            )
        if names := batch_norms(module_of(cell)):
            warnings.warn(
                f"the samples of a batch depend on each other through BatchNorm in training mode ({', '.join(names)}),"
                " while a solve treats them as separate problems: use GroupNorm or LayerNorm, or BatchNorm in"
                " evaluation mode",
                CouplingWarning,
                stacklevel=2,
            )
        self.ranks = check_ranks(process_group, sharded)
        if self.ranks is not None and not self.adjoint.distributes:
            raise ValueError(f"adjoint must be one that takes a process_group, got {self.adjoint!r}")
        self.states_at = check_states_at(states_at)
        self.has_aux = bool(has_aux)
        self.norm = check_norm(norm)
        if norm == "parts" and not self.adjoint.normed:
            raise ValueError(f"norm='parts' needs pydeq.Implicit or pydeq.Phantom as the adjoint, got {self.adjoint!r}")
        if norm == "parts" and self.ranks is not None:
            raise ValueError("norm='parts' does not work with process_group")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_memory": {}}  # the memory is neither copied nor saved

    @skipped
    def forward(
        self,
        z0: Any,
        *context: Any,
        return_solution: bool = False,
        solver: Solver | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        max_steps: int | None = None,
        trace: bool = False,
        freeze: bool = True,
        stall: bool = True,
        compact: bool = False,
        batched_context: Sequence[bool] | None = None,
        penalty: JacobianPenalty | None = None,
        **keywords: Any,
    ) -> Any:
        """Solve from ``z0``.

        Args:
            z0: Initial state: a tensor (batch, *state), or several in a tuple, list, dict or namedtuple, nested in any
                way, see :func:`pydeq.fixed_point`. The states that the cell gets and the call returns have its type.
                It gets no gradient under Implicit.
            context: Passed on to the cell; gets gradients.
            keywords: Passed on to the cell, which must take arguments of these names, as in
                ``deq(z0, x, attention_mask=mask)``; get gradients. The names below belong to the layer and are never
                passed on: give the cell an argument of such a name by position.
            return_solution: Also return the :class:`pydeq.Solution`.
            solver, rtol, atol, max_steps: Override the layer's values for this call.
            trace, freeze, stall, compact, batched_context: For the forward solve, see :func:`pydeq.fixed_point`.
                ``Unrolled`` and ``Reversible`` take none of them.
            penalty: Penalizes the Jacobian at the fixed point: ``solution.penalty`` is a term for the loss. It uses the
                evaluation that makes the graph. It evaluates the cell once more if gradients are off, or if the
                adjoint evaluates the cell at other points (``Phantom(form="unroll")``). Penalties by differences make
                more evaluations; a compiled cell stays compiled in them. Penalties by products evaluate a compiled cell
                without the compiler.

        Returns:
            The fixed point, like z0; with ``return_solution`` the pair (fixed point, solution).
        """
        with Compiler() as compiler:
            fn = self.cell  # read once: a module finds its attributes that are modules slowly
            keywords = keywords_for("DEQ.forward", fn, keywords, _CALL, _ELSEWHERE)
            program = exporting()
            freeze_rng = self.freeze_rng and not program  # a program draws no random numbers
            cell = PreparedCell(fn, z0, keywords, self.has_aux, compiler=compiler, freeze_rng=freeze_rng)
            if penalty is not None:
                if not isinstance(penalty, JacobianPenalty):
                    raise TypeError(f"penalty must be a penalty like pydeq.JacobianPenalty(0.5), got {shown(penalty)}")
                if not return_solution:
                    raise ValueError("penalty is returned in the solution: it needs return_solution=True")
            if trace and not return_solution:
                raise ValueError("trace is returned in the solution: it needs return_solution=True")
            if program:
                max_steps = exported_steps(self, max_steps, freeze, penalty)
            steps = self.max_steps if self.training or self.eval_max_steps is None else self.eval_max_steps
            options: dict[str, Any] = {
                "solver": self.solver if solver is None else self._check_solver(solver),
                "rtol": self.rtol if rtol is None else rtol,
                "atol": self.atol if atol is None else atol,
                "max_steps": steps if max_steps is None else max_steps,
                "states_at": self.states_at,
            }
            if trace or not freeze or not stall or compact or batched_context is not None:
                options |= self._check_course(cell, context, trace, freeze, stall, compact, batched_context)
            if self.norm != "all":
                options["norm"] = self.norm
            if self.ranks is not None:
                options |= {"process_group": self.ranks.process_group, "sharded": self.ranks.sharded}
            problem = Problem(cell, cell.adapter.context(context), options, self._memory)
            try:
                result = self._export(problem) if program else self._solve(problem, penalty)
            except TypeError:
                check_context(fn, context, keywords)
                raise
            if max_steps is None and (self.training or self.eval_max_steps is None):
                self._warn_if_unconverged(result.solution, options)
            output = cell.adapter.outside(result.output)
            solution = self._solution(problem, result, penalty) if return_solution else None
            cell.settle()
            return output if solution is None else (output, cell.adapter.solution(solution))

    def _export(self, problem: Problem) -> AdjointResult:
        """Solve by a fixed number of evaluations."""
        with RefuseDraws() if self.freeze_rng else nullcontext():
            solution = solve_exported(problem.cell.call, problem.z0, problem.context, **problem.options)
        return AdjointResult(solution.image, solution, states=solution.states)

    def _solve(self, problem: Problem, penalty: JacobianPenalty | None) -> AdjointResult:
        """Solve for the fixed point, with gradients if they are on."""
        transformed = transforms_active()
        if transformed:
            self._check_transforms(penalty)
        if not (torch.is_grad_enabled() or transformed):
            solution = self.adjoint.evaluate(problem)
            return AdjointResult(solution.image, solution, states=solution.states)
        if not transformed:
            problem.cell.fill_parametrization_cache()
        warn_about_learned_start(problem.z0, self.adjoint)
        return self.adjoint.solve(problem)

    def _warn_if_unconverged(self, solution: Solution, options: dict[str, Any]) -> None:
        """Warn once if a solve has used all its evaluations, unless it is meant to."""
        fixed = options["rtol"] == 0.0 and not options["atol"]  # as many evaluations as max_steps
        if not (fixed or self.adjoint.iterates or transforms_active()):
            warn_if_layer_unconverged(self, solution)

    def _solution(self, problem: Problem, result: AdjointResult, penalty: JacobianPenalty | None) -> Solution:
        """Make the solution, with everything that the call asked for."""
        solution = copy.copy(result.solution)  # the graph keeps the original, which must not keep the graph
        if self.states_at:
            states = differentiable_states(problem, result) if result.states is None else result.states
            solution.states = [*states, result.output]
        self._add_evaluated(solution, result)
        if self.has_aux:
            solution.aux = self._aux(problem, result)
        if penalty is not None:
            # Compiled graphs are not differentiated twice, which a penalty by products with the Jacobian needs.
            fn = problem.cell.for_penalty(penalty.differentiates_twice())
            at = result.linearization if fn is problem.cell.call else None
            solution.penalty = penalty.evaluate(fn, solution.image, problem.context, at, self._reduction())
        return solution

    def _add_evaluated(self, solution: Solution, result: AdjointResult) -> None:
        """Store fn(image) in the solution, if the call has evaluated it."""
        if transforms_active() or (self.ranks is not None and self.ranks.sharded):
            return
        if result.linearization is not None:
            y = tuple(part.detach() for part in result.linearization.y)
        elif result.evaluated is not None:
            y = tuple(part.detach().clone() for part in as_tuple(result.evaluated))  # it may be the output
        else:
            return
        solution._evaluated = solution.image, y

    def _aux(self, problem: Problem, result: AdjointResult) -> Any:
        cell = problem.cell
        if exporting():
            cell.call(result.solution.value, *problem.context)
            return cell.adapter.take_detached_aux()
        if not torch.is_grad_enabled() and not transforms_active():
            return cell.adapter.aux_at_image(cell.call, result.solution, problem.context)
        cell.call(result.output, *problem.context)
        return cell.adapter.take_aux()

    def _check_solver(self, solver: Any) -> Solver:
        if not isinstance(solver, Solver):
            raise TypeError(f"solver must be a solver like pydeq.Anderson(), got {shown(solver)}")
        self.adjoint.check(solver)
        return solver

    def _check_course(
        self,
        cell: PreparedCell,
        context: tuple[Any, ...],
        trace: bool,
        freeze: bool,
        stall: bool,
        compact: bool,
        batched_context: Sequence[bool] | None,
    ) -> dict[str, Any]:
        """Check the options of the forward solve, and return those that differ from their default."""
        given = {"trace": trace, "freeze": freeze, "stall": stall, "compact": compact}
        default = {"trace": False, "freeze": True, "stall": True, "compact": False}
        options: dict[str, Any] = {name: value for name, value in given.items() if value != default[name]}
        if options and self.adjoint.iterates:
            name, value = next(iter(options.items()))
            raise ValueError(f"{name}={value} does not work with {self.adjoint!r}, which has its own iteration")
        if compact:
            if self.norm != "all":
                raise ValueError("norm='parts' does not work with compact=True")
            if transforms_active():
                raise RuntimeError("compact=True does not work under torch.func and forward-mode AD")
            if self.freeze_rng and (names := random_modules(cell.module)):
                raise ValueError(
                    "compact=True changes the batch, and with it the random numbers that freeze_rng=True replays for"
                    f" {', '.join(names)}: use eval mode, or compact=False"
                )
            options["batched_context"] = check_compact(cell.cell, context, batched_context, cell.adapter, freeze)
        elif batched_context is not None:
            raise ValueError("batched_context belongs to compact=True")
        return options

    def _reduction(self) -> Reduction:
        return WHOLE if self.ranks is None else self.ranks.reduction()

    def _check_transforms(self, penalty: JacobianPenalty | None) -> None:
        if not self.adjoint.transforms:
            raise RuntimeError(
                f"{type(self.adjoint).__name__} does not work under torch.func and forward-mode AD: use"
                " pydeq.Implicit or pydeq.Phantom"
            )
        if self.states_at:
            raise RuntimeError("states_at does not work under torch.func and forward-mode AD")
        if penalty is not None:
            raise RuntimeError(
                "penalty does not work under torch.func and forward-mode AD: use pydeq.jacobian_penalty on the output"
            )

    def extra_repr(self) -> str:
        """The settings, for ``print``: those that every layer has, and the others that are not the default."""
        lines = [f"solver={self.solver!r}", f"adjoint={self.adjoint!r}"]
        if not isinstance(self.cell, nn.Module):  # torch shows the modules
            lines.insert(0, f"cell={callable_name(self.cell)}")
        settings = [f"max_steps={self.max_steps}"]
        for name, parameter in inspect.signature(DEQ).parameters.items():
            value = getattr(self, name, parameter.default)
            if name not in ("cell", "solver", "adjoint", "max_steps") and value != parameter.default:
                settings.append(f"{name}={value!r}")
        if self.ranks is not None:
            settings.append(f"process_group of {self.ranks.process_group.size()} ranks, sharded={self.ranks.sharded}")
        return "\n".join([*lines, ", ".join(settings)])
