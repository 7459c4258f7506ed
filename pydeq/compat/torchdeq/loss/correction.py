"""Fixed-point correction: a loss on several states of a solve, with larger weights for later states.

Source: Bai, Geng, Savani and Kolter, Deep Equilibrium Optical Flow Estimation, CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["fp_correction", "register_weight_func"]


def _linear(n: int, k: int, gamma: float = 0.9, bias: float = 0.0, **kwargs: Any) -> float:
    return 1 - (n - k - 1) / n * gamma + bias


def _exp(n: int, k: int, gamma: float = 0.8, **kwargs: Any) -> float:
    return gamma ** (n - k - 1)


def _const(n: int, k: int, c: float = 1.0, **kwargs: Any) -> float:
    return c


_weight_funcs: dict[str, Callable[..., Any]] = {"exp": _exp, "linear": _linear, "const": _const}


def register_weight_func(name: str, func: Callable[..., Any]) -> None:
    """Make func(n, k, **kwargs), the weight of state k of n, available as ``name``."""
    if not callable(func):
        raise AssertionError(f"func must be callable, got {type(func).__name__}")
    _weight_funcs[name] = func


def fp_correction(
    crit: Callable[..., Any],
    args: Sequence[Any],
    weight_func: str = "exp",
    return_loss_values: bool = False,
    **kwargs: Any,
) -> Any:
    """Sum weight(n, k) crit(arguments of state k) over the states k.

    Args:
        crit: The loss.
        args: Its arguments; a list or tuple holds one for each state, and shorter ones repeat.
        weight_func: "exp", gamma^(n-k-1) with gamma .8; "linear", 1 - (n-k-1)/n gamma + bias with gamma .9 and bias 0;
            "const", c with c 1; or a registered one.
        return_loss_values: Also return the unweighted losses, as floats.
        kwargs: Passed on to the weight function.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> states = [torch.zeros(1), torch.ones(1)]
        >>> torchdeq.fp_correction(torch.nn.functional.mse_loss, (states, torch.full((1,), 2.0)))
        tensor(4.2000)
    """
    if weight_func not in _weight_funcs:
        raise AssertionError(f"weight_func must be one of {', '.join(_weight_funcs)}, got {weight_func!r}")
    weight = _weight_funcs[weight_func]
    lists = [arg if isinstance(arg, list | tuple) else [arg] for arg in args]
    n = max(map(len, lists), default=0)
    loss: Any = 0.0
    values = []
    for k in range(n):
        one = crit(*(entries[k % len(entries)] for entries in lists))
        loss = loss + weight(n, k, **kwargs) * one
        if return_loss_values:
            values.append(one.item())
    return (loss, values) if return_loss_values else loss
