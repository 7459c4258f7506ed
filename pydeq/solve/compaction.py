"""Evaluators of fn: on the whole batch, or only on the running samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pydeq.ops.constants import RUNNING, Counter
from pydeq.solve.dense_jacobian import DenseJacobian
from pydeq.solve.products import Products
from pydeq.solvers.base import Workspace
from pydeq.state import Layout, State


class Evaluator:
    """Calls ``fn`` on flat states, counts the calls and checks what comes back.

    Args:
        fn: The map; fn(z, *context) -> like z.
        context: Passed on after z.
        layout: The shapes of z.
        cast: Whether autocast is on, so that another floating dtype may come back.
    """

    counts_running = False
    """Whether ``evaluate`` must know exactly how many samples run. The loop then never runs ahead of the device."""
    detaches = True
    """Whether images are detached from their graph."""

    def __init__(self, fn: Callable[..., Any], context: Sequence[Any], layout: Layout, cast: bool) -> None:
        self.fn, self.context, self.layout, self.cast = fn, context, layout, cast
        self.calls = 0
        self.views: list[State] = []  # views of the workspace's two buffers
        self.products: Products | None = None  # for solvers that take products with the Jacobian
        self.dense: DenseJacobian | None = None  # for solvers that take the Jacobian
        # Tensors made in inference mode do not count their versions.
        self.watch = not torch.is_inference_mode_enabled()

    def evaluate(self, workspace: Workspace, k: int, running: int) -> Tensor:
        """Evaluate fn at the iterates of step ``k``; contiguous [B, D]. Only ``running`` samples need their images."""
        if not self.views:
            self.views = [self.layout.view(z) for z in workspace.z]
        return self.call(workspace.z[k % 2], self.views[k % 2], self.layout, self.context)

    def call(self, z: Tensor, view: State, layout: Layout, context: Sequence[Any]) -> Tensor:
        """Evaluate ``fn`` at the flat ``z``; ``view`` is z as a state."""
        version = z._version if self.watch else 0
        self.calls += 1
        products = self.products
        result = self.fn(view, *context) if products is None else products.evaluate(self.fn, z, view, layout, context)
        if self.watch and z._version != version:
            raise ValueError("fn must not modify z in place: work on a copy, z.clone()")
        f = layout.flatten(layout.check(result, self.cast, self.detaches))
        if products is not None:
            products.evaluated(f)
        return f

    def product(self, v: Tensor) -> Tensor:
        """J v for v [B, D], J the Jacobian of fn at the newest evaluation."""
        assert self.products is not None
        return self.products.product(v)

    def jacobian(self, z: Tensor, f: Tensor) -> Tensor:
        """The Jacobian of fn at z, whose image is f, for each sample; [B, D] -> [B, D, D]."""
        assert self.dense is not None
        return self.dense.at(self.fn, z, f, self.layout, self.context)


class CompactingEvaluator(Evaluator):
    """Calls ``fn`` on the running samples only, with their rows of the context.

    The set shrinks when at least half of it has stopped. Gathering the context costs a copy. There are at most log2(B)
    batch sizes, so caches and compilers that fn uses stay warm. On a GPU each evaluation waits for the step before it,
    and a change of the batch size waits for the device.

    Args:
        batched: For each entry of the context whether it carries the batch in its first dimension.
    """

    counts_running = True

    def __init__(
        self, fn: Callable[..., Any], context: Sequence[Any], layout: Layout, cast: bool, batched: Sequence[bool]
    ) -> None:
        super().__init__(fn, context, layout, cast)
        self.batched = batched
        self.rows: Tensor | None = None  # None: all of them
        self.part, self.part_context = layout, context
        self.images: Tensor | None = None

    def evaluate(self, workspace: Workspace, k: int, running: int) -> Tensor:
        if 0 < 2 * running <= self.part.batch:  # with 0 left, fn is called only because other ranks need it
            rows = (workspace.counters[:, Counter.STATUS] == RUNNING).nonzero()[:, 0]
            self.rows, self.part = rows, self.layout.with_batch(len(rows))
            self.part_context = [
                gather(entry, rows) if batched else entry
                for entry, batched in zip(self.context, self.batched, strict=True)
            ]
        z = workspace.z[k % 2]
        if self.rows is None:
            return super().evaluate(workspace, k, running)
        if self.images is None:
            self.images = torch.zeros_like(z)  # rows outside the set are frozen: never read
        gathered = z.index_select(0, self.rows)
        part = self.call(gathered, self.part.view(gathered), self.part, self.part_context)
        return self.images.index_copy_(0, self.rows, part)

    def product(self, v: Tensor) -> Tensor:
        if self.rows is None:
            return super().product(v)
        part = super().product(v.index_select(0, self.rows))
        return torch.zeros_like(v).index_copy_(0, self.rows, part)

    def jacobian(self, z: Tensor, f: Tensor) -> Tensor:
        if self.rows is None:
            return super().jacobian(z, f)
        assert self.dense is not None
        z, f = z.index_select(0, self.rows), f.index_select(0, self.rows)
        part = self.dense.at(self.fn, z, f, self.part, self.part_context)
        return part.new_zeros(self.layout.batch, *part.shape[1:]).index_copy_(0, self.rows.to(part.device), part)


def gather(entry: Any, rows: Tensor) -> Any:
    """Select rows of a tensor, or of every tensor in a (nested) tuple or list."""
    if isinstance(entry, Tensor):
        return entry.index_select(0, rows)
    return type(entry)(gather(part, rows) for part in entry)
