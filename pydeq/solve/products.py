"""The Jacobian of fn at its newest evaluation, or products with it, for a forward solver that needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pydeq.cell.autocast import Autocast
from pydeq.cell.linearization import linearize, recordable
from pydeq.ops.reduction import norms, wide_dtype
from pydeq.solvers import Solver
from pydeq.state import Layout, State


class Products:
    """Evaluate fn, and form products J v with its Jacobian at that point, or J.

    - "jvp": every evaluation keeps its graph, and J v is the derivative of u^T J v by u (:mod:`pydeq.cell`). fn needs
      second derivatives. No product calls fn.
    - "vjp": every evaluation keeps its graph, and row i of J is e_i^T J. Only J itself is formed so.
    - "difference": J v = (fn(z + s v) - fn(z)) / s for each sample, with s ||v|| = sqrt(eps) max(||z||, ||fn(z)||).
      Every product calls fn.
    - "auto": "jvp" for a solver that takes products, "vjp" for one that takes J, until fn turns out to have no such
      derivatives; then "difference". An fn whose result has no graph back to z gets differences. The backward pass of
      an ``autograd.Function``, or of compiled code, may leave no graph without an error, so both get differences where
      second derivatives are needed.

    Forward mode would do, too, but on a CPU it is the slowest of the three: torch decomposes the norms and attention.

    Args:
        solver: One that takes more than images; its ``mode`` is one of the above.
        eps: Machine epsilon of the coarsest dtype that fn computes in.

    Attributes:
        count: Products so far, as many for J as a sample has entries. An evaluation with a graph that fails, under
            "auto", counts as one: it calls fn.
    """

    def __init__(self, solver: Solver, eps: float) -> None:
        self.name, self.whole = type(solver).__name__, solver.takes == "jacobian"
        self.mode: str = solver.mode  # pyright: ignore[reportAttributeAccessIssue]
        self.eps, self.count = eps, 0

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
            if self.mode != "auto" or isinstance(error, torch.OutOfMemoryError):
                raise
            self.mode = "difference"
            self.count += 1
            return fn(view, *context)  # an error of fn itself is raised here
        reaches = at.reaches_z()
        if self.mode != "auto" and not reaches:
            raise ValueError(
                f"mode={self.mode!r} needs a graph from the result of fn to z, but fn computes with gradients off; take"
                f" pydeq.{self.name}(mode='difference')"
            )
        self._functions = self.mode != "jvp" and at.has_functions()
        if self.mode == "auto" and (not reaches or (self._functions and not self.whole)):
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
                self._differ(error, "second derivatives")
        return self._difference(v)

    def jacobian(self) -> Tensor:
        """J, [B, D, D]."""
        batch, entries = self._z.shape
        self.count += entries
        unit = torch.eye(entries, dtype=self._z.dtype, device=self._z.device)
        units = unit[:, None].expand(-1, batch, -1)  # [D, B, D]
        at = self._at
        if at is not None:
            try:
                with torch.inference_mode(False), Autocast.current(unit.device).off():
                    if self._functions:  # they may not vectorize
                        return torch.stack([at.flat_vjp(one) for one in units.contiguous()], dim=1)
                    return at.flat_vjps(units.contiguous()).transpose(0, 1)
            except (RuntimeError, NotImplementedError) as error:
                self._differ(error, "derivatives")
        return torch.stack([self._difference(one) for one in units.to(wide_dtype(unit.dtype))], dim=2)

    def _differ(self, error: Exception, needed: str) -> None:
        """Take differences from now on, as ``needed`` is what fn does not have.

        Raises:
            RuntimeError: If the mode is not "auto", or memory ran out.
        """
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        if self.mode != "auto":
            raise RuntimeError(
                f"{self.name}'s mode {self.mode!r} needs {needed} of fn, which has none: use mode='auto' or"
                f" 'difference' ({error})"
            ) from error
        self.mode, self._at, self._f = "difference", None, self._f.clone()

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
