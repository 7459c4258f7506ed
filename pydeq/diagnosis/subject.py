"""The map to be looked at, on flat states, with the measurements that an audit and a diagnosis share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pydeq.cell.linearization import Linearization, linearize
from pydeq.ops.reduction import norms
from pydeq.solution import relative
from pydeq.solve.solve import solve
from pydeq.solvers import GMRES
from pydeq.state import Layout, State, as_tuple, layout_of

# The largest Krylov space of an exact adjoint solve, in vectors of the size of the state.
_RESTART = 100


@dataclass(frozen=True)
class Subject:
    """A map of states, and where to start.

    Args:
        fn: A map of states, which are tensors or tuples of tensors; its context is bound already.
        z0: Where to start, a tensor or a tuple of tensors.
    """

    fn: Callable[[Any], Any]
    z0: State

    @property
    def layout(self) -> Layout:
        return layout_of(self.z0)

    @property
    def eps(self) -> float:
        """The rounding error of the state's dtype."""
        return torch.finfo(self.layout.dtype).eps

    @property
    def start(self) -> Tensor:
        """The initial state, [B, D]; a copy."""
        return flat(self.layout, self.z0)

    def image(self, z: Tensor) -> Tensor:
        """Evaluate fn at z [B, D] without gradients; [B, D]."""
        layout = self.layout
        cast = torch.is_autocast_enabled(layout.device.type)
        with torch.no_grad():
            return flat(layout, layout.check(self.fn(layout.view(z.clone())), cast))

    def linearize(self, z: Tensor) -> Linearization:
        """Evaluate fn at z [B, D] with gradients on."""
        return linearize(self.fn, self.layout.view(z.clone()), ())

    def residual(self, z: Tensor) -> Residual:
        """Measure ||fn(z) - z|| at z [B, D], in float64."""
        return Residual.of(z, self.image(z))

    def plain_residual(self, evaluations: int) -> Tensor:
        """The smallest relative residual of plain iteration in this number of evaluations, [B]."""
        z = self.start
        best = torch.full((len(z),), torch.inf, dtype=torch.float64, device=z.device)
        for _ in range(evaluations):
            image = self.image(z)
            best = best.minimum(Residual.of(z, image).relative)
            z = image
        return best

    def moved_by_others(self, z: Tensor, moved: Tensor) -> Tensor:
        """Which samples have another image at ``moved`` than at z, although they are the same in both; bool [B]."""
        same = (z == moved).all(1)
        return same & ~same_bits(self.image(z), self.image(moved))


@dataclass(frozen=True)
class Residual:
    """The residuals of a batch, float64 [B].

    Args:
        absolute: ||fn(z) - z||.
        norm: ||fn(z)||.
    """

    absolute: Tensor
    norm: Tensor

    @staticmethod
    def of(z: Tensor, image: Tensor) -> Residual:
        absolute, norm = norms([image.double() - z.double(), image])
        return Residual(absolute.nan_to_num(torch.inf, torch.inf), norm)

    @property
    def relative(self) -> Tensor:
        """||fn(z) - z|| / ||fn(z)||, 0 for 0/0 and inf for r/0."""
        return relative(self.absolute, self.norm)

    @property
    def together(self) -> tuple[float, float]:
        """The absolute and the relative residual of the whole batch as one vector."""
        absolute, norm = self.absolute.norm(), self.norm.norm()
        return float(absolute), float(relative(absolute, norm))


def exact_cotangent(at: Linearization, v: Tensor, together: bool = False) -> tuple[Tensor, float]:
    """Solve u = J^T u + v by GMRES, as exactly as the dtype allows.

    Args:
        v: Cotangents of the fixed point, [B, D].
        together: Whether samples depend on each other, so that the batch is one system.

    Returns:
        u [B, D], and the largest relative residual of the system.
    """
    shape = (1, v.numel()) if together else v.shape

    def adjoint(u: Tensor) -> Tensor:
        return v.view(shape) + at.flat_vjp(u.view(v.shape)).view(shape)

    solver = GMRES(restart=min(_RESTART, max(1, shape[1])))
    # Twice the rounding error cannot be reached for some systems: stalled samples are judged by their residual.
    rtol = 1e-11 if v.dtype == torch.float64 else 10.0 * torch.finfo(torch.promote_types(v.dtype, torch.float32)).eps
    solution = solve(adjoint, v.view(shape), solver=solver, rtol=rtol, max_steps=4 * _RESTART)
    value = solution.image
    assert isinstance(value, Tensor)
    worst = float(solution.relative_residual.max()) if solution.relative_residual.numel() else 0.0
    return value.view(v.shape), worst


def flat(layout: Layout, state: State) -> Tensor:
    """Copy a state to [B, D], without its graph."""
    return layout.flatten(state).detach().clone()


def same_bits(a: Tensor, b: Tensor) -> Tensor:
    """Which rows of two [B, D] are the same, NaN included; bool [B]."""
    return ((a == b) | ((a != a) & (b != b))).all(1)


def graph_leaves(outputs: Sequence[Tensor], without: Sequence[Tensor] = ()) -> list[Tensor]:
    """The leaves of the graph of ``outputs`` that require grad, each once, but those in ``without``."""
    nodes = [part.grad_fn for part in outputs if part.grad_fn is not None]
    seen, known = set(nodes), {id(x) for x in without}
    leaves = {id(y): y for y in outputs if y.is_leaf and y.requires_grad}
    while nodes:
        node = nodes.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves.setdefault(id(leaf), leaf)
        new = [n for n, _ in node.next_functions if n is not None and n not in seen]
        seen.update(new)
        nodes.extend(new)
    return [leaf for key, leaf in leaves.items() if key not in known]


def gradients(outputs: State, leaves: list[Tensor], v: State) -> list[Tensor]:
    """The gradients of <v, outputs> by ``leaves``, zeros where there is none; the graph is kept."""
    pairs = [(y, seed) for y, seed in zip(as_tuple(outputs), as_tuple(v), strict=True) if y.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in leaves]
    ys, seeds = zip(*pairs, strict=True)
    return list(torch.autograd.grad(ys, leaves, seeds, retain_graph=True, allow_unused=True, materialize_grads=True))


@contextmanager
def buffers_restored(module: nn.Module | None) -> Iterator[None]:
    """Context manager that restores the buffers of a module at its end."""
    before = [(buffer, buffer.detach().clone()) for buffer in dense_buffers(module).values()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def dense_buffers(module: nn.Module | None) -> dict[str, Tensor]:
    """The buffers of a module by name, without sparse ones, which are constants."""
    return {} if module is None else {name: x for name, x in module.named_buffers() if x.layout == torch.strided}
