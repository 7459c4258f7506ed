"""The base class of solvers that users write in plain torch, see docs/solvers.md."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from pydeq.ops import picard_step
from pydeq.ops.capture import capturing
from pydeq.ops.constants import RUNNING, Counter, Scalar, Status
from pydeq.ops.termination import Rules
from pydeq.solvers.base import Solver, Workspace

# The damping of the plain step that checks samples: with a damping below 1, the image of every new best is saved at
# once.
_DAMPING = 0.5


class CustomSolver(Solver):
    """Base class for a solver of your own: you compute the next iterate, pydeq does the rest of the solve.

    z' = propose(z, f, state),   f = fn(z)

    A subclass defines :meth:`propose`. Tolerances, statuses, the best iterate, freezing, retries after NaN, counts,
    traces, compaction and gradients work as in every solve. Hyperparameters are attributes; a frozen dataclass is best.
    The memory of one solve is its state, created by :meth:`init`. See docs/solvers.md.

    Raises:
        TypeError: If a subclass defines no ``propose``, or a ``start``.

    Examples:
        >>> class Average(pydeq.CustomSolver):
        ...     def propose(self, z, f, state):
        ...         return (z + f) / 2
        >>> pydeq.fixed_point(torch.cos, torch.zeros(1), solver=Average(), rtol=1e-5).value
        tensor([0.7391])
    """

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if cls.start is not CustomSolver.start:
            raise TypeError(f"{cls.__name__} must not define start: create the memory of a solve in init(z0)")

    def __new__(cls, *arguments: Any, **keywords: Any) -> CustomSolver:
        if inspect.isabstract(cls):
            raise TypeError(f"{cls.__name__} must define propose(self, z, f, state), which returns the next iterates")
        return super().__new__(cls)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    @abstractmethod
    def propose(self, z: Tensor, f: Tensor, state: Any) -> Tensor:
        """Return the next iterates.

        Rows are samples, and a row of the result must depend on the same row of the arguments only. Rows of samples
        that are done or retried hold f = z, and their rows of the result are not used. A row with NaN or Inf becomes
        f, a plain step. No gradients are recorded.

        Args:
            z: Iterates, [B, D]: a state of any shape or of several tensors, flattened.
            f: The images fn(z) of the iterates, [B, D]. You may keep z and f in ``state``; do not modify them.
            state: What :meth:`init` returned, to be updated in place.

        Returns:
            [B, D], of z's dtype and device.
        """

    def init(self, z0: Tensor) -> Any:
        """Return the state of one solve from its initial iterates ``z0`` [B, D]; None by default.

        It is of any type that can be updated in place, such as a dict or a dataclass.
        """

    def restart(self, state: Any, z: Tensor, rows: Tensor) -> None:
        """Reset ``state`` for the samples ``rows``, which start again from ``z``.

        Called before ``propose`` if fn gave NaN or Inf for a sample, or if other samples moved a sample that was done.
        The default looks for tensors with the batch as their first dimension, in dicts, lists and tuples, also nested,
        and in attributes of ``state``. It sets their ``rows`` to the rows in ``init(z)``, or to 0 if ``init(z)`` has no
        such tensor.

        Args:
            state: As in :meth:`propose`; to be updated in place.
            z: Iterates, [B, D].
            rows: Which samples, bool [B].
        """
        fresh = _tensors(self.init(z))
        for place, tensor in _tensors(state).items():
            if tensor.dim() and len(tensor) == len(rows):
                new = fresh.get(place)
                tensor[rows] = 0 if new is None or new.shape != tensor.shape else new[rows]

    def start(self, flat: Tensor, rules: Rules, max_steps: int) -> Workspace:
        return _CustomWorkspace(flat, rules, max_steps, self)


class _CustomWorkspace(Workspace):
    """4 state vectors next to f, as for Picard iteration, 3 more during a step, and the solver's own state."""

    reports_late: ClassVar[bool] = False

    def __init__(self, flat: Tensor, rules: Rules, max_steps: int, solver: CustomSolver) -> None:
        if capturing(flat.device):
            raise RuntimeError(
                f"{type(solver).__name__} cannot be captured into a CUDA graph: a step of a pydeq.CustomSolver waits"
                " for the device; solve outside of the graph, or use one of pydeq's own solvers"
            )
        super().__init__(flat, rules, max_steps)
        self.solver = solver
        self.state: Any = None
        self.known: Tensor | None = None  # samples that the state has seen, bool [B]
        # Tensors made in inference mode do not count their versions.
        self.watch = not torch.is_inference_mode_enabled()

    def step(self, f: Tensor, k: int) -> None:
        z, next, rules, counters = self.z[k % 2], self.z[1 - k % 2], self.rules, self.counters
        # A plain step, which checks every sample; with damping, the image of every new best is saved at once.
        self.take(picard_step, f, k, k + 1 == self.max_steps, (_DAMPING, 0))
        if k + 1 == self.max_steps:
            return
        status, tried = counters[:, Counter.STATUS], counters[:, Counter.TRIED]
        goes = (status == RUNNING) if rules.freeze else (status <= Status.STALLED)
        finite = self.scalars[:, Scalar.RESIDUAL].isfinite()
        lost, proceed = goes & ~finite, goes & finite
        if bool(lost.any()):  # a retry's first step is a plain one
            next.copy_(torch.where((lost & (tried == 1))[:, None], self.best[1], next))
        count = int(proceed.sum())
        if not count:
            self.known = None if self.known is None else proceed
            return
        rows = None if count == len(f) else proceed[:, None]  # None: all of them; this saves passes over the state
        image = f.clone() if rows is None else torch.where(rows, f, z)
        with torch.autocast(f.device.type, enabled=False):  # autocast is for fn only
            found = self._propose(z.clone(), image, proceed)
        sound = found.isfinite().all(1)
        # A retry would take the same plain step from a new best.
        plain = torch.ones_like(sound) if found is image else ~sound
        tried.copy_(torch.where(proceed & (counters[:, Counter.SINCE_BEST] == 0), plain.int(), tried))
        if not bool(sound.all()):
            found = torch.where(sound[:, None], found, image)
        next.copy_(found if rows is None else torch.where(rows, found, next))
        self.known = proceed & sound

    def _propose(self, z: Tensor, f: Tensor, proceed: Tensor) -> Tensor:
        """Call ``propose`` and check its result. The solver may keep ``z`` and ``f``: nothing else refers to them."""
        solver, name = self.solver, type(self.solver).__name__
        if self.known is None:
            self.state = solver.init(z)
        elif bool((again := proceed & ~self.known).any()):
            solver.restart(self.state, z, again)
        given = {"z": z, "f": f}
        versions = {key: tensor._version for key, tensor in given.items()} if self.watch else {}
        found: Any = solver.propose(z, f, self.state)
        for argument, version in versions.items():
            if given[argument]._version != version:
                raise ValueError(
                    f"{name}.propose must not modify {argument} in place: work on a copy, {argument}.clone()"
                )
        if not isinstance(found, Tensor):
            raise TypeError(f"{name}.propose must return the next iterates, a tensor, got {type(found).__name__}")
        for what, expected, got in (
            ("shape", tuple(z.shape), tuple(found.shape)),
            ("dtype", z.dtype, found.dtype),
            ("device", z.device, found.device),
        ):
            if expected != got:
                raise ValueError(f"{name}.propose must return a tensor of the {what} of z, {expected}, got {got}")
        return found


def _tensors(state: Any) -> dict[str, Tensor]:
    """The tensors in a state, by their places."""
    nested = isinstance(state, Tensor | dict | list | tuple) or not hasattr(state, "__dict__")
    leaves, _ = tree_flatten_with_path(state if nested else vars(state))
    return {keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}
