"""Building blocks for users' own solvers: shapes, the best state so far, statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydeq.compat.processes import flatten
from pydeq.compat.rules import UNKNOWN
from pydeq.compat.torchdeq.solver.stat import SolverStat


def batch_flatten(x: Tensor) -> Tensor:
    """(B, ...) as (B, D); every element of a 0-d or 1-d tensor is a sample."""
    return flatten(x)


def batch_masked_mixing(mask: Tensor, mask_var: Any, orig_var: Any) -> Tensor:
    """Select samples of ``mask_var`` where ``mask``, (B,), is true, else of ``orig_var``. One of the two may be a
    number.

    NaN in samples that are not selected has no effect.

    Raises:
        ValueError: If neither is a tensor.
    """
    like = mask_var if isinstance(mask_var, Tensor) else orig_var
    if not isinstance(like, Tensor):
        raise ValueError("mask_var or orig_var must be a tensor")
    return torch.where(mask.view(-1, *[1] * (like.dim() - 1)), mask_var, orig_var)


def init_solver_info(
    bsz: int, device: Any, init_loss: float = UNKNOWN
) -> tuple[dict[str, list[Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """Make traces that begin with ``init_loss``, lowest residuals and their steps, each for "abs" and "rel"."""

    def start(value: float) -> Tensor:
        return torch.full((bsz,), value, device=device)

    modes = ("abs", "rel")
    return (
        {mode: [start(init_loss)] for mode in modes},
        {mode: start(init_loss) for mode in modes},
        {mode: start(0.0) for mode in modes},
    )


def update_state(
    lowest_xest: Tensor,
    x_est: Tensor,
    nstep: int,
    stop_mode: str,
    abs_diff: Tensor,
    rel_diff: Tensor,
    trace_dict: dict[str, list[Tensor]],
    lowest_dict: dict[str, Tensor],
    lowest_step_dict: dict[str, Tensor],
    return_final: bool = False,
) -> Tensor:
    """Return the best states, including ``x_est`` of step ``nstep``, and update the three dicts.

    Args:
        lowest_xest, x_est: The best states before and the newest ones, (B, ...).
        nstep: Number of the step.
        stop_mode: Whether the "abs" or the "rel" residual decides which state is best.
        abs_diff, rel_diff: Residuals of ``x_est``, (B,).
        trace_dict, lowest_dict, lowest_step_dict: As :func:`init_solver_info` makes them.
        return_final: Always return the newest states.
    """
    for mode, diff in (("abs", abs_diff), ("rel", rel_diff)):
        trace_dict[mode].append(diff)
        better = torch.ones_like(diff, dtype=torch.bool) if return_final else diff < lowest_dict[mode]
        if mode == stop_mode:
            lowest_xest = batch_masked_mixing(better, x_est, lowest_xest).detach()
        lowest_dict[mode] = batch_masked_mixing(better, diff, lowest_dict[mode])
        lowest_step_dict[mode] = batch_masked_mixing(better, nstep, lowest_step_dict[mode])
    return lowest_xest


def solver_stat_from_info(stop_mode: str, lowest_dict: Any, trace_dict: Any, lowest_step_dict: Any) -> SolverStat:
    """:meth:`SolverStat.from_solver_info`."""
    return SolverStat.from_solver_info(stop_mode, lowest_dict, trace_dict, lowest_step_dict)


def solver_stat_from_final_step(z: Any, fz: Any, nstep: int = 0) -> SolverStat:
    """Make the statistics of one evaluation, as :meth:`SolverStat.from_final_step` does.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> z = torch.zeros(1, 1)
        >>> torchdeq.solver_stat_from_final_step(z, torch.cos(z), nstep=3)["abs_lowest"]
        tensor([1.])
    """
    return SolverStat.from_final_step(z, fz, nstep=nstep)


def dummy_solver_stat() -> SolverStat:
    """Statistics that are all -1."""
    return SolverStat()
