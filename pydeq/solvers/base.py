"""The base classes of solvers: hyperparameters, and the workspace of one solve."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from pydeq.arguments import check_number
from pydeq.ops import picard_step
from pydeq.ops.constants import CUDA_VECTORS, RUNNING, Counter, Progress, Scalar, Status
from pydeq.ops.kernels import cuda_loaded
from pydeq.ops.reduction import WHOLE
from pydeq.ops.registry import refuse_gradients
from pydeq.ops.step import StepOperation
from pydeq.ops.termination import Rules
from pydeq.solvers.buffers import Scratch, empty, pair, zeros

_SCALARS, _COUNTERS, _PROGRESS = len(Scalar), len(Counter), len(Progress)  # an enum takes long to count its members


class Workspace(ABC):
    """The buffers of one solve, allocated once. Users' solvers do not define one: see :class:`pydeq.CustomSolver`.

    The iterates of step k are in ``z[k % 2]``, and the step writes the next ones to the other buffer, so that the
    previous iterate is still there if it turns out to be the best.

    Args:
        flat: Initial iterates, [B, D], contiguous.
        rules: When a sample stops.
        max_steps: Evaluations of each sample at most.
        own: Shapes of the solver's own buffers that start as zeros, float64; ``zeroed`` has the buffers.
    """

    reports_late: ClassVar[bool] = True
    """Whether a step on a GPU may return before it has reported."""

    product: Callable[[Tensor], Tensor]
    """v -> J v for v [B, D], J the Jacobian of fn at the newest evaluation; set by the loop for a NewtonSolver."""

    jacobian: Callable[[Tensor, Tensor], Tensor]
    """(z, fn(z)) -> the Jacobian of fn at z for each sample, [B, D] -> [B, D, D]; likewise."""

    def __init__(self, flat: Tensor, rules: Rules, max_steps: int, *own: tuple[int, ...]) -> None:
        batch = flat.shape[0]
        shape = flat.shape
        self.z = pair(flat)
        self.best = empty(flat, 2, *shape)
        self.scalars, self.counters, *self.zeroed = zeros(
            flat,
            (torch.float64, (batch, _SCALARS)),
            (torch.int32, (batch, _COUNTERS)),  # RUNNING is 0
            *((torch.float64, shape) for shape in own),
        )
        self.progress = torch.empty(_PROGRESS, dtype=torch.int64, device="cpu")  # read after a step wrote it
        self.scratch = Scratch(flat)  # the history; a solve that ends without an exception releases it
        # For half states, the iterates before they were rounded, if the solver keeps them.
        self.iterate = flat.new_empty(0)
        self.rules = rules
        self.max_steps = max_steps
        self.damping = 1.0  # the damping of a plain step

    @abstractmethod
    def step(self, f: Tensor, k: int) -> None:
        """Take step ``k`` with the images ``f`` [B, D] of ``z[k % 2]``.

        It judges every sample, writes the next iterates to the other buffer, and reports to ``progress``: see
        :func:`pydeq.ops.picard_step` for all that it reads and writes.
        """

    def take(
        self, operation: StepOperation, f: Tensor, k: int, last: bool, own: tuple[Any, ...], at: int | None = None
    ) -> None:
        """Run a solver's operation as step ``k``.

        Args:
            f: Images of the iterates of step ``at``, by default ``k``; [B, D].
            last: Whether no evaluation follows.
            own: The arguments that only this operation has.
        """
        rules = self.rules
        parity = k % 2 if at is None else at % 2
        z = self.z[parity]
        if torch.is_grad_enabled():
            refuse_gradients(operation.name, z, f)
        run = operation.run if rules.reduction is WHOLE else operation.completed_by(rules.reduction)
        run(
            z, f, self.z[1 - parity], self.best, self.scalars, self.counters, self.progress,
            k, rules.rtol, rules.atol, rules.eps, rules.freeze, rules.stall, last, *own,
        )  # fmt: skip

    def look_back(self, f: Tensor, k: int, last: bool) -> None:
        """Check samples that were done before evaluation ``k`` by their images ``f`` [B, D] in that evaluation.

        Samples that are no longer done run again, from plain steps; with ``last`` they end as MAX_STEPS.
        """
        self.take(picard_step, f, k, last, (self.damping, k), at=k - 1)

    def unfreeze(self, k: int) -> None:
        """After ``k`` evaluations, iterate all samples that are not lost, each from its value."""
        self.rules = dataclasses.replace(self.rules, freeze=False)
        status = self.counters[:, Counter.STATUS]
        stalled = status == Status.STALLED
        counted = (status == RUNNING) | (status == Status.CONVERGED) | stalled
        self.counters[:, Counter.EVALUATIONS].masked_fill_(counted, k)
        self.counters[:, Counter.COUNT].masked_fill_(stalled, 0)  # its history does not end at the value
        if self.iterate.numel():
            self.iterate.copy_(self.z[k % 2])


class Solver(ABC):
    """Hyperparameters of a fixed-point solver; frozen, without state.

    Base class of the package's solvers, whose steps are operations. For one of your own, see
    :class:`pydeq.CustomSolver`.

    Examples:
        >>> isinstance(pydeq.Anderson(), pydeq.solvers.Solver)
        True
    """

    reduces: ClassVar[bool] = False
    """Whether its steps use ``rules.reduction`` for all sums over a state, so that states may be sharded."""

    @abstractmethod
    def start(self, flat: Tensor, rules: Rules, max_steps: int) -> Workspace:
        """Allocate the workspace of one solve from initial iterates [B, D]."""


class NewtonSolver(Solver):
    """A solver whose steps need more than images of fn: products with its Jacobian, or the Jacobian itself."""


def check_vectors(device: torch.device, rules: Rules, needed: int, max_steps: int, **depth: int) -> None:
    """Raise before a solve on a GPU if its history may have more vectors than the kernels take.

    Args:
        needed: Vectors that the solve may keep.
        depth: The hyperparameter that limits the vectors, as a keyword; its value is ``needed`` or one less.

    Raises:
        ValueError: If the solve needs more vectors than CUDA kernels take.
    """
    if needed <= CUDA_VECTORS or device.type != "cuda" or not cuda_loaded() or rules.reduction is not WHOLE:
        return
    ((name, value),) = depth.items()
    raise ValueError(
        f"on a GPU {name} must be at most {CUDA_VECTORS - max(0, needed - value)}, or max_steps at most"
        f" {CUDA_VECTORS + 1}, got {name} {value} and max_steps {max_steps}"
    )


def check_damping(damping: Any) -> float:
    damping = check_number("damping", damping)
    if not 0.0 < damping <= 1.0:
        raise ValueError(f"damping must be in (0, 1], got {damping}")
    return damping
