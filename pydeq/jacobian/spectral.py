"""The spectral radius of the Jacobian: whether a fixed-point iteration contracts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pydeq.linearization import linearize
from pydeq.reduction import norm
from pydeq.state import State, layout_of


def spectral_radius(
    fn: Callable[..., Any], z: State, *context: Any, steps: int = 100, generator: torch.Generator | None = None
) -> Tensor:
    """Estimate the largest |eigenvalue| of J = dfn/dz at ``z``, one value per sample; no gradient.

    The growth of ||v^T J^k||, averaged geometrically over the second half of ``steps`` products. Rayleigh quotients,
    the usual power method, read 0 for a rotation; growth is right for complex pairs and for J = 0.

    Args:
        fn: fn(z, *context) -> like z; treats samples independently.
        z: State, shape (batch, *state), or a tuple of such tensors.
        context: Passed on to fn.
        steps: Vector-Jacobian products, at least 2. The error falls as 1/steps, faster with a spectral gap.
        generator: Where the start comes from; by default torch's own.

    Returns:
        Tensor of shape (batch,), float64 for float64 states, else float32.

    Raises:
        ValueError: If steps < 2 or fn changes the shape of z.
    """
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps must be an int, got {type(steps).__name__}")
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    layout = layout_of(z)
    wide = torch.promote_types(layout.dtype, torch.float32)
    at = linearize(fn, z, context)
    if not any(part.requires_grad for part in at.y):
        return torch.zeros(layout.batch, dtype=wide, device=layout.device)

    v = torch.empty(layout.batch, layout.size, dtype=layout.dtype, device=layout.device)
    v.normal_(generator=generator)
    growth = torch.zeros(layout.batch, dtype=torch.float64, device=layout.device)
    for step in range(steps):
        length = norm(v)
        v = (v / torch.where(length > 0, length, 1.0)[:, None]).to(layout.dtype)
        v = at.flat_vjp(v)
        if step >= steps // 2:
            growth += norm(v).log()  # -inf once v is 0, and it stays
    return (growth / (steps - steps // 2)).exp().to(wide)
