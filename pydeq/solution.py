"""The result of a solve: values, statuses and counts."""

from __future__ import annotations

import copy
import os
import sys
import textwrap
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pydeq import plots
from pydeq.ops.constants import Counter, Scalar, Status
from pydeq.ops.reduction import WHOLE, norms, wide_dtype
from pydeq.state import State, as_tuple

_CONTRACT = "make fn more contractive (pydeq.nn.spectral_norm, pydeq.JacobianPenalty)"
ADVICE = {
    Status.MAX_STEPS: f"increase max_steps, try pydeq.Broyden(), or {_CONTRACT}",
    Status.STALLED: "rounding is the limit: loosen rtol or use a wider dtype",
    Status.DIVERGED: "try pydeq.Broyden(), also with line_search=True, or a smaller damping"
    f" (pydeq.Anderson(damping=0.5)), or {_CONTRACT}",
    Status.NONFINITE: "fn returned NaN or Inf, also for shorter steps: check its inputs and parameters, or iterate with"
    " pydeq.Picard(damping=0.5)",
}
_STUCK = (
    f"try pydeq.Broyden(), also with line_search=True, pydeq.Anderson(memory=20), pydeq.NewtonKrylov(), or {_CONTRACT}"
)
_STATUS = int(Counter.STATUS)
_CONVERGED = int(Status.CONVERGED).to_bytes(4, sys.byteorder)
# Fewer evaluations do not show whether a residual still falls.
_LONG = 20
# If the norm of the image is below this fraction of the norm of fn(z0), the solution is taken for 0.
_VANISHED = 1e-6


