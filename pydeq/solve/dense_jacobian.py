"""The whole Jacobian of fn, for a forward solver that needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pydeq.cell.autocast import Autocast
from pydeq.cell.linearization import Linearization, linearize
from pydeq.cell.torch_compile import interpreting
from pydeq.ops.reduction import host_norm
from pydeq.state import Layout

# The most bytes of rows of the identity that J is multiplied by at once.
_BYTES = 64 * 1024 * 1024
# On a CPU, to vectorize so few products costs more than it saves, or so few differences.
_FEW, _FEW_DIFFERENCES = 6, 3


class _NoGraphError(ValueError):
    """The result of fn has no graph back to z."""


class DenseJacobian:
    """Form the Jacobian J of fn for each sample.

    - "vjp": fn is evaluated with gradients on, and row i of J is e_i^T J.
    - "difference": column i of J is (fn(z + s e_i) - fn(z)) / s for each sample, with s = sqrt(eps) max(|z_i|,
      ||z|| / sqrt(D)), or with fn(z) in the place of z where that is 0. fn(z) is known.
    - "auto": "vjp", until fn raises with gradients on, its result has no graph back to z, or it has no derivatives;
      then "difference".

    Args:
        mode: One of the above.
        eps: Machine epsilon of the coarsest dtype that fn computes in.
        vectorize: Call fn once for all differences, under ``torch.vmap``. fn(z) is then evaluated there again, since
            mapped operations may round in another way.

    Attributes:
        count: What all Jacobians cost so far: D differences for each, or D products and one evaluation, or D + 1
            evaluations in one call; and the evaluation that showed that "auto" must take differences.
    """

    def __init__(self, mode: Literal["auto", "vjp", "difference"], eps: float, vectorize: bool = False) -> None:
        self.mode, self.eps, self.vectorize, self.count = mode, eps, vectorize, 0

    def at(self, fn: Callable[..., Any], z: Tensor, f: Tensor, layout: Layout, context: Sequence[Any]) -> Tensor:
        """J at the flat ``z``, whose image is ``f``; [B, D, D], on any device, in the dtype of z or in float64.

        Raises:
            ValueError: With mode "vjp", if the result of fn has no graph back to z.
            RuntimeError: With mode "vjp", if fn has no derivatives; with ``vectorize``, if it cannot be mapped.
        """
        self.count += layout.size
        if self.mode != "difference":
            self.count += 1
            try:
                return self._exact(fn, z, layout, context)
            except (RuntimeError, NotImplementedError, _NoGraphError) as error:
                if self.mode == "vjp" or isinstance(error, torch.OutOfMemoryError):
                    raise
            self.mode = "difference"
        return self._by_columns(fn, z, f, layout, context)

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

    def _by_columns(
        self, fn: Callable[..., Any], z: Tensor, f: Tensor, layout: Layout, context: Sequence[Any]
    ) -> Tensor:
        """J in float64, on the host. The small sums are NumPy's: an operation on few numbers takes torch longer."""
        cast = torch.is_autocast_enabled(layout.device.type)
        base, image, entry = _array(z), _array(f), np.arange(layout.size)
        together = self.vectorize and (layout.size > _FEW_DIFFERENCES or z.is_cuda)
        points = np.repeat(base[None], layout.size + together, axis=0)  # [D, B, D], and z itself
        with np.errstate(all="ignore"):  # samples that are lost
            points[entry, :, entry] += self._steps(base, image, torch.finfo(z.dtype).tiny).T
        rounded = torch.from_numpy(points).to(z)

        def evaluate(point: Tensor) -> Tensor:
            return layout.flatten(layout.check(fn(layout.view(point), *context), cast))

        if together:
            self.count += 1
            images = _array(_map(evaluate, rounded))
            images, image = images[:-1], images[-1]
        else:
            found = torch.empty(points.shape, dtype=torch.float64, device=z.device)
            for i, point in enumerate(rounded.unbind()):  # fn may return the same memory each time
                found[i] = evaluate(point)
            images = _array(found)
        with np.errstate(all="ignore"):
            steps = _array(rounded)[entry, :, entry] - base.T
            columns = (images - image) / steps[:, :, None]
        return torch.from_numpy(columns.transpose(1, 2, 0))

    def _steps(self, z: Any, f: Any, smallest: float) -> Any:
        """The steps of the differences at points z with images f, [B, D]: powers of two, which round less."""
        size, image = host_norm(z), host_norm(f)
        least = np.maximum(np.where(size > 0, size, image), self.eps * image) / max(1, z.shape[1]) ** 0.5
        steps = np.maximum(np.abs(z), np.where(least > 0, least, 1.0)[:, None])
        return np.exp2(np.round(np.log2(np.maximum(self.eps**0.5 * steps, smallest))))


def _map(evaluate: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """The images of all points, [K, B, D], by one call."""
    try:
        with interpreting():
            return torch.vmap(evaluate)(points)
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).split("\n", 1)[0]
        raise RuntimeError(
            f"vectorize=True needs a map that torch.vmap can map, or use vectorize=False ({reason})"
        ) from error


def _array(x: Tensor) -> Any:
    return x.double().cpu().resolve_neg().numpy()


def _by_rows(at: Linearization) -> Tensor:
    layout = at.layout
    unit = torch.eye(layout.size, dtype=layout.dtype, device=layout.device)
    most = max(1, _BYTES // max(1, layout.batch * layout.size * unit.element_size()))
    # Functions and compiled code may not vectorize.
    if at.has_functions() or (layout.size <= _FEW and not unit.is_cuda):
        most = 1
    rows = [at.flat_vjps(some[:, None].expand(-1, layout.batch, -1).contiguous()) for some in unit.split(most)]
    return torch.cat(rows).transpose(0, 1)
