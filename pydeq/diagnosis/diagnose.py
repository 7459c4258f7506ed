"""``diagnose``: find out why a layer does not converge on a batch, and what to change."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from pydeq.adjoints import Implicit
from pydeq.arguments import check_context, check_max_steps, keywords_for
from pydeq.cell.linearization import recordable
from pydeq.cell.prepared import PreparedCell, module_of
from pydeq.cell.scope import solve_scope
from pydeq.cell.torch_compile import Compiler
from pydeq.diagnosis import changes
from pydeq.diagnosis.cell_checks import changing_norms, habits_of
from pydeq.diagnosis.contraction import Contraction
from pydeq.diagnosis.report import Change, Report
from pydeq.diagnosis.subject import Residual, Subject, buffers_restored, exact_cotangent, flat, gradients, graph_leaves
from pydeq.diagnosis.trials import (
    BACKWARD,
    FURTHER,
    USUAL,
    Backward,
    Trial,
    code_of,
    name_of,
    try_forward,
)
from pydeq.jacobian import JacobianPenalty
from pydeq.layer import DEQ
from pydeq.ops.constants import Scalar
from pydeq.solution import Solution
from pydeq.solve.solve import solve, stopping_rules
from pydeq.solvers import GMRES, Anderson, Broyden, Picard, Solver
from pydeq.state import as_tuple

# A state this much smaller than the first image tends to 0.
_VANISHED = 1e-3
# Evaluations of the last try, if nothing converges with fewer.
_MOST = 1000
# Products with the Jacobian that NewtonKrylov and TrustRegion may take, per evaluation that the other solvers may take.
# A product costs one evaluation to a few.
_PRODUCTS = 5
# Another solver must need less than this fraction of the evaluations that the layer's own needs.
_PREFERRED = 0.6
# A radius from which on a cell is worth a change even if a solver copes with it.
_LARGE = 1.0
_PENALTY = JacobianPenalty(0.5)
# Evaluations for each step of its training but the first.
_FOLLOWING = 10
# Bounds and factors of weights, tried in this order until one converges. A normalization layer hides the scale of the
# weights before it, so large changes may be needed.
_BOUNDS = (0.9, 0.5, 0.3, 0.1)
_FACTORS = (0.5, 0.1, 0.03, 0.01)
# A gradient with a larger relative error is worth a smaller tolerance: these factors of it are tried.
_INEXACT, _TIGHTER = 0.05, (0.1, 0.01, 0.001)
# Parts whose norms differ by this factor are measured one by one.
_SCALES = 100.0


def diagnose(deq_or_fn: Any, z0: Any, *context: Any, max_steps: int = 200, **keywords: Any) -> Report:
    """Find out why a layer does not converge on a batch, and what to change.

    It measures the cell, tries solvers forward and backward, and tries every change on the batch before it advises it::

        report = pydeq.diagnose(deq, z0, x)
        print(report)
        deq = report.recommended or deq

    A fixed point that is found with a spectral radius above 1 is one that plain iteration leaves. Solvers such as
    Broyden's still find it, but a cell that contracts is better: then the report has changes of the cell, too, such as
    :func:`pydeq.nn.spectral_norm` and :class:`pydeq.JacobianPenalty` for training, each tried on a copy of the cell.

    The layer, its parameters, its buffers and torch's random numbers stay as they are. The cost is some 2,000
    evaluations and 1,000 products with the Jacobian with the default of ``max_steps``, and some 3,000 of each if no
    solver converges: NewtonKrylov is tried only then, with up to 5 products for each of the ``max_steps`` evaluations.

    Args:
        deq_or_fn: A :class:`pydeq.DEQ`, or its cell, or any function (z, *context) -> like z.
        z0: The initial state, shape (batch, *state), or several such tensors, see :func:`pydeq.fixed_point`.
        context: Passed on to the cell.
        max_steps: Evaluations for each try, at least 1.
        keywords: Passed on to the cell.

    Returns:
        The :class:`pydeq.diagnosis.Report`.

    Raises:
        TypeError, ValueError: If an argument, or the result of the cell, is of the wrong type or shape; if z0 is empty;
            or if the layer solves together with other processes.

    Examples:
        >>> deq = pydeq.DEQ(lambda z, x: x - 3 * torch.sin(z), solver=pydeq.Picard())
        >>> report = pydeq.diagnose(deq, torch.zeros(4, 1), torch.ones(4, 1))
        >>> report.converges, report.recommended is not None
        (False, True)
    """
    max_steps = check_max_steps("max_steps", max_steps)
    if not callable(deq_or_fn):
        raise TypeError(f"deq_or_fn must be a pydeq.DEQ or a function, got {type(deq_or_fn).__name__}")
    with Compiler() as compiler, warnings.catch_warnings(), torch.inference_mode(False):
        warnings.simplefilter("ignore")  # the report tells it
        z0, context, keywords = tree_map_only(Tensor, recordable, (z0, context, keywords))
        deq = deq_or_fn if isinstance(deq_or_fn, DEQ) else DEQ(deq_or_fn)
        if deq.ranks is not None:
            raise ValueError("a layer with a process_group cannot be diagnosed: diagnose one without it")
        keywords = keywords_for("diagnose", deq.cell, keywords, ("max_steps",))
        with same_random_numbers(z0), buffers_restored(module_of(deq.cell)), solve_scope():
            try:
                return _Diagnosis(deq, z0, context, keywords, max_steps, compiler).report()
            except TypeError:
                check_context(deq.cell, context, keywords)
                raise


@contextmanager
def same_random_numbers(z0: Any) -> Iterator[None]:
    """Context manager that restores torch's generators at its end."""
    devices = {x.device for x in tree_leaves(z0) if isinstance(x, Tensor) and x.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        yield


class _Diagnosis:
    """The state of one diagnosis."""

    def __init__(
        self,
        deq: DEQ,
        z0: Any,
        context: tuple[Any, ...],
        keywords: dict[str, Any],
        max_steps: int,
        compiler: Compiler,
    ) -> None:
        self.deq, self.z0, self.context, self.keywords, self.max_steps = deq, z0, context, keywords, max_steps
        self.compiler = compiler
        raw = self._subject(deq.cell, deq.freeze_rng)
        self.subject = self._subject(deq.cell, True)
        self.habits = habits_of(raw, self.subject, module_of(deq.cell))
        frozen = deq.freeze_rng or (self.habits.draws and self.habits.replays)
        layout = self.subject.layout
        if not layout.batch * layout.size:
            raise ValueError("z0 must have at least one sample and one entry, else there is nothing to diagnose")
        self.rtol = stopping_rules(layout, deq.rtol).rtol
        own_steps = deq.max_steps if deq.training or deq.eval_max_steps is None else deq.eval_max_steps
        self.own_steps = own_steps
        # Keywords of pydeq.DEQ, as the layer has them; the recommended ones are found from these.
        self.settings: dict[str, Any] = {"freeze_rng": frozen, "norm": deq.norm, "atol": deq.atol, "rtol": deq.rtol}
        given = try_forward(raw, deq.solver, self.rtol, own_steps, atol=deq.atol, norm=deq.norm)
        self.given = given
        self.trials: list[Trial] = []
        self.notes = self._what_is_not_finite()

    def _subject(self, cell: Any, freeze_rng: bool) -> Subject:
        deq = self.deq
        prepared = PreparedCell(
            cell, self.z0, self.keywords, deq.has_aux, compiler=self.compiler, freeze_rng=freeze_rng, scoped=False
        )
        given = prepared.adapter.context(self.context)
        return Subject(lambda z: prepared.call(z, *given), prepared.z0)

    # What is measured

    def _what_is_not_finite(self) -> list[str]:
        """Which samples no setting helps: those that start with NaN or Inf, or have it in their first image."""
        start = self.subject.start
        for name, values in (("z0", start), ("the cell's image of z0", self.subject.image(start))):
            lost = ~values.isfinite().all(1)
            if bool(lost.any()):
                return [f"{name} has NaN or Inf in {int(lost.sum())} of {len(lost)} samples: no setting helps them"]
        return []

    def report(self) -> Report:
        deq, subject = self.deq, self.subject
        self._try_solvers()
        best = self._best()
        z = flat(subject.layout, best.solution.image if best.all_converged else best.solution.value)
        reachable = self._refined(best, z) if best.all_converged and len(z) else None
        if reachable is not None:
            reachable, z = reachable
        contraction = Contraction.at(subject, z, self.habits.coupled)
        backward, system = self._backward(z)
        found = Report(
            converges=False,
            given=self.given,
            trials=self.trials,
            backward=backward,
            habits=self.habits,
            contraction=contraction,
            at_fixed_point=best.all_converged,
            state=self._state(),
            reachable=reachable,
            parts=self._parts(),
            memory=self._memory(),
            notes=self.notes,
        )
        if names := changing_norms(module_of(deq.cell)):
            self.notes.append(
                f"torch's spectral norm ({', '.join(names)}) takes a step of its power iteration in each call, so that"
                " the cell changes: pydeq.nn.spectral_norm takes them once per solve"
            )
        self._recommend(found, system)
        return found

    def _try_solvers(self) -> None:
        """Try the usual solvers, and further ones while none converges."""
        self._set_absolute_tolerance(self.given)
        tried = [solver for solver in USUAL if solver != self.deq.solver]
        for solver in [self.deq.solver, *tried]:  # the layer's with more evaluations
            self._try(solver, max(self.max_steps, self.own_steps))
        if not self._converging():
            self._try_another_tolerance()
        if not self._converging():
            self._try_further()

    def _try_further(self) -> None:
        """Try solvers that are rarely the right ones, until one converges; then more evaluations, if they may help."""
        solved = list(self.trials)
        for solver in FURTHER:
            if solver != self.deq.solver:
                self._try(solver, max(self.max_steps, self.own_steps))
                if self.trials[-1].all_converged:
                    return
        most = max(_MOST, self.max_steps)
        for solver in (Broyden(), Anderson(damping=0.5), self.deq.solver):
            if any(trial.solver == solver and trial.hopeful(most) for trial in solved):
                self._try(Broyden(memory=_MOST) if solver == Broyden() else solver, most)
                if self.trials[-1].all_converged:
                    return

    def _try(self, solver: Solver, max_steps: int) -> None:
        options = {"rtol": self.settings["rtol"], "atol": self.settings["atol"], "norm": self.settings["norm"]}
        rtol = self.rtol if options["rtol"] is None else options["rtol"]
        products = max(_PRODUCTS * self.max_steps, 2 * self.given.solution.products)
        self.trials.append(
            try_forward(self.subject, solver, rtol, max_steps, products, atol=options["atol"], norm=options["norm"])
        )

    def _converging(self) -> list[Trial]:
        """The trials in which all samples converged, the cheapest first, the layer's solver preferred."""
        found = [trial for trial in [self.given, *self.trials] if trial.all_converged]
        return sorted(found, key=lambda t: t.cost * (_PREFERRED if t.solver == self.deq.solver else 1.0))

    def _set_absolute_tolerance(self, trial: Trial) -> None:
        """If the samples that did not converge tend to 0, set a tolerance that they can meet."""
        scalars, lost = trial.solution._scalars, ~trial.solution.converged
        vanished = scalars[:, Scalar.BEST_NORM] < _VANISHED * scalars[:, Scalar.FIRST_NORM]
        if bool(lost.any()) and bool(vanished[lost].all()) and not self.settings["atol"]:
            self.settings["atol"] = _rounded(self.rtol * float(scalars[:, Scalar.FIRST_NORM].min()))

    def _try_another_tolerance(self) -> None:
        """If rounding is what keeps samples from the tolerance, set one that they can meet."""
        best = min(self.trials, key=lambda trial: trial.residual)
        if best.residual > 100.0 * self.subject.eps or self.rtol >= best.residual:
            return
        self.settings["rtol"] = _rounded(2.0 * best.residual)
        for solver in (self.deq.solver, Anderson(memory=20), Broyden()):
            self._try(solver, self.max_steps)

    def _best(self) -> Trial:
        """The trial whose state is to be looked at."""
        converging = self._converging()
        if converging:
            return converging[0]
        return min([self.given, *self.trials], key=lambda trial: trial.residual)

    def _refined(self, best: Trial, z: Tensor) -> tuple[float, Tensor]:
        """The smallest residual that can be reached from z, and where."""
        subject = self.subject
        solver = best.solver if not isinstance(best.solver, Picard) else Anderson(memory=10)
        solution = solve(subject.fn, subject.layout.view(z), solver=solver, rtol=subject.eps, max_steps=self.max_steps)
        better = solution.relative_residual <= subject.residual(z).relative
        return float(solution.relative_residual.max()), torch.where(
            better[:, None], flat(subject.layout, solution.value), z
        )

    def _backward(self, z: Tensor) -> tuple[list[Trial], Backward | None]:
        """Solves of the adjoint system at z, the layer's own first."""
        adjoint = self.deq.adjoint
        if not isinstance(adjoint, Implicit) or not z.numel():
            return [], None
        system = Backward.of(self.subject, z, self.habits.coupled)
        if system.left > 1e-2:
            self.notes.append(
                f"GMRES solves the adjoint system only to {system.left:.1g}: I - J is nearly singular, or J is not"
                " finite, and errors of backward solves are not exact"
            )
        others = [solver for solver in BACKWARD if solver != adjoint.solver]
        tried = [replace(adjoint, max_steps=max(adjoint.max_steps, self.max_steps), solver=one) for one in others]
        return [system.attempt(one) for one in [adjoint, *tried]], system

    def _state(self) -> str:
        layout, deq = self.subject.layout, self.deq
        text = f"{layout.batch} samples of {layout.size} entries, {str(layout.dtype).removeprefix('torch.')}"
        if torch.is_autocast_enabled(layout.device.type):
            text += " under autocast"
        text += f"; rtol {self.rtol:g}"
        if deq.atol:
            text += f", atol {deq.atol:g}"
        return text + f", up to {self.own_steps} evaluations"

    def _parts(self) -> dict[str, tuple[float, float]]:
        """By part, its norm at the layer's solution, and its relative residual; of the worst sample."""
        subject, layout = self.subject, self.subject.layout
        if len(layout.sizes) < 2:
            return {}
        z = flat(layout, self.given.solution.value)
        image = subject.image(z)
        names = [f"part {i}" for i in range(len(layout.sizes))]
        found = {}
        for name, a, b in zip(names, z.split(layout.sizes, 1), image.split(layout.sizes, 1), strict=True):
            residual = Residual.of(a, b)
            found[name] = (float(residual.norm.max()), float(residual.relative.max()))
        return found

    def _memory(self) -> dict[str, float]:
        """MiB of the history of solvers, and of the graph of one evaluation."""
        layout = self.subject.layout
        vector = layout.batch * layout.size * torch.finfo(layout.dtype).bits / 8 / 2**20
        saved: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return x

        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                self.subject.linearize(self.subject.start)
        except RuntimeError:  # the cell uses torch.func, which takes no such hooks
            saved = {}
        found = {}
        for trial in [self.given, *self.trials]:
            if isinstance(trial.solver, Anderson):
                vectors = 2 * min(trial.solver.memory, trial.solution.nfe) + 5
            elif isinstance(trial.solver, Broyden):
                vectors = min(trial.solver.memory, trial.solution.nfe) + 7
            elif isinstance(trial.solver, Picard):
                vectors = 5
            else:
                continue
            found[name_of(trial.solver)] = vectors * vector
        return found | ({"graph of one evaluation": sum(saved.values()) / 2**20} if saved else {})

    # What is recommended

    def _recommend(self, found: Report, system: Backward | None) -> None:
        deq = self.deq
        own = self._run(deq)
        found.converges = own.converged and not (self.habits.draws and not deq.freeze_rng)
        if found.converges:
            found.recommended = deq
        elif self.habits.replays:
            self._find_settings(found)
        layer = found.recommended
        if layer is not None:
            found.gradient_error = self._gradient_error(layer, system)
            if layer is deq:
                found.own_gradient_error = found.gradient_error
            if (found.gradient_error or 0.0) > _INEXACT and isinstance(layer.adjoint, Implicit):
                self._tighten(found, layer, layer.adjoint, found.gradient_error or 0.0, system)
        if not self.habits.replays:
            return  # no change of weights or solvers gives it a fixed point
        if found.recommended is None or float(found.contraction.radius.nan_to_num(torch.inf).max()) >= _LARGE:
            self._change_cell(found)

    def _find_settings(self, found: Report) -> None:
        """Find settings with which the same cell converges, forward and backward, and say why."""
        if self._take_settings(found) or self.trials[-1].max_steps >= _MOST:
            return
        if self._converging():  # to a fixed point where backward does not converge; another solver may find another one
            self._try_further()
            self._take_settings(found)

    def _take_settings(self, found: Report) -> bool:
        trials = self._converging()
        if self.settings["freeze_rng"] != self.deq.freeze_rng:
            trials = [trial for trial in trials if trial is not self.given]
        for trial in trials[:6]:
            for adjoint in self._adjoints(found):
                try:
                    layer = self._layer(self.deq.cell, trial, adjoint)
                except (TypeError, ValueError):  # the adjoint does not take this solver
                    continue
                run = self._run(layer)
                if run.converged:
                    found.recommended = layer
                    reason = self._reason(trial, layer)
                    found.changes.append(Change(reason, self._code(layer), run.sentence(), layer))
                    return True
                if not run.forward:
                    break
        return False

    def _tighten(self, found: Report, layer: DEQ, adjoint: Implicit, before: float, system: Backward | None) -> None:
        """Find a tolerance with which the gradient is more exact than ``before``."""
        for factor in _TIGHTER:
            rtol = float(f"{factor * self.rtol:.0e}")
            if found.reachable is not None and rtol < 2.0 * found.reachable:
                return
            settings: dict[str, Any] = {**self.settings, "rtol": rtol}
            tighter = DEQ(
                self.deq.cell, solver=layer.solver, adjoint=replace(adjoint, max_steps=4 * self.max_steps),
                has_aux=self.deq.has_aux, max_steps=4 * self.max_steps, states_at=self.deq.states_at, **settings,
            )  # fmt: skip
            tighter.training = self.deq.training
            run = self._run(tighter)
            if not run.converged:
                return
            error = self._gradient_error(tighter, system)
            if error is None or error > _INEXACT:
                continue
            tighter.max_steps = _more(run.solution.nfe, layer.max_steps)
            products = 0 if run.backward is None else run.backward.nfe
            tighter.adjoint = replace(adjoint, max_steps=_more(products, adjoint.max_steps))
            found.recommended, found.gradient_error = tighter, error
            whose = "layer" if layer is self.deq else "layer with the change above"
            reason = (
                f"The gradient of the {whose} is {100 * before:.2g}% off: use a smaller tolerance than {self.rtol:g}"
            )
            result = f"{run.sentence()}; the gradient is {100 * error:.2g}% off"
            found.changes.append(Change(reason, self._code(tighter), result, tighter))
            return

    def _adjoints(self, found: Report) -> list[Any]:
        """The layer's adjoint, and others whose solvers converged backward."""
        own = self.deq.adjoint
        if not isinstance(own, Implicit):
            return [own]
        others = sorted((t for t in found.backward[1:] if t.all_converged), key=lambda t: t.solution.nfe)
        made = [replace(own, solver=t.solver, max_steps=_more(t.solution.nfe, own.max_steps)) for t in others]
        last = replace(own, solver=GMRES(restart=50), max_steps=max(own.max_steps, 2 * self.max_steps))
        if found.backward and not found.backward[0].all_converged:
            return [*made, last, own]
        return [own, *made, last]

    def _layer(self, cell: Any, trial: Trial, adjoint: Any) -> DEQ:
        """The layer with other settings."""
        deq = self.deq
        steps = max(deq.max_steps, self.own_steps)
        layer = DEQ(
            cell, solver=trial.solver, adjoint=adjoint, max_steps=_more(trial.solution.nfe, steps),
            has_aux=deq.has_aux, states_at=deq.states_at, **self.settings,
        )  # fmt: skip
        layer.training = deq.training
        return layer

    def _reason(self, trial: Trial, layer: DEQ) -> str:
        deq, reasons = self.deq, []
        if layer.freeze_rng != deq.freeze_rng:
            reasons.append("the cell draws random numbers, so that only freeze_rng=True gives it a fixed point")
        if layer.atol != deq.atol:
            reasons.append("the fixed point is 0, or nearly, where only an absolute tolerance can be met")
        if layer.rtol != deq.rtol:
            reasons.append(f"the tolerance {self.rtol:g} is below what {self.subject.layout.dtype} reaches")
        if layer.solver != deq.solver:
            reasons.append(f"{name_of(layer.solver)} converges where {name_of(deq.solver)} does not")
        elif layer.max_steps != self.own_steps and not self.given.all_converged and not reasons:
            reasons.append(f"{name_of(deq.solver)} needs more than {self.own_steps} evaluations")
        if layer.adjoint != deq.adjoint:
            reasons.append(f"backward does not converge with {name_of(deq.adjoint)}")
        text = "; ".join(reasons or ["the layer converges with these settings"])
        if radius := self._expands(trial):
            text += f". The fixed point has a spectral radius of {radius:.3g} and is unstable under plain iteration"
        return text[0].upper() + text[1:]

    def _expands(self, trial: Trial) -> float:
        """The spectral radius where a trial ended, if it is above 1; else 0."""
        z = flat(self.subject.layout, trial.solution.image)
        radius = float(Contraction.at(self.subject, z, self.habits.coupled).radius.max())
        return radius if radius > _LARGE else 0.0

    def _code(self, layer: DEQ, cell: str = "cell") -> str:
        deq, given = self.deq, {"solver": code_of(layer.solver)}
        if layer.max_steps != 50:
            given["max_steps"] = str(layer.max_steps)
        for name, default in (
            ("rtol", None),
            ("atol", 0.0),
            ("freeze_rng", False),
            ("norm", "all"),
            ("has_aux", False),
        ):
            value = getattr(layer, name)
            if value != default:
                given[name] = repr(value)
        if layer.adjoint != Implicit():
            given["adjoint"] = code_of(layer.adjoint)
        if deq.states_at:
            given["states_at"] = repr(deq.states_at)
        entries = [cell, *(f"{name}={value}" for name, value in given.items())]
        line = f"deq = pydeq.DEQ({', '.join(entries)})"
        return line if len(line) <= 100 else "deq = pydeq.DEQ(\n    " + ",\n    ".join(entries) + ",\n)"

    def _run(self, layer: DEQ) -> _Run:
        """Run a layer forward and, if something requires grad, backward."""
        with torch.enable_grad(), torch.inference_mode(False):
            z, solution = layer(self.z0, *self.context, return_solution=True, **self.keywords)
            outputs = [part for part in tree_leaves(z) if isinstance(part, Tensor) and part.requires_grad]
            leaves = graph_leaves(outputs)
            backward = None
            if outputs and leaves:
                generator = torch.Generator(outputs[0].device).manual_seed(1)
                seeds = [
                    torch.randn(x.shape, generator=generator, device=x.device, dtype=torch.float64).to(x.dtype)
                    for x in outputs
                ]
                torch.autograd.grad(outputs, leaves, seeds, allow_unused=True)
                backward = solution.backward
        return _Run(solution, backward)

    def _gradient_error(self, layer: DEQ, system: Backward | None) -> float | None:
        """The relative error of a layer's gradient, compared with the exact one at a more exact fixed point."""
        subject = self.subject
        if system is None and isinstance(layer.adjoint, Implicit):
            return None
        with torch.enable_grad(), torch.inference_mode(False):
            z = layer(self.z0, *self.context, **self.keywords)
            outputs = [part for part in tree_leaves(z) if isinstance(part, Tensor)]
            outputs = [torch.view_as_real(part) if part.is_complex() else part for part in outputs]
            near = flat(subject.layout, tuple(outputs) if subject.layout.is_tuple else outputs[0])
            at = subject.linearize(near)
            leaves = graph_leaves(at.y, at.z)
            if not leaves:
                return None
            generator = torch.Generator(near.device).manual_seed(1)
            v = torch.randn(near.shape, generator=generator, device=near.device, dtype=torch.float64).to(near.dtype)
            got = gradients(tuple(outputs), leaves, as_tuple(subject.layout.view(v)))
            refined = solve(
                subject.fn, subject.layout.view(near), solver=Broyden(), rtol=10.0 * subject.eps, max_steps=100
            )
            exact_z = flat(subject.layout, refined.value)
            if not bool(((exact_z - near).norm(dim=1) <= 0.3 * exact_z.norm(dim=1)).all()):
                return None  # another fixed point
            at = subject.linearize(exact_z)
            u, left = exact_cotangent(at, v, self.habits.coupled)
            if left > 1e-2:
                return None
            exact = gradients(at.y, leaves, as_tuple(subject.layout.view(u)))
        size = math.hypot(*(float(x.abs().double().norm()) for x in exact))
        error = math.hypot(*(float((x - y).abs().double().norm()) for x, y in zip(got, exact, strict=True)))
        return error / size if size else None

    # Changes of the cell

    def _change_cell(self, found: Report) -> None:
        """Try changes of the cell on copies, with the layer's own solver; list those that help."""
        if self.habits.batch_norms:
            evaluating = self._try_change(
                found,
                f"BatchNorm ({', '.join(self.habits.batch_norms)}) makes the batch one system; in evaluation mode it"
                " uses running statistics, and GroupNorm never looks at other samples",
                "cell.eval()  # or use torch.nn.GroupNorm",
                lambda cell: bool(cell.eval()),
            )
            if evaluating is not None:
                self._keep(found, "BatchNorm in evaluation mode", [evaluating])
        self._try_changes(found, "a spectral norm of at most", _BOUNDS, self._try_bound)
        self._try_changes(found, "weights times", _FACTORS, self._try_factor)
        helps = self._try_change(
            found,
            f"Train with a penalty on the Jacobian; start with the strength {_PENALTY.strength}, and raise it until the"
            " spectral radius stays below 1",
            f"z, solution = deq(z0, x, return_solution=True, penalty=pydeq.JacobianPenalty({_PENALTY.strength}))\n"
            "loss = task_loss(z) + solution.penalty",
            self._train,
            "20 steps of Adam on the penalty only: ",
        )
        if helps is not None:
            self._keep(found, f"20 training steps on the penalty {_PENALTY.strength} on the Jacobian", [helps])

    def _try_changes(
        self, found: Report, name: str, values: Sequence[float], attempt: Callable[[Report, float], _Attempt | None]
    ) -> None:
        """Try a change with each value, until all samples converge; keep the best one if it helps."""
        attempts, tried = [], []
        for value in values:
            one = attempt(found, value)
            if one is None:
                break
            attempts.append(one)
            tried.append(f"{value:g}")
            if one.change.layer is not None:
                break
        if attempts:
            self._keep(found, f"{name} {', '.join(tried)}", attempts)

    def _keep(self, found: Report, name: str, attempts: list[_Attempt]) -> None:
        """List the best of several attempts if it helps, or say that they did not help."""
        best = max(attempts, key=lambda one: (one.helps, one.change.layer is not None, one.converged))
        if best.helps:
            found.changes.append(best.change)
        else:
            found.unhelpful.append(name)

    def _try_bound(self, found: Report, bound: float) -> _Attempt | None:
        return self._try_change(
            found,
            f"Weights whose spectral norm is at most {bound:g} make the cell contract more, also while it is trained",
            f'pydeq.nn.apply_norm(cell, "spectral_norm", bound={bound:g})\n',
            lambda cell: bool(changes.with_spectral_norm(cell, bound)),
        )

    def _try_factor(self, found: Report, factor: float) -> _Attempt | None:
        return self._try_change(
            found,
            f"Start training from weights that are {factor:g} times as large",
            "with torch.no_grad():\n    for weight in cell.parameters():\n        if weight.dim() >= 2:\n"
            f"            weight.mul_({factor:g})",
            lambda cell: bool(changes.with_smaller_weights(cell, factor)),
        )

    def _train(self, cell: Any) -> bool:
        subject = self._subject(cell, True)
        state, steps = subject.z0, self.own_steps

        def find() -> Tensor:
            nonlocal state, steps
            state = solve(subject.fn, state, solver=Broyden(), max_steps=steps).value
            steps = min(self.own_steps, _FOLLOWING)  # the fixed point moves little in a training step
            return flat(subject.layout, state)

        return changes.train_with_penalty(cell, _PENALTY, subject.fn, find, subject.layout.view)

    def _try_change(
        self, found: Report, reason: str, code: str, change: Callable[[Any], bool], prefix: str = ""
    ) -> _Attempt | None:
        """Change a copy of the cell and run it; None if the change cannot be made."""
        cell = changes.copied(self.deq.cell)
        if cell is None or not changes_something(change, cell):
            return None
        deq = self.deq
        layer = DEQ(
            cell, solver=deq.solver, adjoint=deq.adjoint, max_steps=max(deq.max_steps, self.own_steps),
            has_aux=deq.has_aux, **self.settings,
        )  # fmt: skip
        layer.training = deq.training
        subject = self._subject(cell, True)
        run = self._run(layer)
        z = flat(subject.layout, run.solution.value if not run.forward else run.solution.image)
        z = z.nan_to_num(0.0, 0.0, 0.0)
        radius = float(Contraction.at(subject, z, self.habits.coupled).radius.max())
        before = float(found.contraction.radius.nan_to_num(torch.inf).max())
        converged = int(run.solution.converged.sum())
        more = converged > int(self.given.solution.converged.sum())
        # Where no fixed point is known, the radius before is one of another state.
        helps = (radius < before and (run.converged or more)) or (run.converged and found.recommended is None)
        result = f"{prefix}{run.sentence()}; spectral radius {radius:.3g} (was {before:.3g})"
        code = code.rstrip("\n")
        if "task_loss" not in code:
            code += "\n" + self._code(layer)
        return _Attempt(Change(reason, code, result, layer if run.converged else None), converged, helps)


@dataclass(frozen=True)
class _Attempt:
    """A change of the cell that was tried: its ``layer`` is None if it does not converge.

    Args:
        converged: The number of samples that converge forward.
        helps: Whether it is better than the cell as it is.
    """

    change: Change
    converged: int
    helps: bool


class _Run:
    """One call of a layer, forward and backward."""

    def __init__(self, solution: Solution, backward: Solution | None) -> None:
        self.solution, self.backward = solution, backward
        self.forward = bool(solution.converged.all())
        self.converged = self.forward and (backward is None or bool(backward.converged.all()))

    def sentence(self) -> str:
        solution = self.solution
        text = f"{_share(solution)} samples converge in {solution.nfe} evaluations"
        if solution.products:
            text += f" and {solution.products} products"
        if self.backward is not None:
            text += f", backward {_share(self.backward)} in {self.backward.nfe} products"
        return text


def changes_something(change: Callable[[Any], bool], cell: Any) -> bool:
    """Whether a change could be made to a cell."""
    try:
        return change(cell)
    except RuntimeError:  # a cell without the derivatives that the change needs
        return False


def _share(solution: Solution) -> str:
    return f"{int(solution.converged.sum())} of {len(solution.converged)}"


def _more(evaluations: int, least: int) -> int:
    """A cap with some room above a number of evaluations, at least ``least``."""
    return max(least, 10 * math.ceil(0.15 * evaluations))


def _rounded(value: float) -> float:
    """The next number of one digit that is not smaller."""
    if not value > 0.0 or not math.isfinite(value):
        return value
    unit = 10.0 ** math.floor(math.log10(value))
    return float(f"{math.ceil(value / unit) * unit:.0e}")
