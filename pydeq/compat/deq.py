"""Replacements for ``lib.solvers`` and ``lib.jacobian`` of locuslab/deq (2021): the same calls, pydeq's numerics.

Like the original, they iterate until the norm of the whole batch meets the tolerance, and return the iterate of one
step for all samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pydeq.compat.jacobian import dominant_eigenvalue, hutchinson
from pydeq.compat.mode import is_legacy
from pydeq.compat.processes import Process, anderson_process, broyden_process
from pydeq.compat.rules import STALL_RATIO, STALL_TOLERANCES, STALL_WINDOW, UNKNOWN
from pydeq.compat.warning import warn_of_backward
from pydeq.ops.constants import Scalar

__all__ = ["anderson", "broyden", "jac_loss_estimate", "power_method"]

KEYS = ("result", "lowest", "nstep", "prot_break", "abs_trace", "rel_trace", "eps", "threshold")
"""The keys of the dict that :func:`broyden` and :func:`anderson` return."""

# The residual may grow by this factor for each position of a sequence before a solve is given up.
_PROTECTION = {"abs": 1e6, "rel": 1e3}


def broyden(
    f: Callable[[Tensor], Tensor],
    x0: Tensor,
    threshold: int,
    eps: float = 1e-3,
    stop_mode: str = "rel",
    ls: bool = False,
    name: str = "unknown",
    *,
    legacy: bool | None = None,
) -> dict[str, Any]:
    """Solve x = f(x) by Broyden's good method; no gradient.

    Args:
        f: The map, on tensors like x0.
        x0: Where to start, (B, D, L).
        threshold: Maximum number of steps. Each calls f once, and there is one call before; with a line search there
            are more.
        eps: Stop when the residual of the whole batch is below ``eps``.
        stop_mode: "abs" for ||f(x) - x||, "rel" for that over ||f(x)|| + 1e-9.
        ls: Line search by Armijo's rule, of each sample; in legacy mode of the whole batch.
        name: Name of the solve. A solve named "backward", or a solve without a name in a backward pass, warns once if
            it does not converge.
        legacy: Reproduce the original's iterates; by default, whether :func:`pydeq.compat.legacy` is active.

    Returns:
        ``result``, the best x; ``lowest``, its residual; ``nstep``, its step; ``prot_break``, whether the residual
        exploded; ``abs_trace`` and ``rel_trace``, threshold + 1 floats each; ``eps``; ``threshold``.

    Examples:
        >>> from pydeq.compat.deq import broyden
        >>> out = broyden(torch.cos, torch.zeros(1, 4, 2), threshold=30, eps=1e-5)
        >>> out["result"].mean()
        tensor(0.7391)
    """
    legacy = is_legacy(legacy)

    def start() -> Process:
        return broyden_process(f, x0, max(1, threshold), ls, threshold + 1, legacy)

    protection = _PROTECTION.get(stop_mode, math.inf) * (x0.shape[-1] if x0.dim() > 2 else 1)
    loop = _Loop(
        stop_mode, eps, threshold, first=1, shift=1e-9, legacy=legacy, protection=protection, stalls=True,
        backward="broyden" if _in_backward(name) else "",
    )  # fmt: skip
    return loop.run(start, x0, evaluations=threshold + 1, columns=threshold + 1)


def anderson(
    f: Callable[[Tensor], Tensor],
    x0: Tensor,
    m: int = 6,
    lam: float = 1e-4,
    threshold: int = 50,
    eps: float = 1e-3,
    stop_mode: str = "rel",
    beta: float = 1.0,
    **kwargs: Any,
) -> dict[str, Any]:
    """Solve x = f(x) by Anderson mixing; no gradient.

    Args:
        f: The map, on tensors like x0.
        x0: Where to start, (B, D, L).
        m: Columns mixed.
        lam: Ridge. Relative here: lam / 100 of the Gram matrix's diagonal; absolute in legacy mode.
        threshold: Maximum number of calls of f.
        eps: Stop when the residual of the whole batch is below ``eps``.
        stop_mode: "abs" for ||f(x) - x||, "rel" for that over ||f(x)|| + 1e-5.
        beta: Damping. Outside of (0, 1] the original's steps are taken.
        kwargs: ``legacy=True`` reproduces the original's iterates; ``name`` is as for :func:`broyden`; the rest is
            ignored.

    Returns:
        As :func:`broyden`; the traces hold threshold - 2 floats, and ``nstep`` counts evaluations from 0.

    Examples:
        >>> from pydeq.compat.deq import anderson
        >>> out = anderson(torch.cos, torch.zeros(1, 4, 2), eps=1e-5)
        >>> out["result"].mean()
        tensor(0.7391)
    """
    legacy = is_legacy(kwargs.get("legacy"))

    def start() -> Process:
        return anderson_process(f, x0, m, lam, beta, threshold, legacy)

    backward = "anderson" if _in_backward(kwargs.get("name", "unknown")) else ""
    loop = _Loop(stop_mode, eps, threshold, first=2, shift=1e-5, legacy=legacy, backward=backward)
    return loop.run(start, x0, evaluations=threshold, columns=max(0, threshold - 2))


def jac_loss_estimate(f0: Tensor, z0: Tensor, vecs: int = 2, create_graph: bool = True) -> Tensor:
    """Estimate ||J||_F^2 / numel(z0) of J = df0/dz0 by Gaussian probes (Hutchinson 1989).

    Args:
        f0, z0: f(z0) and z0, with the graph between them.
        vecs: Probes, at least 1.
        create_graph: Whether the estimate is to be differentiated.

    Returns:
        0-d tensor.

    Source: Bai, Koltun and Kolter, Stabilizing Equilibrium Models by Jacobian Regularization, ICML 2021.

    Examples:
        >>> from pydeq.compat.deq import jac_loss_estimate
        >>> z = torch.zeros(1, 4, 2, requires_grad=True)
        >>> jac_loss_estimate(0.5 * z, z).shape
        torch.Size([])
    """
    return hutchinson(f0, z0, vecs, create_graph, is_legacy())


def power_method(f0: Tensor, z0: Tensor, n_iters: int = 200) -> tuple[Tensor, Tensor]:
    """Estimate the largest |eigenvalue| of J = df0/dz0 of each sample by power iteration.

    Args:
        f0, z0: f(z0) and z0, with the graph between them; samples are independent.
        n_iters: Vector-Jacobian products, at least 1.

    Returns:
        The last direction, like z0, and the moduli, (B, 1).

    Examples:
        >>> from pydeq.compat.deq import power_method
        >>> z = torch.zeros(1, 2, 1, requires_grad=True)
        >>> power_method(z * torch.tensor([[0.75], [0.25]]), z)[1]
        tensor([[0.7500]])
    """
    evector, modulus = dominant_eigenvalue(f0, z0, n_iters, is_legacy())
    return evector, modulus[:, None]


class _Loop:
    """The loop of a solve: decides when to stop, and which state and statistics to return.

    It is not pydeq's own loop: it stops by the norm of the whole batch, while pydeq's loop stops each sample
    separately.

    Args:
        stop_mode, eps, threshold: As the caller gave them.
        first: Number of evaluations at the start that have no entry in the traces.
        shift: Added to the denominator of relative residuals.
        legacy: Decide as the original does: it ignores evaluations before ``first``.
        protection: Give up when the residual has grown by this factor since the first entry.
        stalls: Whether a solve without progress stops.
        backward: The solver's name if it solves for gradients, for the warning; otherwise empty.
    """

    def __init__(
        self,
        stop_mode: str,
        eps: float,
        threshold: int,
        first: int,
        shift: float,
        legacy: bool,
        protection: float = math.inf,
        stalls: bool = False,
        backward: str = "",
    ) -> None:
        if stop_mode not in ("abs", "rel"):
            raise ValueError(f"stop_mode must be 'abs' or 'rel', got {stop_mode!r}")
        self.stop_mode, self.eps, self.threshold = stop_mode, eps, threshold
        self.first, self.shift, self.legacy = first, shift, legacy
        self.protection, self.stalls, self.backward = protection, stalls, backward

    def run(self, start: Callable[[], Process], x0: Tensor, evaluations: int, columns: int) -> dict[str, Any]:
        """Run the process that ``start`` makes; no gradient."""
        mode = int(self.stop_mode == "rel")
        lowest, steps, broken = [UNKNOWN, UNKNOWN], [0, 0], False
        traces: tuple[list[float], list[float]] = ([], [])
        with torch.no_grad():
            result = x0.detach().clone()
            process = start() if evaluations > 0 and x0.numel() else None
            for k in range(evaluations if process else 0):
                assert process is not None
                row = process.advance()
                if self.legacy and k < self.first:
                    continue
                hopeless = process.hopeless
                broken = hopeless is not None and bool(
                    hopeless.any()
                )  # the batch no longer has an iterate that meets the tolerance
                absolute = _length(row[:, Scalar.RESIDUAL])
                pair = (absolute, absolute / (_length(row[:, Scalar.NORM]) + self.shift))
                for i in (0, 1):
                    if k >= self.first:
                        traces[i].append(pair[i])
                    if pair[i] < lowest[i]:
                        lowest[i], steps[i] = pair[i], k
                        if i == mode:
                            result.copy_(process.z.view(x0.shape))
                if pair[mode] < self.eps or broken or self._stalled(traces[mode]):
                    break
                if traces[mode] and not pair[mode] <= self.protection * traces[mode][0]:
                    broken = True
                    break
        if self.backward and self.eps <= lowest[mode] < UNKNOWN:
            warn_of_backward(
                self.backward,
                f"its batch at a residual of {lowest[mode]:.2g} ({self.stop_mode}), eps is {self.eps:.2g}",
                "increase its threshold or eps",
            )
        for i in (0, 1):
            traces[i].extend([lowest[i]] * (columns - len(traces[i])))
        return {
            "result": result,
            "lowest": lowest[mode],
            "nstep": steps[mode],
            "prot_break": broken,
            "abs_trace": traces[0],
            "rel_trace": traces[1],
            "eps": self.eps,
            "threshold": self.threshold,
        }

    def _stalled(self, trace: list[float]) -> bool:
        """Whether the residual is near the tolerance and the last steps made no progress."""
        if not self.stalls or len(trace) <= STALL_WINDOW or trace[-1] >= STALL_TOLERANCES * self.eps:
            return False
        last = trace[-STALL_WINDOW:]
        return max(last) < STALL_RATIO * min(last)


def _in_backward(name: str) -> bool:
    """Whether a solve is for gradients: by its name, or because autograd is running."""
    if name == "unknown":
        return torch._C._current_graph_task_id() != -1  # pyright: ignore
    return name == "backward"


def _length(norms: np.ndarray) -> float:
    """The norm of the whole batch from those of its samples."""
    return float(np.sqrt(np.square(norms).sum()))
