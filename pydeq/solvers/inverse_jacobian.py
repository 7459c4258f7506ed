"""Broyden's approximation of the inverse Jacobian at the end of a solve, as a linear map.

In the notation of :mod:`pydeq.ops.broyden_step`, for a sample with n steps,

    N = (I + w_{n-1} s_{n-1}^T) ... (I + w_0 s_0^T) ~ (I - J)^-1,    w_j = theta_j s_{j+1} / ||s_j||^2

The last factor needs s_n, the step from the solution. The solve ends without this step, so it is computed here from the
last evaluation. Products with N and N^T take the inner products of a
vector with the steps, a small triangular recursion with the Gram matrix, and one combination of the steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pydeq.ops.broyden_step import denominator_damping


class InverseJacobian:
    """The linear map N of each sample.

    Args:
        steps: s_0, s_1, ..., K of them, each [B, D]. Rows of steps that a sample did not take are overwritten.
        gram: S^T S, lower triangle, float64 [B, >= K, >= K].
        thetas: float64 [B, >= K].
        counts: n of each sample, at most K, int64 [B].
        residual: g at the iterate that the last step led to, [B, D].
        complete: Whether ``residual`` is known, bool [B]; if not, the last factor is left out.
    """

    def __init__(
        self,
        steps: Sequence[Tensor],
        gram: Tensor,
        thetas: Tensor,
        counts: Tensor,
        residual: Tensor,
        complete: Tensor,
    ) -> None:
        columns = len(steps)
        index = torch.arange(columns, device=residual.device)
        taken = index < counts[:, None]  # [B, K]
        for j, s in enumerate(steps):
            s.masked_fill_(~taken[:, j, None], 0.0)  # these rows were never written
        self.steps = tuple(steps)
        gram = gram[:, :columns, :columns]
        self.gram = torch.where(taken[:, :, None] & taken[:, None, :], gram, 0.0)
        squared = self.gram.diagonal(dim1=1, dim2=2)
        safe = torch.where(squared > 0, squared, 1.0)
        self.last = index == counts[:, None] - 1  # [B, K] the factor that holds ``newest``, not a step
        self.weights = torch.where(taken & ~self.last, thetas[:, :columns] / safe, 0.0)  # [B, K]
        self.newest = torch.zeros_like(residual)
        if not columns:
            return
        v = self.product(residual)
        a = (self.last * self._recursion(self._inner(residual))[1] / safe).sum(1)
        theta = denominator_damping(1.0 - a)
        sound = complete & (counts > 0) & (theta * a).isfinite()
        s = v / (1.0 - theta * a).to(v.dtype)[:, None]
        self.newest = torch.where(sound[:, None], s, 0.0)
        self.weights = torch.where(self.last & sound[:, None], theta[:, None] / safe, self.weights)

    def product(self, v: Tensor) -> Tensor:
        """N v; [B, D] -> [B, D]."""
        wide = v.to(self.newest.dtype)
        c = self._recursion(self._inner(wide))[0]
        inner = torch.where(self.last, 0.0, c).to(wide.dtype)
        result = wide + (self.last * c).sum(1).to(wide.dtype)[:, None] * self.newest
        for j in range(len(self.steps) - 1):
            result.addcmul_(inner[:, j, None], self.steps[j + 1])
        return result.to(v.dtype)

    def transpose_product(self, v: Tensor) -> Tensor:
        """N^T v; [B, D] -> [B, D]. The newest factor comes first."""
        wide = v.to(self.newest.dtype)
        newest = torch.linalg.vecdot(self.newest, wide).double()
        t = torch.nn.functional.pad(self._inner(wide), (0, 1))  # a last factor has no step after it
        d = torch.zeros_like(self.weights)
        for j in reversed(range(len(self.steps))):
            product = torch.where(self.last[:, j], newest, t[:, j + 1])
            if j + 1 < len(self.steps):
                product = product + (d[:, j + 1 :] * self.gram[:, j + 1 :, j + 1]).sum(1)
            d[:, j] = self.weights[:, j] * product
        result, narrow = wide.clone(), d.to(wide.dtype)
        for j, s in enumerate(self.steps):
            result.addcmul_(narrow[:, j, None], s)
        return result.to(v.dtype)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that products need, for autograd to save; see ``from_tensors``."""
        return self.newest, self.gram, self.weights, self.last, *self.steps

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor]) -> InverseJacobian:
        self = cls.__new__(cls)
        self.newest, self.gram, self.weights, self.last = tensors[:4]
        self.steps = tuple(tensors[4:])
        return self

    def _inner(self, v: Tensor) -> Tensor:
        """S^T v, float64 [B, K]."""
        if not self.steps:
            return self.weights.new_zeros(len(v), 0)
        return torch.stack([torch.linalg.vecdot(s, v) for s in self.steps], dim=1).double()

    def _recursion(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """c_j = weights_j total_j,  total_j = t_j + sum_{i<j} c_i G[j, i+1]; both [B, K]."""
        c, totals = torch.zeros_like(t), torch.zeros_like(t)
        for j in range(t.shape[1]):
            totals[:, j] = t[:, j] + (c[:, :j] * self.gram[:, j, 1 : j + 1]).sum(1)
            c[:, j] = self.weights[:, j] * totals[:, j]
        return c, totals
