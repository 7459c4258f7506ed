"""The estimate of ||J||_F^2, and its settings, which functions and the penalty share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from pydeq.arguments import check_integer, check_number, set_fields
from pydeq.ops import mean_squared_norm, random_probes
from pydeq.ops.constants import Distribution
from pydeq.state import Layout

DISTRIBUTIONS = {"gaussian": Distribution.GAUSSIAN, "rademacher": Distribution.RADEMACHER}

Mode = Literal["auto", "vjp", "jvp", "difference"]

# Largest number of rows of a dense Jacobian: 4 MB per sample in float32.
EXACT_LIMIT = 1024


class Products(Protocol):
    """Products of vectors [K, B, D] with J; ``create_graph`` asks for products that can be differentiated."""

    @property
    def layout(self) -> Layout: ...

    def flat_vjps(self, v: Tensor, create_graph: bool = False) -> Tensor: ...

    def flat_jvps(self, v: Tensor, create_graph: bool = False) -> Tensor: ...


@dataclass(frozen=True)
class Estimator:
    """Settings of an estimate; :func:`pydeq.frobenius_norm_squared` describes them.

    Raises:
        TypeError, ValueError: If one is of the wrong type or out of range.
    """

    probes: int = 1
    distribution: Literal["gaussian", "rademacher"] = "gaussian"
    mode: Mode = "auto"
    method: Literal["hutchinson", "hutch++", "exact"] = "hutchinson"
    order: Literal[1, 2] | None = None
    step: float | None = None

    def __post_init__(self) -> None:
        set_fields(self, probes=check_integer("probes", self.probes, 1))
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution must be 'gaussian' or 'rademacher', got {self.distribution!r}")
        if self.mode not in ("auto", "vjp", "jvp", "difference"):
            raise ValueError(f"mode must be 'auto', 'vjp', 'jvp' or 'difference', got {self.mode!r}")
        if self.method not in ("hutchinson", "hutch++", "exact"):
            raise ValueError(f"method must be 'hutchinson', 'hutch++' or 'exact', got {self.method!r}")
        if self.method == "hutch++" and self.probes < 3:
            raise ValueError(f"probes must be at least 3 for method='hutch++', got {self.probes}")
        if self.order is not None:
            set_fields(self, order=check_integer("order", self.order))
            if self.order not in (1, 2):
                raise ValueError(f"order must be 1 or 2, got {self.order}")
        if self.step is not None:
            step = check_number("step", self.step)
            if not 0.0 < step < math.inf:
                raise ValueError(f"step must be positive and finite, got {step}")
            set_fields(self, step=step)
        for name in ("order", "step"):
            if self.mode in ("vjp", "jvp") and getattr(self, name) is not None:
                raise ValueError(f"{name} is of mode='difference' and 'auto', got mode={self.mode!r}")

    def norm_squared(self, at: Products, from_right: bool, generator: torch.Generator | None = None) -> Tensor:
        """Estimate ||J||_F^2 of each sample, [B], from products with J; with a graph if gradients are on.

        Args:
            from_right: Whether to form J eps instead of eps^T J.
        """
        create_graph = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(create_graph):
            if at.layout.size == 0:
                compute = torch.promote_types(at.layout.dtype, torch.float32)
                return torch.zeros(at.layout.batch, dtype=compute, device=at.layout.device)
            product, other = (at.flat_jvps, at.flat_vjps) if from_right else (at.flat_vjps, at.flat_jvps)
            if self.method == "exact":
                _check_independent(at)
                return mean_squared_norm(product(identity_probes(at.layout), create_graph)) * at.layout.size
            if self.method == "hutchinson":
                return mean_squared_norm(product(self.draw(at.layout, generator), create_graph))
            return self._hutch_plus_plus(at.layout, product, other, create_graph, generator)

    def draw(self, layout: Layout, generator: torch.Generator | None, probes: int | None = None) -> Tensor:
        """Draw probes, [K, B, D]."""
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
        """||Q^T J||^2 plus an estimate of ||(I - Q Q^T) J||^2. Q is an orthonormal basis of the images of a few probes.

        Q is a constant to autograd. The estimate is unbiased for any Q, and so is its gradient.
        """
        rank = min(self.probes // 3, layout.size)
        probes = self.draw(layout, generator, self.probes - rank)
        compute = torch.promote_types(layout.dtype, torch.float32)
        with torch.no_grad():
            sketch = other(probes[:rank], False).to(compute)
            basis = torch.linalg.qr(sketch.permute(1, 2, 0)).Q  # [B, D, rank]
            rest = probes[rank:].to(compute).permute(1, 2, 0)
            for _ in range(2):  # the second time removes rounding errors
                rest = rest - basis @ (basis.mT @ rest)
            # The directions have the length of probes, since differences take steps of that size. Their signs are
            # random: if fn couples samples, contributions to other samples' products cancel in the mean.
            signs = random_probes(basis[:, :1, 0], rank, Distribution.RADEMACHER, generator).permute(1, 2, 0)
            directions = (
                torch.cat([signs * layout.size**0.5 * basis, rest], dim=2)
                .permute(2, 0, 1)
                .to(layout.dtype)
                .contiguous()
            )
        rows = product(directions, create_graph)
        return (rank / layout.size) * mean_squared_norm(rows[:rank]) + mean_squared_norm(rows[rank:])


def _check_independent(at: Products) -> None:
    """Raise if fn couples samples: one product computes a row of J for every sample, and the rows would mix.

    Raises:
        ValueError: If the image of one sample depends on the state of another.
    """
    layout = at.layout
    if layout.batch < 2 or torch._C._are_functorch_transforms_active():
        return
    like = torch.empty(layout.batch, layout.size, dtype=layout.dtype, device=layout.device)
    v = random_probes(like, 1, Distribution.RADEMACHER, torch.Generator(layout.device).manual_seed(0))
    v[:, ::2] = 0.0
    rows = at.flat_vjps(v)[:, ::2]
    if bool((rows.isfinite() & (rows != 0.0)).any()):
        raise ValueError(
            "method='exact' needs an fn that treats samples independently, but the image of one sample depends on the"
            " state of another (batch norm in training mode does that): use method='hutchinson' or 'hutch++'"
        )


def identity_probes(layout: Layout) -> Tensor:
    """The unit vectors for every sample, [D, B, D].

    Raises:
        ValueError: If D is too large for a dense Jacobian.
    """
    size = layout.size
    if size > EXACT_LIMIT:
        raise ValueError(f"a dense Jacobian needs states of at most {EXACT_LIMIT} entries per sample, got {size}")
    eye = torch.eye(size, dtype=layout.dtype, device=layout.device)
    return eye[:, None].expand(size, layout.batch, size)
