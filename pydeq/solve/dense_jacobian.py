"""The whole Jacobian of fn, for a forward solver that needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pydeq.cell.autocast import Autocast
from pydeq.cell.linearization import Linearization, linearize
from pydeq.ops.reduction import norms, wide_dtype
from pydeq.state import Layout

# The most bytes of rows of the identity that J is multiplied by at once.
_BYTES = 64 * 1024 * 1024
# On a CPU, to vectorize so few products costs more than it saves.
_FEW = 6


class _NoGraphError(ValueError):
    """The result of fn has no graph back to z."""


class DenseJacobian:
    """Form the Jacobian J of fn for each sample.

    - "vjp": fn is evaluated with gradients on, and row i of J is e_i^T J.
    - "difference": column i of J is (fn(z + s e_i) - fn(z)) / s for each sample, with s = sqrt(eps) max(|z_i|,
      ||z|| / sqrt(D)), or with fn(z) in the place of z where that is 0.
    - "auto": "vjp", until fn raises with gradients on, its result has no graph back to z, or it has no derivatives;
      then "difference".

    Args:
        mode: One of the above.
        eps: Machine epsilon of the coarsest dtype that fn computes in.

    Attributes:
        count: What all Jacobians cost so far: each one evaluation, and as many products as a sample has entries; and
            the evaluation that showed that "auto" must take differences.
    """

    def __init__(self, mode: Literal["auto", "vjp", "difference"], eps: float) -> None:
        self.mode, self.eps, self.count = mode, eps, 0

    def at(self, fn: Callable[..., Any], z: Tensor, layout: Layout, context: Sequence[Any]) -> Tensor:
        """J at the flat ``z``, [B, D, D].

        Raises:
            ValueError: With mode "vjp", if the result of fn has no graph back to z.
            RuntimeError: With mode "vjp", if fn has no derivatives.
        """
        self.count += 1 + layout.size
        if self.mode != "difference":
            try:
                return self._exact(fn, z, layout, context)
            except (RuntimeError, NotImplementedError, _NoGraphError) as error:
                if self.mode == "vjp" or isinstance(error, torch.OutOfMemoryError):
                    raise
            self.mode, self.count = "difference", self.count + 1
        return self._by_columns(fn, z, layout, context)

    def _exact(self, fn: Callable[..., Any], z: Tensor, layout: Layout, context: Sequence[Any]) -> Tensor:
        at = linearize(fn, layout.view(z), context)
        if not at.reaches_z():
            raise _NoGraphError(
                "mode='vjp' needs a graph from the result of fn to z, but fn computes with gradients off; take"
                " pydeq.TrustRegion(mode='difference')"
            )
        try:
            with torch.inference_mode(False), Autocast.current(z.device).off():
                return _by_rows(at)
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise RuntimeError(
                "TrustRegion's mode 'vjp' needs derivatives of fn, which has none: use mode='auto' or 'difference'"
                f" ({error})"
            ) from error

    def _by_columns(self, fn: Callable[..., Any], z: Tensor, layout: Layout, context: Sequence[Any]) -> Tensor:
        wide = wide_dtype(z.dtype)
        cast = torch.is_autocast_enabled(layout.device.type)

        def evaluate(z: Tensor) -> Tensor:
            return layout.flatten(layout.check(fn(layout.view(z), *context), cast)).to(wide, copy=True)

        f, base = evaluate(z), z.to(wide)
        size, image = norms([base, f])
        least = torch.maximum(torch.where(size > 0, size, image), self.eps * image) / layout.size**0.5
        # Powers of two: adding them rounds little.
        step = torch.maximum(base.double().abs(), torch.where(least > 0, least, 1.0)[:, None])
        smallest = torch.finfo(z.dtype).tiny
        step = torch.exp2((self.eps**0.5 * step).clamp(min=smallest).log2().round()).to(wide)
        columns = []
        for i in range(layout.size):
            point = base.clone()
            point[:, i] += step[:, i]
            point = point.to(z.dtype)
            # The step as it was rounded.
            columns.append((evaluate(point) - f) / (point[:, i].to(wide) - base[:, i])[:, None])
        return torch.stack(columns, dim=2)


def _by_rows(at: Linearization) -> Tensor:
    layout = at.layout
    unit = torch.eye(layout.size, dtype=layout.dtype, device=layout.device)
    most = max(1, _BYTES // max(1, layout.batch * layout.size * unit.element_size()))
    # Functions and compiled code may not vectorize.
    if at.has_functions() or (layout.size <= _FEW and not unit.is_cuda):
        most = 1
    rows = [at.flat_vjps(some[:, None].expand(-1, layout.batch, -1).contiguous()) for some in unit.split(most)]
    return torch.cat(rows).transpose(0, 1)
