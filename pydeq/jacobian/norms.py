"""Estimates of the Frobenius norm of the Jacobian J = dfn/dz, and the penalty on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from pydeq.arguments import keywords_for
from pydeq.cell.adapter import Adapter
from pydeq.jacobian.estimator import Estimator, Mode
from pydeq.jacobian.modes import estimate
from pydeq.state import State, layout_of

_KEYWORDS = ("probes", "distribution", "mode", "method", "order", "step", "generator")


def frobenius_norm_squared(
    fn: Callable[..., Any],
    z: State,
    *context: Any,
    probes: int = 1,
    distribution: Literal["gaussian", "rademacher"] = "gaussian",
    mode: Mode = "auto",
    method: Literal["hutchinson", "hutch++", "exact"] = "hutchinson",
    order: Literal[1, 2] | None = None,
    step: float | None = None,
    generator: torch.Generator | None = None,
    **keywords: Any,
) -> Tensor:
    """Estimate ||J||_F^2 of ``fn`` at ``z``, one value per sample.

    E ||eps^T J||^2 = E ||J eps||^2 = tr(J J^T) for probes with E[eps eps^T] = I (Hutchinson 1989). The estimate is
    unbiased, and so is its gradient with respect to parameters and context. ``z`` gets no gradient.

    All probes go through one vectorized product. On a CPU, large states would then exceed the cache. So mode "vjp" uses
    several smaller products there, unless the weights are much larger than the states. If an operator in fn has no rule
    for vectorized products, the products are computed one by one, with a warning that says why. The numbers are always
    the same.

    Works inside ``torch.func.grad``, ``vmap`` (with its ``randomness="same"``) and the like.

    Args:
        fn: fn(z, *context, **keywords) -> like z; treats samples independently.
        z: State, shape (batch, *state), or several such tensors, see :func:`pydeq.fixed_point`.
        context: Passed on to fn.
        keywords: Passed on to fn, as by :func:`pydeq.fixed_point`: ``attention_mask=mask``. A name that this function
            itself takes, like ``step``, is never passed on.
        probes: Products with J per sample, at least 1. Hutchinson's relative error falls as 1/sqrt(probes).
        distribution: "gaussian", variance 2 ||J J^T||_F^2, or "rademacher", 2 (||J J^T||_F^2 - sum (J J^T)_ii^2).
        mode: "auto" is "vjp" if fn can be differentiated twice, else "difference", with a warning that says why. "vjp"
            computes eps^T J, "jvp" computes J eps; with method "hutchinson" it uses forward mode. Their gradients are
            second derivatives of fn. "difference" computes J eps from evaluations of fn, and needs only first
            derivatives.
        method: "hutchinson"; or "hutch++" (Meyer, Musco, Musco and Woodruff 2021), for Jacobians with few dominant
            directions; or "exact". "hutch++" needs at least 3 probes. A third of them finds an orthonormal basis of
            these directions by products of the other mode (and one more product, since J eps comes from differentiating
            eps^T J). A third gives their part of the norm exactly, and a third estimates the rest. "exact" computes all
            D rows of J, for states of at most 1024 entries that do not depend on other samples. It ignores probes and
            distribution, and treats "jvp" as "vjp".
        order: For "difference": 1, (f(z + s eps) - f(z)) / s, the default, or 2, (f(z + s eps) - f(z - s eps)) / (2 s).
        step: s in units of the root mean square of the states, by default 0.1. On smooth cells, gradients are within
            11% of the exact ones for each draw, and within 3% in the mean; with order 2 within 2% and 1%. One exact
            draw scatters by 90%. With ReLU, gradients belong to a penalty that is smoothed over the step, and they
            scatter up to three times as much; use steps of 0.1 to 0.3. docs/penalty.md has the measurements.
        generator: Source of the seed of the probes; by default torch's own. See :mod:`pydeq.ops.random_probes`.

    Returns:
        Tensor of shape (batch,), float64 for float64 states, else float32. It has no graph if gradients are off.

    Raises:
        TypeError, ValueError: If an option is out of range, a keyword is unknown, fn changes the shape of z, or z is
            too large for "exact" or has samples that depend on each other.
        RuntimeError: If the mode cannot give correct results for fn. The gradient may also raise it later. The message
            says what to use.

    Source: Bai, Koltun and Kolter, Stabilizing Equilibrium Models by Jacobian Regularization, ICML 2021, section 4.

    Examples:
        >>> A = torch.tensor([[0.5, 1.0], [0.0, 0.25]])
        >>> pydeq.frobenius_norm_squared(lambda z: z @ A, torch.zeros(1, 2), method="exact")
        tensor([1.3125])
    """
    adapter = Adapter(z, keywords_for("frobenius_norm_squared", fn, keywords, _KEYWORDS))
    estimator = Estimator(probes, distribution, mode, method, order, step)
    return estimate(estimator, adapter.inside(fn), adapter.z0, adapter.context(context), generator=generator)


def jacobian_penalty(
    fn: Callable[..., Any],
    z: State,
    *context: Any,
    probes: int = 1,
    distribution: Literal["gaussian", "rademacher"] = "gaussian",
    mode: Mode = "auto",
    method: Literal["hutchinson", "hutch++", "exact"] = "hutchinson",
    order: Literal[1, 2] | None = None,
    step: float | None = None,
    generator: torch.Generator | None = None,
    **keywords: Any,
) -> Tensor:
    """Estimate ||J||_F^2 / d at the fixed point, averaged over the batch: the paper's regularizer.

    Add ``strength * jacobian_penalty(...)`` to the loss. d is the number of entries of the state per sample, so it
    is a mean over all entries of the batch. A layer's ``penalty=`` gives the same without another evaluation of fn.

    Args:
        fn, z, context, probes, distribution, mode, method, order, step, generator, keywords: As in
            :func:`frobenius_norm_squared`.

    Returns:
        0-d tensor, differentiable with respect to parameters and context.

    Raises:
        TypeError, ValueError, RuntimeError: As :func:`frobenius_norm_squared`.

    Source: Bai, Koltun and Kolter, ICML 2021, equation 4.

    Examples:
        >>> A = torch.tensor([[0.5, 1.0], [0.0, 0.5]])
        >>> pydeq.jacobian_penalty(lambda z: z @ A, torch.zeros(1, 2), method="exact")
        tensor(0.7500)
    """
    adapter = Adapter(z, keywords_for("jacobian_penalty", fn, keywords, _KEYWORDS))
    estimator, layout = Estimator(probes, distribution, mode, method, order, step), layout_of(adapter.z0)
    norms = estimate(estimator, adapter.inside(fn), adapter.z0, adapter.context(context), generator=generator)
    return norms.sum() / max(1, layout.batch * layout.size)
