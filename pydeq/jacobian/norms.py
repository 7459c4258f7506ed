"""Estimates of the Frobenius norm of the Jacobian J = dfn/dz, and the penalty made of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from pydeq.linearization import linearize
from pydeq.ops import squared_norm
from pydeq.state import Layout, State, layout_of

Distribution = Literal["gaussian", "rademacher"]
Mode = Literal["vjp", "jvp"]


def frobenius_norm_squared(
    fn: Callable[..., Any],
    z: State,
    *context: Any,
    probes: int = 1,
    distribution: Distribution = "gaussian",
    mode: Mode = "vjp",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Estimate ||J||_F^2 of ``fn`` at ``z``, one value per sample.

    E ||eps^T J||^2 = E ||J eps||^2 = tr(J J^T) for probes with E[eps eps^T] = I (Hutchinson 1989). Differentiable with
    respect to parameters and context; ``z`` is where J is taken, and gets no gradient.

    Args:
        fn: fn(z, *context) -> like z; treats samples independently.
        z: State, shape (batch, *state), or a tuple of such tensors.
        context: Passed on to fn.
        probes: Random vectors per sample, at least 1. The relative error falls as 1/sqrt(probes).
        distribution: "gaussian", variance 2 ||J J^T||_F^2, or "rademacher", 2 (||J J^T||_F^2 - sum (J J^T)_ii^2).
        mode: "vjp" forms eps^T J, "jvp" forms J eps (by ``torch.func.jvp``).
        generator: Where the probes come from; by default torch's own.

    Returns:
        Tensor of shape (batch,), float64 for float64 states, else float32.

    Raises:
        ValueError: If probes < 1, an option is unknown, or fn changes the shape of z.

    Source: Bai, Koltun and Kolter, Stabilizing Equilibrium Models by Jacobian Regularization, ICML 2021, section 4.
    """
    if isinstance(probes, bool) or not isinstance(probes, int):
        raise TypeError(f"probes must be an int, got {type(probes).__name__}")
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    if distribution not in ("gaussian", "rademacher"):
        raise ValueError(f"distribution must be 'gaussian' or 'rademacher', got {distribution!r}")
    if mode not in ("vjp", "jvp"):
        raise ValueError(f"mode must be 'vjp' or 'jvp', got {mode!r}")
    layout = layout_of(z)
    total = torch.zeros((), device=layout.device)
    with torch.enable_grad():
        if mode == "vjp":
            at = linearize(fn, z, context)
            product = functools.partial(at.flat_vjp, create_graph=True)
        else:
            product = _jvp(fn, z, context, layout)
        for _ in range(probes):
            total = total + squared_norm(product(_probe(layout, distribution, generator)))
    return total / probes


def jacobian_penalty(
    fn: Callable[..., Any],
    z: State,
    *context: Any,
    probes: int = 1,
    distribution: Distribution = "gaussian",
    mode: Mode = "vjp",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Estimate ||J||_F^2 / d at the fixed point, averaged over the batch: the paper's regularizer.

    Add ``strength * jacobian_penalty(...)`` to the loss. Dividing by d, the entries of the state per sample, makes it
    a mean over every entry of the batch.

    Args:
        fn, z, context, probes, distribution, mode, generator: As in :func:`frobenius_norm_squared`.

    Returns:
        0-d tensor, differentiable with respect to parameters and context.

    Raises:
        ValueError: As :func:`frobenius_norm_squared`.

    Source: Bai, Koltun and Kolter, ICML 2021, equation 4.
    """
    norms = frobenius_norm_squared(
        fn, z, *context, probes=probes, distribution=distribution, mode=mode, generator=generator
    )
    layout = layout_of(z)
    return norms.sum() / max(1, layout.batch * layout.size)


def _probe(layout: Layout, distribution: Distribution, generator: torch.Generator | None) -> Tensor:
    """[B, D] with E[eps eps^T] = I."""
    flat = torch.empty(layout.batch, layout.size, dtype=layout.dtype, device=layout.device)
    if distribution == "gaussian":
        return flat.normal_(generator=generator)
    return flat.bernoulli_(0.5, generator=generator).mul_(2.0).sub_(1.0)


def _jvp(fn: Callable[..., Any], z: State, context: tuple[Any, ...], layout: Layout) -> Callable[[Tensor], Tensor]:
    """eps -> J eps, flat [B, D], with a graph."""
    point = z.detach() if isinstance(z, Tensor) else tuple(part.detach() for part in z)
    cast = torch.is_autocast_enabled(layout.device.type)

    def product(eps: Tensor) -> Tensor:
        tangent = torch.func.jvp(lambda state: fn(state, *context), (point,), (layout.view(eps),))[1]
        return layout.flatten(layout.check(tangent, cast, detach=False))

    return product
