"""One evaluation of fn with gradients on, as the linear map that its derivative is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pydeq.compilation import reusable_graphs
from pydeq.state import Layout, State, as_tuple, layout_of


@dataclass(frozen=True)
class Linearization:
    """y = fn(z, *context), with the graph between them.

    J = dy/dz is never formed; products with it from the left are.

    Args:
        layout: The shapes of z and y.
        z: The parts of the point, leaves that require grad.
        y: The parts of the image, with a graph wherever they depend on z, on parameters or on context.
    """

    layout: Layout
    z: tuple[Tensor, ...]
    y: tuple[Tensor, ...]

    def vjp(self, v: State, create_graph: bool = False) -> tuple[Tensor | None, ...]:
        """v^T J by parts, None for parts of z that y does not depend on. The graph is kept."""
        pairs = [(part, seed) for part, seed in zip(self.y, as_tuple(v), strict=True) if part.requires_grad]
        if not pairs:
            return (None,) * len(self.z)
        outputs, seeds = zip(*pairs, strict=True)
        return torch.autograd.grad(
            outputs, self.z, seeds, retain_graph=True, create_graph=create_graph, allow_unused=True
        )

    def flat_vjp(self, v: Tensor, create_graph: bool = False) -> Tensor:
        """v^T J for v [B, D], as [B, D]; zero where y does not depend on z."""
        products = self.vjp(self.layout.view(v), create_graph)
        parts = tuple(torch.zeros_like(z) if p is None else p for p, z in zip(products, self.z, strict=True))
        return self.layout.flatten(parts if self.layout.is_tuple else parts[0])


def linearize(fn: Callable[..., Any], z: State, context: Sequence[Any]) -> Linearization:
    """Evaluate ``fn`` at ``z``, taken as a constant, with gradients on.

    Raises:
        TypeError, ValueError: If fn does not return something like z.
    """
    layout = layout_of(z)
    leaves = tuple(part.detach().requires_grad_() for part in as_tuple(z))
    cast = torch.is_autocast_enabled(layout.device.type)
    with torch.enable_grad(), reusable_graphs():
        y = fn(leaves if layout.is_tuple else leaves[0], *context)
        y = as_tuple(layout.check(y, cast, detach=False))
    return Linearization(layout, leaves, y)
