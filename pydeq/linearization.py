"""One evaluation of fn with gradients on, as the linear map that its derivative is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pydeq.compilation import reusable_graphs
from pydeq.state import Layout, State, as_tuple, layout_of


@dataclass(frozen=True)
class Linearization:
    """y = fn(z, *context), with the graph between them.

    J = dy/dz is never formed; products with it from either side are.

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
        return self._flat(self.vjp(self.layout.view(v), create_graph))

    def flat_vjps(self, v: Tensor, create_graph: bool = False) -> Tensor:
        """v_k^T J for v [K, B, D], as [K, B, D], by one vectorized product."""

        def batched(v: Tensor) -> Tensor:
            pairs = [(y, part) for y, part in zip(self.y, self._parts(v), strict=True) if y.requires_grad]
            if not pairs:
                return torch.zeros_like(v)
            outputs, seeds = zip(*pairs, strict=True)
            products = torch.autograd.grad(
                outputs,
                self.z,
                seeds,
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
                is_grads_batched=True,
            )
            return self._flat(products, len(v))

        return vectorize(batched, lambda v: self.flat_vjp(v, create_graph), v)

    def flat_jvps(self, v: Tensor, create_graph: bool = False) -> Tensor:
        """J v_k for v [K, B, D], as [K, B, D], by one vectorized product.

        No forward mode, and no evaluation of fn: J v is the derivative of u^T J v by u. Costs a product more than K.
        """
        u = torch.zeros(self.layout.batch, self.layout.size, dtype=self.layout.dtype, device=self.layout.device)
        u.requires_grad_()
        with torch.enable_grad():
            g = self.vjp(self.layout.view(u), create_graph=True)
        used = {i: part for i, part in enumerate(g) if part is not None and part.requires_grad}
        if not used:
            return torch.zeros_like(v)

        def product(v: Sequence[Tensor], batched: bool) -> Tensor:
            (result,) = torch.autograd.grad(
                list(used.values()),
                u,
                [v[i] for i in used],
                retain_graph=True,
                create_graph=create_graph,
                is_grads_batched=batched,
            )
            return result

        return vectorize(
            lambda v: product(self._parts(v), True), lambda v: product(as_tuple(self.layout.view(v)), False), v
        )

    def _parts(self, v: Tensor) -> tuple[Tensor, ...]:
        """[K, B, D] -> its parts, [K, B, *shape] each."""
        parts = v.split(self.layout.sizes, dim=2)
        return tuple(part.reshape(*v.shape[:2], *shape) for part, shape in zip(parts, self.layout.shapes, strict=True))

    def _flat(self, products: Sequence[Tensor | None], *probes: int) -> Tensor:
        """Products by parts, None for zero, as contiguous [*probes, B, D]."""
        shape = (*probes, self.layout.batch)
        parts = [
            (z.new_zeros(()).expand(*probes, *z.shape) if p is None else p).reshape(*shape, size)
            for p, z, size in zip(products, self.z, self.layout.sizes, strict=True)
        ]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=-1)


def vectorize(batched: Callable[[Tensor], Tensor], single: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """``single`` of each v[k], stacked: by one call of ``batched``, or one by one where an operator cannot do that."""
    if v.numel() == 0:
        return torch.zeros_like(v)
    if len(v) == 1:
        return single(v[0])[None]
    try:
        return batched(v)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        products = torch.stack([single(one) for one in v])  # raises what is not about vectorization
        _warn_once(str(error).split("\n", 1)[0])
        return products


_warned: set[str] = set()


def _warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"products with the Jacobian are formed one by one, since an operator in fn does not vectorize: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )


def linearize(fn: Callable[..., Any], z: State, context: Sequence[Any]) -> Linearization:
    """Evaluate ``fn`` at ``z``, taken as a constant, with gradients on.

    Raises:
        TypeError, ValueError: If fn does not return something like z.
    """
    layout = layout_of(z)
    cast = torch.is_autocast_enabled(layout.device.type)
    inference = torch.is_inference_mode_enabled()
    with torch.inference_mode(False), torch.enable_grad(), reusable_graphs():
        if inference or any(part.is_inference() for part in as_tuple(z)):
            z, context = tree_map_only(Tensor, _recordable, (z, tuple(context)))
        leaves = tuple(part.detach().requires_grad_() for part in as_tuple(z))
        y = fn(leaves if layout.is_tuple else leaves[0], *context)
        y = as_tuple(layout.check(y, cast, detach=False))
    return Linearization(layout, leaves, y)


def _recordable(x: Tensor) -> Tensor:
    """Tensors made in inference mode have no place in a graph; copies of them do."""
    return x.clone() if x.is_inference() else x
