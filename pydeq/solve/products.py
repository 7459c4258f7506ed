"""Products with the Jacobian of fn at its newest evaluation, for a forward solver that needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pydeq.cell.autocast import Autocast
from pydeq.cell.linearization import linearize, recordable
from pydeq.ops.reduction import norms
from pydeq.state import Layout, State


class Products:
    """Evaluate fn, and form products J v with its Jacobian at that point.

    - "jvp": every evaluation keeps its graph, and J v is the derivative of u^T J v by u (:mod:`pydeq.cell`). fn needs
      second derivatives. No product calls fn.
    - "difference": J v = (fn(z + s v) - fn(z)) / s for each sample, with s ||v|| = sqrt(eps) max(||z||, ||fn(z)||).
      Every product calls fn.
    - "auto": "jvp", until fn turns out to have no second derivatives; then "difference". The backward pass of an
      ``autograd.Function``, or of compiled code, may leave no graph without an error, so they always get differences,
      and so does an fn whose result has no graph back to z.

    Forward mode would do, too, but on a CPU it is the slowest of the three: torch decomposes the norms and attention.

    Args:
        mode: One of the above.
        eps: Machine epsilon of the coarsest dtype that fn computes in.

    Attributes:
        count: Products so far. An evaluation with a graph that fails, under "auto", counts as one: it calls fn.
    """

    def __init__(self, mode: Literal["auto", "jvp", "difference"], eps: float) -> None:
        self.mode, self.eps, self.count = mode, eps, 0

    def evaluate(self, fn: Callable[..., Any], z: Tensor, view: State, layout: Layout, context: Sequence[Any]) -> Any:
        """Evaluate ``fn`` at the flat ``z``; ``view`` is z as a state."""
        # A step writes to rows of z before it asks for products.
        self._fn, self._z, self._layout, self._context = fn, z.clone(), layout, context
        self._exact: Callable[[Tensor], Tensor] | None = None
        self._at = None
        if self.mode == "difference":
            return fn(view, *context)
        try:
            at = linearize(fn, layout.view(self._z), context)
        except (RuntimeError, NotImplementedError) as error:
            if self.mode == "jvp" or isinstance(error, torch.OutOfMemoryError):
                raise
            self.mode = "difference"
            self.count += 1
            return fn(view, *context)  # an error of fn itself is raised here
        reaches = at.reaches_z()
        if self.mode == "jvp" and not reaches:
            raise ValueError(
                "mode='jvp' needs a graph from the result of fn to z, but fn computes with gradients off; take"
                " pydeq.NewtonKrylov(mode='difference')"
            )
        if self.mode == "auto" and (at.has_functions() or not reaches):
            self.mode = "difference"
        else:
            self._at = at
        y = tuple(part.detach() for part in at.y)
        return y if layout.is_tuple else y[0]

    def evaluated(self, f: Tensor) -> None:
        """Keep the image ``f`` of the newest evaluation, [B, D], as far as products need it."""
        # fn may reuse its buffer.
        self._f = f.clone() if self._at is None else f

    def product(self, v: Tensor) -> Tensor:
        """J v for v [B, D], in v's dtype. Samples whose v is 0 get 0."""
        self.count += 1
        if self._at is not None:
            try:
                with torch.inference_mode(False), Autocast.current(v.device).off():
                    if self._exact is None:
                        self._exact = self._at.right_products()
                    return self._exact(recordable(v).to(self._z.dtype)).to(v.dtype)
            except (RuntimeError, NotImplementedError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                if self.mode == "jvp":
                    raise RuntimeError(
                        "NewtonKrylov's mode 'jvp' needs second derivatives of fn, which has none: use mode='auto' or"
                        f" 'difference' ({error})"
                    ) from error
                self.mode, self._at, self._f = "difference", None, self._f.clone()
        return self._difference(v)

    def _difference(self, v: Tensor) -> Tensor:
        layout, z, f = self._layout, self._z.to(v.dtype), self._f.to(v.dtype)
        size, image, length = norms([z, f, v])
        step = self.eps**0.5 * torch.maximum(size, image) / length
        # A power of two: scaling by it rounds nothing, and the last bits of the norms do not matter.
        step = torch.exp2(step.log2().round()).to(v.dtype)[:, None]
        moved = (length > 0)[:, None]
        point = torch.where(moved, z + step * v, z).to(self._z.dtype)
        cast = torch.is_autocast_enabled(layout.device.type)
        y = layout.flatten(layout.check(self._fn(layout.view(point), *self._context), cast))
        return torch.where(moved, (y.to(v.dtype) - f) / step, 0.0)
