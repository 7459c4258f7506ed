"""Products with the Jacobian by differences of fn; their gradients need only first derivatives of fn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pydeq.cell.linearization import Linearization, linearize, recordable
from pydeq.cell.replay_rng import Replayed
from pydeq.cell.torch_compile import reusable_graphs
from pydeq.jacobian.statistics import KeptStatistics
from pydeq.ops.reduction import WHOLE, Reduction
from pydeq.state import State, as_tuple, layout_of

# Steps in units of the state's root mean square, by order; found by measurement, see docs/penalty.md.
STEPS = {1: 0.1, 2: 0.1}


class Difference:
    """J v from one or two more evaluations of fn.

        order 1: (f(z + s v) - f(z)) / s      order 2: (f(z + s v) - f(z - s v)) / (2 s)

    s is ``step`` times the root mean square of the batch's states. For a tuple, it is that of the part with the
    smallest one. All samples share one s, so fn may couple samples. Samples that are not finite do not count.

    All evaluations draw the same random numbers. Running statistics of norms change as in one evaluation, or not at all
    if ``at`` is given.

    Args:
        fn: fn(z, *context) -> like z.
        z: The point at which J is taken, a constant.
        context: Passed on to fn.
        order: 1, forward, or 2, central.
        step: In units of the root mean square; by default :data:`STEPS`.
        at: An evaluation of fn at z; its value and graph are used for f(z).
        compiled: Whether fn runs compiled code; it is then called with states that require grad, to avoid a
            recompilation.
        reduction: Completes sums over the entries of a state.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        z: State,
        context: Sequence[Any],
        order: int = 1,
        step: float | None = None,
        at: Linearization | None = None,
        compiled: bool = False,
        reduction: Reduction = WHOLE,
    ) -> None:
        self.layout = layout_of(z)
        self.order, self.step = order, STEPS[order] if step is None else step
        self._fn, self._z, self._context = fn, z, tuple(context)
        self._at = at
        self._compiled, self._reduction = compiled, reduction
        self._cast = torch.is_autocast_enabled(self.layout.device.type)

    def flat_vjps(self, v: Tensor, create_graph: bool = False) -> Tensor:
        """v_k^T J for v [K, B, D], exact, as [K, B, D], without a graph."""
        if self._at is None:
            self._at = linearize(self._fn, self._z, self._context)
        return self._at.flat_vjps(v)

    def flat_jvps(self, v: Tensor, create_graph: bool = False) -> Tensor:
        """J v_k for v [K, B, D], as [K, B, D], in float32 or wider."""
        wide = torch.promote_types(self.layout.dtype, torch.float32)
        with torch.inference_mode(False), torch.set_grad_enabled(create_graph), reusable_graphs():
            z, context = self._z, self._context
            if torch.is_inference_mode_enabled() or any(part.is_inference() for part in as_tuple(z)):
                z, context = tree_map_only(Tensor, recordable, (z, context))
            parts = tuple(part.detach() for part in as_tuple(z))
            point = self.layout.flatten(parts if self.layout.is_tuple else parts[0]).to(wide)
            size = self._size(parts, wide)
            shifts = [size * one.to(wide) for one in v]
            if self.order == 1:
                points = [*(point + shift for shift in shifts), point]
            else:
                points = [moved for shift in shifts for moved in (point + shift, point - shift)]
            images = list(self._images(points, context))
            if self.order == 1:
                rows = [(image - images[-1]) / size for image in images[:-1]]
            else:
                rows = [(a - b) / (2.0 * size) for a, b in zip(images[::2], images[1::2], strict=True)]
            return rows[0][None] if len(rows) == 1 else torch.stack(rows)

    def _images(self, points: Sequence[Tensor], context: Sequence[Any]) -> Iterator[Tensor]:
        """fn at flat points, in their dtype. For order 1 the last point is z."""
        replayed, draws = Replayed(self._fn, self.layout.device), True
        statistics, at = KeptStatistics(self._fn), self._at
        for k, point in enumerate(points):
            y: Any
            if self.order == 1 and k == len(points) - 1 and at is not None and not draws:
                y = at.y if self.layout.is_tuple else at.y[0]
            else:
                state = self.layout.view(point.to(self.layout.dtype))
                if self._compiled and torch.is_grad_enabled():
                    state = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(), state)
                with statistics if k or at is not None else nullcontext():
                    y = (replayed if draws else self._fn)(state, *context)
                y = self.layout.check(y, self._cast, detach=False)
            if k == 0:
                draws = replayed.drew()
            yield self.layout.flatten(y).to(point.dtype)

    def _size(self, parts: Sequence[Tensor], wide: torch.dtype) -> Tensor:
        """Compute s, 0-d; ``step`` itself if the state is 0."""
        with torch.no_grad():
            flat = [part.to(wide).reshape(self.layout.batch, -1) for part in parts]
            squares = torch.stack([part.square().sum(1) for part in flat]).double()  # [parts, B]
            finite = squares.isfinite()
            entries = torch.tensor(self.layout.sizes, dtype=torch.float64, device=squares.device)
            sums = torch.stack([torch.where(finite, squares, 0.0).sum(1), finite.sum(1) * entries])
            total, count = self._reduction.sum(sums)
            rms = (total / count.clamp(min=1.0)).sqrt()
            rms = torch.where(rms > 0, rms, torch.inf).amin()
            return (self.step * torch.where(rms.isinf(), 1.0, rms)).to(wide)
