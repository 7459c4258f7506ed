"""Values that modules keep for one solve: dropout masks, directions of spectral norms, normalized weights.

A map has a fixed point only if it stays the same between evaluations. Some modules draw a random value, or compute a
costly value that does not depend on the state. They keep this value in a scope. One scope serves a solve and all later
evaluations for its gradients. The module itself keeps no such value, so no value can be out of date.

The scope belongs to the callable that a solve is given (:class:`InScope`). Every call of that callable is in its scope,
in forward and in backward, on any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ContextDecorator, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Scoped(nn.Module):
    """A module that keeps values in the scope."""

    def has_row_per_sample(self) -> bool:
        """Whether its values in the scope belong to single samples of the batch."""
        return False


class Scope:
    """The values that the modules of a cell keep for one solve.

    Args:
        parent: A scope that this one shares everything with except the weights.
        share_graph: Also keep weights that have a graph, for evaluations that end in one graph.
    """

    def __init__(self, parent: Scope | None = None, share_graph: bool = False) -> None:
        self.masks: dict[Any, Tensor] = {} if parent is None else parent.masks
        self._directions: dict[nn.Module, tuple[Any, tuple[Tensor, Tensor]]] = (
            {} if parent is None else parent._directions
        )
        self.share_graph = share_graph
        self._weights: dict[Any, tuple[tuple[_Source, ...], Tensor]] = {}

    def weight(self, owner: nn.Module, sources: Sequence[Tensor], compute: Callable[..., Tensor]) -> Tensor:
        """Return compute(*sources), or the value kept from an earlier call if the sources have not changed.

        A weight without a graph is computed once. A weight with a graph is computed in each evaluation. So implicit
        differentiation finds its parameters, also for second derivatives, and graphs that are freed at different times
        share nothing. A compiled cell computes its weights in its own graph, where the compiler may fuse them.
        """
        if torch.compiler.is_compiling():  # versions of tensors are not known there
            return compute(*sources)
        has_graph = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
        if has_graph and not self.share_graph:
            # The solve is over. Free its weights now; the graph may live longer.
            self._weights.pop((owner, False), None)
            return compute(*sources)
        kept = self._weights.get((owner, has_graph))
        if kept is not None and all(known.is_still(now) for known, now in zip(kept[0], sources, strict=True)):
            return kept[1]
        with outside_inference_mode():
            value = compute(*sources)
        self._weights[owner, has_graph] = (tuple(_Source.of(source) for source in sources), value)
        return value

    def direction(self, owner: nn.Module, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """The singular vectors kept for this weight; None if it was changed in place."""
        kept = self._directions.get(owner)
        if kept is None:
            return None
        source, vectors = kept
        if torch.compiler.is_compiling() or source is None or source.tensor is not weight or source.is_still(weight):
            return vectors
        return None

    def keep_direction(self, owner: nn.Module, weight: Tensor, vectors: tuple[Tensor, Tensor]) -> None:
        self._directions[owner] = (None if torch.compiler.is_compiling() else _Source.of(weight)), vectors

    def close(self) -> None:
        """Free the weights."""
        self._weights.clear()


@dataclass(frozen=True)
class _Source:
    """A record of a tensor, to detect whether an optimizer, a checkpoint or a move of the module has changed it.

    Args:
        tensor: The tensor object.
        data: An alias of its memory, so that no other tensor gets this address.
        version: The number of its in-place modifications so far.
    """

    tensor: Tensor
    data: Tensor
    version: int

    @staticmethod
    def of(tensor: Tensor) -> _Source:
        return _Source(tensor, tensor.detach(), _version(tensor))

    def is_still(self, now: Tensor) -> bool:
        return (
            now is self.tensor
            and _version(now) == self.version
            and now.dtype == self.data.dtype
            and _address(now) == _address(self.data)  # "to" and FSDP replace the memory of a tensor
        )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # tensors wrapped by torch.func have no memory, and are new in every call
        return 0


class _Active(threading.local):
    """The scope that this thread evaluates in, if any."""

    scope: Scope | None = None


_active = _Active()


def active_scope() -> Scope | None:
    """The scope of the running evaluation; None outside of solves."""
    return _active.scope


def outside_inference_mode() -> AbstractContextManager[Any]:
    """Context manager that turns inference mode off: its tensors could not be used later with gradients on."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return _out()


@contextmanager
def _out() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


class InScope:
    """A cell that is always called in its scope.

    Args:
        cell: cell(z, *context) -> like z.
        scope: Its scope.
    """

    def __init__(self, cell: Callable[..., Any], scope: Scope) -> None:
        self.cell, self.scope = cell, scope

    def __call__(self, *arguments: Any) -> Any:
        before, _active.scope = _active.scope, self.scope
        try:
            return self.cell(*arguments)
        finally:
            _active.scope = before


def scope_of(cell: Callable[..., Any], modules: Sequence[nn.Module]) -> Scope | None:
    """The scope for a solve of ``cell``; None for a module that keeps nothing in a scope.

    If a scope is already active, it is that scope: for an outer solve, inner solves must stay the same.

    Args:
        modules: All modules of the cell.
    """
    if isinstance(cell, nn.Module) and not any(isinstance(module, Scoped) for module in modules):
        return None
    return _active.scope or Scope()


def share_weights(cell: Callable[..., Any]) -> Callable[..., Any]:
    """Make a cell compute its normalized weights once for evaluations that end in one graph, like unrolled steps.

    Do not use it for checkpointed evaluations: each of them must save the same tensors when it runs again.
    """
    if isinstance(cell, InScope):
        return InScope(cell.cell, Scope(cell.scope, share_graph=True))
    return cell


class solve_scope(ContextDecorator):  # noqa: N801  # reads like torch.no_grad
    """Keep dropout masks and normalized weights from one call to the next.

    Every solve does this by itself. Use it where the same masks must hold for more than one solve::

        with pydeq.nn.solve_scope():
            z = deq(z0, x)
            loss = task(z) + 0.5 * pydeq.jacobian_penalty(deq.cell, z, x)

    Inside a scope it has no effect.

    Examples:
        >>> dropout = pydeq.nn.VariationalDropout(0.5)
        >>> with pydeq.nn.solve_scope():
        ...     first, second = dropout(torch.ones(100)), dropout(torch.ones(100))
        >>> torch.equal(first, second), torch.equal(first, dropout(torch.ones(100)))
        (True, False)
    """

    def _recreate_cm(self) -> solve_scope:  # each call of a decorated function has its own
        return solve_scope()

    def __enter__(self) -> None:
        self._before = _active.scope
        _active.scope = self._scope = self._before or Scope()

    def __exit__(self, *exception: object) -> None:
        _active.scope = self._before
        if self._before is None:
            self._scope.close()
