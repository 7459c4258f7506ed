"""How ||J||_F^2 is estimated, as settings of their own: functions and the penalty's schedule share them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pydeq.jacobian.functional import FunctionalLinearization
from pydeq.linearization import Linearization
from pydeq.ops import mean_squared_norm, random_probes
from pydeq.protocol import Distribution
from pydeq.state import Layout

DISTRIBUTIONS = {"gaussian": Distribution.GAUSSIAN, "rademacher": Distribution.RADEMACHER}

# Rows of a dense Jacobian: 4 MB a sample in float32.
EXACT_LIMIT = 1024


@dataclass(frozen=True)
class Estimator:
    """Settings of :func:`pydeq.frobenius_norm_squared`, which says what they mean.

    Raises:
        TypeError, ValueError: If one is of the wrong type or out of range.
    """

    probes: int = 1
    distribution: Literal["gaussian", "rademacher"] = "gaussian"
    mode: Literal["vjp", "jvp"] = "vjp"
    method: Literal["hutchinson", "hutch++", "exact"] = "hutchinson"

    def __post_init__(self) -> None:
        if isinstance(self.probes, bool) or not isinstance(self.probes, int):
            raise TypeError(f"probes must be an int, got {type(self.probes).__name__}")
        if self.probes < 1:
            raise ValueError(f"probes must be at least 1, got {self.probes}")
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution must be 'gaussian' or 'rademacher', got {self.distribution!r}")
        if self.mode not in ("vjp", "jvp"):
            raise ValueError(f"mode must be 'vjp' or 'jvp', got {self.mode!r}")
        if self.method not in ("hutchinson", "hutch++", "exact"):
            raise ValueError(f"method must be 'hutchinson', 'hutch++' or 'exact', got {self.method!r}")
        if self.method == "hutch++" and self.probes < 3:
            raise ValueError(f"probes must be at least 3 for method='hutch++', got {self.probes}")

    def norm_squared(
        self, at: Linearization | FunctionalLinearization, generator: torch.Generator | None = None
    ) -> Tensor:
        """||J||_F^2 of each sample, [B], from products with J alone; with a graph if gradients are on."""
        create_graph = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(create_graph):
            if at.layout.size == 0:
                compute = torch.promote_types(at.layout.dtype, torch.float32)
                return torch.zeros(at.layout.batch, dtype=compute, device=at.layout.device)
            if self.method == "exact":
                rows = at.flat_vjps(identity_probes(at.layout), create_graph)
                return mean_squared_norm(rows) * at.layout.size
            vjps, jvps = at.flat_vjps, at.flat_jvps
            product, other = (vjps, jvps) if self.mode == "vjp" else (jvps, vjps)
            if self.method == "hutchinson":
                return mean_squared_norm(product(self.draw(at.layout, generator), create_graph))
            return self._hutch_plus_plus(at.layout, product, other, create_graph, generator)

    def draw(self, layout: Layout, generator: torch.Generator | None, probes: int | None = None) -> Tensor:
        """Probes [K, B, D]."""
        like = torch.empty(layout.batch, layout.size, dtype=layout.dtype, device=layout.device)
        count = self.probes if probes is None else probes
        return random_probes(like, count, DISTRIBUTIONS[self.distribution], generator)

    def _hutch_plus_plus(
        self,
        layout: Layout,
        product: Callable[[Tensor, bool], Tensor],
        other: Callable[[Tensor, bool], Tensor],
        create_graph: bool,
        generator: torch.Generator | None,
    ) -> Tensor:
        """||Q^T J||^2 + an estimate of ||(I - Q Q^T) J||^2, Q an orthonormal basis of the range of J on a few probes.

        Q is a constant to autograd: the estimate is unbiased whatever Q is, and so is its gradient.
        """
        rank = min(self.probes // 3, layout.size)
        probes = self.draw(layout, generator, self.probes - rank)
        compute = torch.promote_types(layout.dtype, torch.float32)
        with torch.no_grad():
            sketch = other(probes[:rank], False).to(compute)
            basis = torch.linalg.qr(sketch.permute(1, 2, 0)).Q  # [B, D, rank]
            rest = probes[rank:].to(compute).permute(1, 2, 0)
            for _ in range(2):  # once more, for what rounding left
                rest = rest - basis @ (basis.mT @ rest)
            directions = torch.cat([basis, rest], dim=2).permute(2, 0, 1).to(layout.dtype).contiguous()
        rows = product(directions, create_graph)
        return rank * mean_squared_norm(rows[:rank]) + mean_squared_norm(rows[rank:])


def identity_probes(layout: Layout) -> Tensor:
    """[D, B, D]: the unit vectors, for every sample.

    Raises:
        ValueError: If D is too large for a dense Jacobian.
    """
    size = layout.size
    if size > EXACT_LIMIT:
        raise ValueError(f"a dense Jacobian needs states of at most {EXACT_LIMIT} entries per sample, got {size}")
    eye = torch.eye(size, dtype=layout.dtype, device=layout.device)
    return eye[:, None].expand(size, layout.batch, size)