class Solution:
    """The solution of a batch of fixed-point problems.

    It has three states, one evaluation of fn apart. ``residual`` and ``status`` describe ``value``. ``image`` is
    fn(value); a :class:`pydeq.DEQ` returns it without gradients. With gradients on, a DEQ returns fn(image), except
    with ``Unrolled`` and ``Reversible``. If fn contracts, each state is closer to the fixed point than the one before.
    If it expands, the output may be much further away than ``residual`` says: see ``image_residual``.

    Attributes:
        value: For each sample the iterate z with the smallest residual, or the one that met the tolerance; like z0. All
            CONVERGED samples meet it at the same evaluation, even if samples depend on each other.
        image: fn(value), kept from the solve; like z0.
        nfe: The number of calls of fn; on a GPU at most one more than the slowest sample needed.
        products: The number of products with the Jacobian of fn, each for the whole batch; only
            :class:`pydeq.NewtonKrylov` and :class:`pydeq.TrustRegion` take any. Differences, and TrustRegion's
            evaluations for products, count here, too: ``nfe`` does not have these calls of fn.
        trace: Relative residuals of the evaluations, [nfe, B], NaN after a sample stopped; None unless asked for.
        states: The states asked for by ``states_at``, each like z0; those of a :class:`pydeq.DEQ` have gradients, and
            its output is the last one.
        penalty: The :class:`pydeq.JacobianPenalty` asked for, 0-d, to be added to the loss; set by :class:`pydeq.DEQ`.
        aux: The aux that fn returned at the solution, with ``has_aux=True``; else None.

    Examples:
        >>> solution = pydeq.fixed_point(torch.cos, torch.zeros(2), solver=pydeq.Picard(), trace=True)
        >>> solution.value, solution.nfe, solution.trace.shape
        (tensor([0.7388, 0.7388]), 19, torch.Size([19, 2]))
    """

    def __init__(
        self, value: State, image: State, nfe: int, scalars: Tensor, counters: Tensor, trace: Tensor | None
    ) -> None:
        self.value: Any = value
        self.image: Any = image
        self.nfe = nfe
        self.products = 0
        self.trace = trace
        self.states: list[State] = []
        # Shared with copies: the graph that sets it must not keep the states of a copy.
        self._backward: list[Solution | None] = [None]
        self.penalty: Tensor | None = None
        self.aux: Any = None
        part = value if isinstance(value, Tensor) else value[0]
        self._dtype = wide_dtype(part.dtype)
        self._evaluated: tuple[State, State] | None = None  # image and fn(image), where that was evaluated
        self._restore: Callable[[State], Any] | None = None  # converts to the user's type of state
        self._scalars = scalars  # [B, len(Scalar)]
        self._counters = counters  # [B, len(Counter)]

    @property
    def backward(self) -> Solution | None:
        """The adjoint's solution, once backward of a :class:`pydeq.DEQ` has run; None if its adjoint solves nothing."""
        solution = self._backward[0]
        return solution if solution is None or self._restore is None else solution.restored(self._restore)

    @backward.setter
    def backward(self, solution: Solution | None) -> None:
        self._backward[0] = solution

    def restored(self, restore: Callable[[State], Any]) -> Solution:
        """Copy of this solution with ``restore`` applied to every state, also to the states of ``backward``."""
        other = copy.copy(self)
        other.value, other.image = restore(self.value), restore(self.image)
        other.states = [restore(state) for state in self.states]
        other._restore = restore
        return other

    @cached_property
    def status(self) -> Tensor:
        """The status of each sample, int8 [B]; values of :class:`pydeq.Status`. ``statuses`` has their names."""
        return self._counters[:, Counter.STATUS].to(torch.int8)

    @property
    def statuses(self) -> list[str]:
        """The status of each sample by name, such as "CONVERGED" or "MAX_STEPS"."""
        return [Status(code).name for code in self.status.tolist()]

    @cached_property
    def converged(self) -> Tensor:
        """Whether each sample met the tolerance, bool [B]."""
        return self._counters[:, Counter.STATUS] == Status.CONVERGED

    @cached_property
    def all_known_to_converge(self) -> bool:
        """Whether all samples are known to have converged, without waiting for a device."""
        counters = self._counters
        if type(counters) is not Tensor or not counters.is_cpu:
            return False
        # Compared as bytes: a comparison of tensors, like one of arrays, takes as long as a small evaluation.
        return counters.numpy()[:, _STATUS].tobytes() == _CONVERGED * counters.shape[0]

    @cached_property
    def residual(self) -> Tensor:
        """||fn(value) - value|| of each sample, [B]; float64 for float64 states, else float32."""
        return self._scalars[:, Scalar.BEST].to(self._dtype)

    @cached_property
    def relative_residual(self) -> Tensor:
        """||fn(value) - value|| / ||fn(value)|| of each sample, [B]; 0 for 0/0, inf for r/0."""
        residual = self._scalars[:, Scalar.BEST]
        return relative(residual, self._scalars[:, Scalar.BEST_NORM]).to(self._dtype)

    @cached_property
    def image_residual(self) -> Tensor | None:
        """||fn(image) - image|| of each sample, [B], like ``residual``; None if fn was not evaluated at the image.

        A :class:`pydeq.DEQ` with gradients on evaluates fn at the image, except with ``Unrolled`` and ``Reversible``,
        under torch.func, and with sharded states.
        """
        return None if self._evaluated is None else self._measured[0].to(self._dtype)

    @cached_property
    def _measured(self) -> tuple[Tensor, Tensor]:
        """||fn(image) - image|| and ||fn(image)||, [B] each."""
        assert self._evaluated is not None
        image, next = (torch.cat([part.flatten(1) for part in as_tuple(state)], 1) for state in self._evaluated)
        residual, norm = norms([next.to(self._dtype) - image.to(self._dtype), next], WHOLE)
        return residual, norm

    @cached_property
    def sample_nfe(self) -> Tensor:
        """Evaluations spent on each sample, int64 [B]."""
        return self._counters[:, Counter.EVALUATIONS].long()

    def advice(self) -> str:
        """Advice on the samples that did not converge, a line for each kind of them; empty if all converged."""
        counts = _count_statuses(self.status)
        texts = {status: text for status, text in ADVICE.items() if status in counts}
        if not texts:
            return ""
        stuck = (self.status == Status.MAX_STEPS) & (2 * self._counters[:, Counter.SINCE_BEST] > self.sample_nfe)
        if wandering := int((stuck & (self.sample_nfe >= _LONG)).sum()):
            texts[Status.MAX_STEPS] = (
                f"the residual of {wandering} has not fallen for half of the evaluations: {_STUCK}"
            )
        if Status.MAX_STEPS in texts and Status.DIVERGED in texts:  # say it once
            texts[Status.MAX_STEPS] = texts[Status.MAX_STEPS].removesuffix(f", or {_CONTRACT}")
        advice = [f"{counts[status]} {status.name}: {text}" for status, text in texts.items()]
        short = (self.status == Status.MAX_STEPS) | (self.status == Status.STALLED)
        scalars = self._scalars
        if vanished := int((short & (scalars[:, Scalar.BEST_NORM] < _VANISHED * scalars[:, Scalar.FIRST_NORM])).sum()):
            advice.append(f"{vanished} with a solution of 0, where a relative tolerance cannot be met: set atol")
        if moved := int(((self.status == Status.MAX_STEPS) & (self.sample_nfe < self.sample_nfe.max())).sum()):
            advice.append(
                f"{moved} had met the tolerance before other samples moved them: one coupled system, like the nodes of"
                " a graph, is one sample, z[None]"
            )
        return "\n".join([*advice, "pydeq.diagnose tries what helps on the batch"])

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw the relative residual of each sample against evaluations; needs a solve with ``trace=True``.

            z, solution = deq(z0, x, return_solution=True, trace=True)
            solution.plot("residuals.png")

        Args:
            path: A file to write; its suffix decides the format.

        Returns:
            The matplotlib figure.

        Raises:
            ValueError: If there is no trace.
            ImportError: If matplotlib is not installed.
        """
        if self.trace is None:
            raise ValueError("a plot needs the residuals of all evaluations: solve with trace=True")
        made = plots.figure()
        plots.draw_residuals(made.subplots(), {f"{len(self.status)} samples, nfe={self.nfe}": self.trace})
        plots.save(made, path)
        return made

    def __repr__(self) -> str:
        batch = len(self.status)
        counts = _count_statuses(self.status)
        text = f"{counts.get(Status.CONVERGED, 0)} of {batch} samples converged, nfe={self.nfe}"
        if batch:
            found = self.relative_residual.double()
            text += f", relative residual median {found.median():.2g}, max {found.max():.2g}"
            if self._evaluated is not None:
                text += f", of the image max {relative(*self._measured).max():.2g}"
        advice = self.advice()
        return f"Solution({text})" + (f"\n{textwrap.indent(advice, '  ')}" if advice else "")


class ConvergenceWarning(UserWarning):
    """A forward or a backward solve of a layer did not converge.

    Examples:
        >>> import warnings
        >>> deq = pydeq.DEQ(lambda z: 2 * z + 1, solver=pydeq.Picard(), max_steps=5)
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", pydeq.ConvergenceWarning)
        ...     deq(torch.zeros(1))
        Traceback (most recent call last):
            ...
        pydeq.solution.ConvergenceWarning: the forward solve of a pydeq.DEQ(<lambda>, ...) left samples unconverged: ...
    """


class CouplingWarning(UserWarning):
    """Samples of a batch, which a solve treats as separate problems, depend on each other.

    Examples:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", pydeq.CouplingWarning)
        ...     pydeq.DEQ(torch.nn.BatchNorm1d(4))
        Traceback (most recent call last):
            ...
        pydeq.solution.CouplingWarning: the samples of a batch depend on each other through BatchNorm ...
    """


class ConvergenceError(RuntimeError):
    """Raised under ``throw=True`` when a sample did not converge; ``solution`` has the result so far.

    Examples:
        >>> try:
        ...     pydeq.fixed_point(lambda z: 2 * z + 1, torch.zeros(1), solver=pydeq.Picard(), max_steps=5, throw=True)
        ... except pydeq.ConvergenceError as error:
        ...     error.solution.nfe
        5
    """

    def __init__(self, solution: Solution) -> None:
        super().__init__(repr(solution))
        self.solution = solution


def relative(residual: Tensor, norm: Tensor) -> Tensor:
    """residual / norm, 0 for 0/0 and inf for r/0; NaN norms give inf."""
    return torch.where(residual == 0, 0.0, residual / norm).nan_to_num(torch.inf, torch.inf, -torch.inf)


def _count_statuses(status: Tensor) -> dict[Status, int]:
    codes, counts = status.unique(return_counts=True)
    return {Status(code): count for code, count in zip(codes.tolist(), counts.tolist(), strict=True)}
