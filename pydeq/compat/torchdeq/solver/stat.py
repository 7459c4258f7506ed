"""``SolverStat``: the statistics of a solve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pydeq.compat.processes import flatten, norms

_ABSENT = {"abs_lowest": 1, "rel_lowest": 1, "abs_trace": 2, "rel_trace": 2, "nstep": 1, "sradius": 1}


class SolverStat(dict):
    """Statistics of a solve, by name; a missing value is -1.

    ``abs_lowest`` and ``rel_lowest``, (B,): the smallest ||f(z) - z|| and ||f(z) - z|| / ||f(z)||. ``abs_trace`` and
    ``rel_trace``, (B, N): the same along the solve, beginning with 1e8. ``nstep``, (B,): the best step. ``sradius``,
    (B,): the spectral radius, if requested.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> z, states, info = torchdeq.fixed_point_iter(torch.cos, torch.zeros(1, 1), max_iter=10, tol=0.0)
        >>> sorted(info), info["rel_trace"].shape
        (['abs_lowest', 'abs_trace', 'nstep', 'rel_lowest', 'rel_trace', 'sradius'], torch.Size([1, 11]))
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name, dims in _ABSENT.items():
            if name not in self:
                self[name] = torch.full((1,) * dims, -1.0)

    @classmethod
    def from_solver_info(
        cls,
        stop_mode: str,
        lowest_dict: Mapping[str, Tensor],
        trace_dict: Mapping[str, Sequence[Tensor]],
        lowest_step_dict: Mapping[str, Tensor],
    ) -> SolverStat:
        """Make statistics from lowest residuals, traces (lists of (B,) tensors) and best steps, by stop mode."""
        return cls(
            abs_lowest=lowest_dict["abs"],
            rel_lowest=lowest_dict["rel"],
            abs_trace=torch.stack(list(trace_dict["abs"]), dim=1),
            rel_trace=torch.stack(list(trace_dict["rel"]), dim=1),
            nstep=lowest_step_dict[stop_mode],
        )

    @classmethod
    def from_final_step(cls, z: Any, fz: Any, nstep: int = 0) -> SolverStat:
        """Make the statistics of one evaluation ``fz`` = f(``z``), tensors or sequences of tensors."""
        if not isinstance(z, Tensor):
            z = torch.cat([flatten(part) for part in z], dim=1)
            fz = torch.cat([flatten(part) for part in fz], dim=1)
        z, fz = flatten(z), flatten(fz)
        lowest = norms(fz - z)
        relative = lowest / (norms(fz) + 1e-8)
        return cls(
            abs_lowest=lowest,
            rel_lowest=relative,
            abs_trace=lowest[:, None],
            rel_trace=relative[:, None],
            nstep=nstep * torch.ones(len(z), device=z.device),
        )
