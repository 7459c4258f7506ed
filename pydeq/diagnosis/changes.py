"""Changes of a cell, each made to a copy and tried on the batch: normalized weights, smaller weights, a penalty."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pydeq.jacobian import JacobianPenalty
from pydeq.nn import apply_norm
from pydeq.state import State

# Penalty training on a copy: steps, and their size.
_STEPS, _LEARNING_RATE = 20, 1e-2


def copied(cell: Any) -> Any | None:
    """A copy of a cell that is a module; None if it cannot be copied."""
    if not isinstance(cell, nn.Module):
        return None
    try:
        return copy.deepcopy(cell)
    except (RuntimeError, TypeError):  # it holds a tensor with a graph, or something that takes no copies
        return None


def with_spectral_norm(cell: nn.Module, bound: float) -> list[str]:
    """Normalize the weights of linear maps and convolutions in place; return their names, none if there are none."""
    try:
        return apply_norm(cell, "spectral_norm", bound=bound, n_power_iterations=10)
    except (TypeError, ValueError):
        return []


def with_smaller_weights(cell: nn.Module, factor: float) -> int:
    """Multiply all weight matrices in place; return their number."""
    weights = [weight for weight in cell.parameters() if weight.dim() >= 2]
    with torch.no_grad():
        for weight in weights:
            weight.mul_(factor)
    return len(weights)


def train_with_penalty(
    cell: nn.Module, penalty: JacobianPenalty, fn: Callable[[Any], Any], find: Callable[[], Tensor], view: Any
) -> bool:
    """Take steps of Adam on the penalty only, at the state that ``find`` gives; return whether this was possible.

    Args:
        fn: The map of states that uses the cell.
        find: Returns a state near the fixed point of the present parameters, [B, D].
        view: Converts [B, D] to a state.
    """
    parameters = [parameter for parameter in cell.parameters() if parameter.requires_grad]
    if not parameters:
        return False
    optimizer = torch.optim.Adam(parameters, lr=_LEARNING_RATE)
    for _ in range(_STEPS):
        state: State = view(find())
        optimizer.zero_grad()
        with torch.enable_grad():
            penalty.evaluate(fn, state).backward()
        optimizer.step()
    return True
