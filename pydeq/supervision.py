"""Losses on intermediate states of a solve."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pydeq.adjoints.base import AdjointResult, Problem
from pydeq.state import State, layout_of


def differentiable_states(problem: Problem, result: AdjointResult) -> list[State]:
    """The intermediate states of a solve, each with the gradient of one evaluation; for states after its end, the
    output.

    Source: Bai, Geng, Savani and Kolter, Deep Equilibrium Optical Flow Estimation, CVPR 2022.
    """
    layout = layout_of(problem.z0)
    cast = torch.is_autocast_enabled(layout.device.type)
    states: list[State] = []
    for count, state in zip(problem.options["states_at"], result.solution.states, strict=True):
        if count < result.solution.nfe:
            states.append(layout.check(problem.cell.call(state, *problem.context), cast, detach=False))
        else:
            states.append(result.output)
    return states


def _exponential(k: int, n: int, gamma: float) -> float:
    return gamma ** (n - k - 1)


def _linear(k: int, n: int, gamma: float) -> float:
    return 1.0 - (n - k - 1) / n * gamma


def _constant(k: int, n: int, gamma: float) -> float:
    return gamma


# For each name, the weight of state k of n, and the default of gamma.
_WEIGHTS: dict[str, tuple[Callable[[int, int, float], float], float]] = {
    "exponential": (_exponential, 0.8),
    "linear": (_linear, 0.9),
    "constant": (_constant, 1.0),
}


def fixed_point_correction(
    criterion: Callable[..., Tensor],
    states: Sequence[State],
    *targets: Any,
    weights: str | Callable[[int, int], float] | Sequence[float] = "exponential",
    gamma: float | None = None,
    return_losses: bool = False,
) -> Tensor | tuple[Tensor, list[Tensor]]:
    """Sum the weighted losses of states that lead to a fixed point.

    sum_k w_k criterion(states[k], *targets),   k = 0 ... n - 1; the last state is the fixed point

    Args:
        criterion: criterion(state, *targets) -> tensor, one loss or one per sample.
        states: n states, at least 1; the ``states`` of a solution of :class:`pydeq.DEQ`.
        targets: Passed on to the criterion, the same ones for every state.
        weights: "exponential": gamma^(n-k-1). "linear": 1 - gamma (n-k-1)/n. "constant": gamma. Or weights(k, n) ->
            float, or n numbers.
        gamma: By default .8, .9 and 1 in this order.
        return_losses: Also return the n losses, without their weights.

    Returns:
        The weighted sum, of the shape of one loss; with ``return_losses`` the pair (sum, losses).

    Raises:
        TypeError, ValueError: If an argument is of the wrong type or out of range.

    Source: Bai, Geng, Savani and Kolter, Deep Equilibrium Optical Flow Estimation, CVPR 2022.

    Examples:
        >>> states = [torch.zeros(1), torch.ones(1)]
        >>> pydeq.fixed_point_correction(torch.nn.functional.mse_loss, states, torch.full((1,), 2.0))
        tensor(4.2000)
    """
    if not callable(criterion):
        raise TypeError(f"criterion must be callable, got {type(criterion).__name__}")
    if isinstance(states, Tensor) or not isinstance(states, Sequence):
        raise TypeError(f"states must be a list of states, got {type(states).__name__}")
    n = len(states)
    if not n:
        raise ValueError("states must have at least one state, got none: ask the layer for them with states_at")
    factors = _factors(weights, gamma, n)
    losses = [criterion(state, *targets) for state in states]
    total = factors[0] * losses[0]
    for factor, loss in zip(factors[1:], losses[1:], strict=True):
        total = total + factor * loss
    return (total, losses) if return_losses else total


def _factors(weights: str | Callable[[int, int], float] | Sequence[float], gamma: float | None, n: int) -> list[float]:
    """The weights of n states."""
    if isinstance(weights, str):
        if weights not in _WEIGHTS:
            raise ValueError(f"weights must be one of {', '.join(map(repr, _WEIGHTS))}, got {weights!r}")
        rule, default = _WEIGHTS[weights]
        if gamma is not None and not math.isfinite(gamma):
            raise ValueError(f"gamma must be finite, got {gamma}")
        return [rule(k, n, default if gamma is None else gamma) for k in range(n)]
    if gamma is not None:
        raise ValueError(f"gamma belongs to weights given by name, got {gamma} with {weights!r}")
    if callable(weights):
        return [weights(k, n) for k in range(n)]
    if not isinstance(weights, Sequence):
        raise TypeError(f"weights must be a name, a callable or a list of numbers, got {type(weights).__name__}")
    if len(weights) != n:
        raise ValueError(f"weights must have one entry for each of the {n} states, got {len(weights)}")
    return [float(weight) for weight in weights]
