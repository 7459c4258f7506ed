"""The report of a diagnosis: what was measured, what was tried, and what to change."""

from __future__ import annotations

import os
import textwrap
from dataclasses import dataclass, field
from typing import Any

from pydeq import plots
from pydeq.diagnosis.cell_checks import Habits
from pydeq.diagnosis.contraction import Contraction
from pydeq.diagnosis.trials import Trial, name_of
from pydeq.layer import DEQ

_WIDTH = 110


@dataclass
class Change:
    """One thing to change, which was tried on the batch.

    Attributes:
        reason: Why, in a sentence.
        code: The change as code.
        result: What the batch did with it.
        layer: A layer with this change: with the same cell for changes of settings, with a changed copy for changes of
            the cell. None if the change is none of a layer.

    Examples:
        >>> deq = pydeq.DEQ(lambda z, x: x - 3 * torch.sin(z), solver=pydeq.Picard())
        >>> change = pydeq.diagnose(deq, torch.zeros(4, 1), torch.ones(4, 1)).changes[0]
        >>> change.code
        'deq = pydeq.DEQ(cell, solver=pydeq.Anderson(damping=0.5))'
    """

    reason: str
    code: str
    result: str
    layer: DEQ | None = None


@dataclass
class Report:
    """The result of :func:`pydeq.diagnose`. Print it, or read its attributes.

    Attributes:
        converges: Whether the layer as it is converges for all samples, forward and backward.
        given: The layer's own forward solve.
        trials: Forward solves by other solvers, with more evaluations.
        backward: Solves of the adjoint system at the fixed point, the layer's own first; empty if there is none.
        habits: What the cell does besides mapping a state: random numbers, buffers, samples that depend on each other.
        contraction: The Jacobian at the best state found: spectral radius, eigenvalues, norm.
        at_fixed_point: Whether that state is a fixed point.
        reachable: The smallest relative residual that the dtype allows; None if unknown.
        gradient_error: The relative error of the gradient of the recommended layer, compared with the exact gradient;
            None if there is none to compare.
        own_gradient_error: The same of the layer as it is; None also if it does not converge.
        parts: For states of several tensors, by name: the norm of a part, and its relative residual.
        memory: MiB that the solvers and the graph of an evaluation take, by name.
        changes: What to change, in order; each one was tried, and helped.
        unhelpful: Changes of the cell that were tried and did not help, in words.
        recommended: A ready layer with the same cell that converges on this batch, forward and backward; None if no
            setting does. Then ``changes`` says what to change in the cell.

    Examples:
        >>> report = pydeq.diagnose(lambda z, x: x - 3 * torch.sin(z), torch.zeros(2, 1), torch.ones(2, 1))
        >>> report.converges, report.contraction.radius.float()
        (True, tensor([2.9..., 2.9...]))
    """

    converges: bool
    given: Trial
    trials: list[Trial]
    backward: list[Trial]
    habits: Habits
    contraction: Contraction
    at_fixed_point: bool
    state: str
    reachable: float | None = None
    gradient_error: float | None = None
    own_gradient_error: float | None = None
    parts: dict[str, tuple[float, float]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    unhelpful: list[str] = field(default_factory=list)
    recommended: DEQ | None = None

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw the residuals of all solvers that were tried, and the largest eigenvalues.

        Args:
            path: A file to write; its suffix decides the format.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        made = plots.figure((11.0, 4.5))
        left, right = made.subplots(1, 2, width_ratios=[2, 1])
        curves = {f"the layer: {name_of(self.given.solver)}": self.given} | {name_of(t.solver): t for t in self.trials}
        traces = {name: t.solution.trace for name, t in curves.items() if t.solution.trace is not None}
        plots.draw_residuals(left, traces, self.given.rtol)
        plots.draw_eigenvalues(right, self.contraction.eigenvalues)
        plots.save(made, path)
        return made

    def __repr__(self) -> str:
        return "\n".join([self._verdict(), "", *self._facts(), "", *self._tables(), *self._advice()])

    def _verdict(self) -> str:
        text = f"{self.given.share} samples converge with the layer's settings"
        if self.backward:
            text += f", {self.backward[0].share} in the backward solve"
        return f"Report: {text}"

    def _facts(self) -> list[str]:
        rows = {
            "state": [self.state],
            "Jacobian": [self._jacobian()],
            "cell": self.habits.sentences() or ["no random numbers, no state between calls; samples are independent"],
        }
        if self.gradient_error is not None:
            own, changed = self.own_gradient_error, any(c.layer is self.recommended for c in self.changes)
            errors = [f"{own:.1g} of the layer as it is"] if own is not None else []
            errors += [f"{self.gradient_error:.1g} of the recommended layer"] if changed else []
            rows["gradient"] = [f"relative error {', '.join(errors)}, compared with the exact gradient"]
        if self.parts:
            rows["parts"] = [
                f"{name}: norm {norm:.2g}, relative residual {residual:.1g}"
                for name, (norm, residual) in self.parts.items()
            ]
        if self.memory:
            own, *others = self.memory.items()
            graph = [others.pop()] if others and others[-1][0].startswith("graph") else []
            shown = [own, *([max(others, key=lambda item: item[1])] if others else []), *graph]
            rows["memory"] = [", ".join(f"{name} {size:.3g} MiB" for name, size in shown)]
        if self.notes:
            rows["notes"] = self.notes
        lines = []
        for name, texts in rows.items():
            for i, text in enumerate(texts):
                indent = f"{name if i == 0 else '':<10}"
                lines += textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=" " * 10)
        return lines

    def _jacobian(self) -> str:
        radius = float(self.contraction.radius[self.contraction.worst]) if len(self.contraction.radius) else 0.0
        where = "at the fixed point" if self.at_fixed_point else "at the best state found, which is no fixed point"
        text = f"{where}: {self.contraction.sentence()}"
        if not self.at_fixed_point:
            return text
        if radius >= 1.0:
            return text + ". Plain iteration moves away from this fixed point: it is unstable"
        return text + (". Plain iteration is slow" if radius > 0.95 else "")

    def _tables(self) -> list[str]:
        lines = _table("forward", "evaluations", "factor", [self.given, *self.trials], lambda t: f"{t.rate:.2f}")
        if self.backward:
            lines += ["", *_table("backward", "products", "error", self.backward, lambda t: f"{t.error:.1g}")]
        return lines

    def _advice(self) -> list[str]:
        lines = [""]
        if self.converges and not self.changes:
            return [*lines, "Nothing has to change."]
        if self.recommended is None:
            lines.append("No setting that was tried converges for all samples, forward and backward: change the cell.")
            if not any(change.layer for change in self.changes):
                lines.append("No change of it that was tried does, either: see docs/guides/not-converging.md.")
        lines += ["What to change, in order:"] if self.changes else []
        for number, change in enumerate(self.changes, 1):
            mark = "(report.recommended) " if change.layer is not None and change.layer is self.recommended else ""
            lines += textwrap.wrap(
                f"{number}. {mark}{change.reason}", _WIDTH, subsequent_indent="   ", break_long_words=False
            )
            lines += [f"       {line}" for line in change.code.splitlines()]
            lines += textwrap.wrap(f"tried: {change.result}", _WIDTH, initial_indent="   ", subsequent_indent="   ")
        if self.unhelpful:
            text = f"Tried on the cell, without success: {'; '.join(self.unhelpful)}."
            lines += textwrap.wrap(text, _WIDTH, break_long_words=False)
        return lines


def _table(title: str, counted: str, last: str, trials: list[Trial], shown: Any) -> list[str]:
    rows = [(title, "converged", counted, "residual", last, "")]
    for i, trial in enumerate(trials):
        name, solution = name_of(trial.solver), trial.solution
        limit = f" of {trial.max_products}" if trial.max_products is not None else ""
        products = f", {solution.products}{limit} products" if solution.products else ""
        rows.append((
            f"{name}, the layer's" if i == 0 else name, trial.share, f"{solution.nfe} of {trial.max_steps}{products}",
            f"{trial.residual:.1g}", shown(trial).replace("nan", ""), trial.ends,
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
