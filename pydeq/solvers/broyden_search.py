"""Broyden's good method with a line search for each sample, in plain torch.

The approximation N ~ (I - J)^-1 is a product of factors, and each direction is d = N g for g = f(z) - z:

    N = (I + w_{n-1} s_{n-1}^T) ... (I + w_0 s_0^T)

s = lambda d is a step as it was taken, and y the change of g along it. The next factor comes from v = N g at the new
point, with N as it was before the step:

    N y = v - s / lambda,   delta = -s^T N y / ||s||^2,   w = theta (s + N y) / ((1 - theta + theta delta) ||s||^2)

so that the new N y = -s if theta = 1. theta keeps the denominator away from 0, as in
:mod:`pydeq.ops.broyden_step`. For lambda = 1 this is the method there, which does not store the w.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pydeq.ops.broyden_step import denominator_damping
from pydeq.ops.reduction import inner
from pydeq.ops.termination import Rules
from pydeq.solvers.line_search import SearchWorkspace


class BroydenSearchWorkspace(SearchWorkspace):
    """The workspace: after k steps at most 2 k + 8 state vectors, without f.

    A direction need not be one of descent. So after two rejected trials the third one is accepted at any finite
    residual: its step is short, and the update learns the Jacobian along it.

    Args:
        memory: Factors kept, at least 1. A sample whose memory is full keeps only the newest pair (s, y).
    """

    trials: ClassVar[int] = 2
    accepts_last: ClassVar[bool] = True

    def __init__(self, flat: Tensor, rules: Rules, max_steps: int, memory: int, name: str) -> None:
        super().__init__(flat, rules, max_steps, name)
        self.memory = memory
        self.steps: list[Tensor] = []
        self.factors: list[Tensor] = []
        self.count = flat.new_zeros(flat.shape[0], dtype=torch.int64)
        self.previous = torch.zeros_like(self.residual)  # g where the last step began

    def search_from(self, rows: Tensor, fresh: Tensor) -> Tensor:
        g = self.residual
        follows = rows & ~fresh
        self.count.masked_fill_(fresh, 0)
        v = g
        for j, (s, w) in enumerate(zip(self.steps, self.factors, strict=True)):
            added = v + inner(s, v)[:, None].to(v.dtype) * w
            v = torch.where((follows & (self.count > j))[:, None], added, v)
        if self.some(follows):
            v = self._update(follows, v)
        self.direction = torch.where(rows[:, None], v, self.direction)
        self.previous = torch.where(rows[:, None], g, self.previous)
        self.eta.masked_fill_(rows, 0.0)
        return rows & v.isfinite().all(1)

    def _update(self, rows: Tensor, v: Tensor) -> Tensor:
        """Add the factor of the step that led to ``base``, for some rows; return the new N g.

        Args:
            v: N g with the factors so far, [B, D].
        """
        s = self.length.to(self.wide)[:, None] * self.direction
        change = v - self.direction
        full = rows & (self.count >= self.memory)
        if self.some(full):  # N = I from here on
            change = torch.where(full[:, None], self.residual - self.previous, change)
            v = torch.where(full[:, None], self.residual, v)
            self.count.masked_fill_(full, 0)
        squared = inner(s, s)
        delta = -inner(s, change) / squared
        theta = denominator_damping(delta)
        scale = theta / ((1.0 - theta + theta * delta) * squared)
        w = scale.to(self.wide)[:, None] * (s + change)
        places = self.count.masked_fill(~rows, -1)
        for j in self.places(places, rows):
            if j == len(self.steps):
                self.steps.append(torch.zeros_like(s))
                self.factors.append(torch.zeros_like(s))
            here = (places == j)[:, None]
            self.steps[j] = torch.where(here, s, self.steps[j])
            self.factors[j] = torch.where(here, w, self.factors[j])
        self.count += rows
        return torch.where(rows[:, None], v + inner(s, v)[:, None].to(v.dtype) * w, v)

    def places(self, places: Tensor, rows: Tensor) -> list[int]:
        """The places [B] of new factors of some ``rows``, bool [B], each once."""
        return places[rows].unique().tolist()
