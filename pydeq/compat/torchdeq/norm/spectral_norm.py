"""Spectral normalization (Miyato, Kataoka, Koyama and Yoshida, ICLR 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pydeq.compat.torchdeq.norm.weight import TARGETS, WeightRule, hold, named, shared_options

__all__ = ["SpectralNorm"]


class SpectralNorm(WeightRule):
    """w = w_orig * g / sigma(w_orig); parameters <name>_orig and <name>_g, buffers <name>_u and <name>_v.

    sigma is the largest singular value of the weight as a matrix with one row for each output, estimated by power
    iterations that continue from reset to reset.

    Args:
        names, dims, learn_scale, target_norm, clip, clip_value: As :class:`WeightRule`.
        n_power_iterations: Power iterations per reset in training, at least 1.
        eps: Added to norms.
    """

    _target_modules: ClassVar[dict[type, Any]] = dict(TARGETS)

    def __init__(
        self,
        names: Sequence[str],
        dims: Sequence[int],
        learn_scale: bool = True,
        target_norm: float = 1.0,
        clip: bool = False,
        clip_value: float = 1.0,
        n_power_iterations: int = 1,
        eps: float = 1e-12,
    ) -> None:
        super().__init__(names, dims, learn_scale, target_norm, clip, clip_value)
        if n_power_iterations <= 0:
            raise ValueError(f"n_power_iterations must be at least 1, got {n_power_iterations}")
        self.n_power_iterations, self.eps = n_power_iterations, eps

    def weight(self, module: nn.Module, name: str, dim: int, learn: bool) -> Tensor:
        weight = getattr(module, name + "_orig")
        matrix = weight.movedim(dim, 0).flatten(1)
        u, v = getattr(module, name + "_u"), getattr(module, name + "_v")
        if learn:
            with torch.no_grad():
                for _ in range(self.n_power_iterations):
                    v.copy_(normalize(matrix.t() @ u, dim=0, eps=self.eps))
                    u.copy_(normalize(matrix @ v, dim=0, eps=self.eps))
        # Graphs of earlier resets keep the vectors that they were made with.
        sigma = u.clone() @ (matrix @ v.clone())
        return self.scaled(module, name, weight, sigma)

    def compute_weight(self, module: nn.Module, do_power_iteration: bool, name: str, dim: int) -> Tensor:
        """The normed weight."""
        return self.weight(module, name, dim, do_power_iteration)

    def parameters(self, name: str) -> tuple[str, ...]:
        parts = (name + "_orig", name + "_u", name + "_v")
        return (*parts, name + "_g") if self.learn_scale else parts

    @classmethod
    def apply(
        cls,
        module: nn.Module,
        deq_args: Any = None,
        names: Any = None,
        dims: Any = None,
        learn_scale: bool = True,
        target_norm: float = 1.0,
        clip: bool = False,
        clip_value: float = 1.0,
        n_power_iterations: int = 1,
        eps: float = 1e-12,
    ) -> SpectralNorm:
        """Norm the weights of ``module``; its parameters change their names."""
        names, dims = named(cls._target_modules, module, names, dims)
        rule = cls(
            names,
            dims,
            **shared_options(deq_args, learn_scale, target_norm, clip, clip_value),
            n_power_iterations=(deq_args or {}).get("sn_n_power_iters", n_power_iterations),
            eps=eps,
        )
        for name, dim in zip(names, dims, strict=True):
            weight = module._parameters[name]
            assert weight is not None
            matrix = weight.detach().movedim(dim, 0).flatten(1)
            rows, columns = matrix.shape
            delattr(module, name)
            module.register_parameter(name + "_orig", weight)
            hold(module, name, weight.detach())
            if rule.learn_scale:
                shape = [rows if i == dim else 1 for i in range(weight.dim())]
                module.register_parameter(name + "_g", nn.Parameter(weight.new_full(shape, rule.target_norm).detach()))
            module.register_buffer(name + "_u", normalize(weight.new_empty(rows).normal_(), dim=0, eps=eps).detach())
            module.register_buffer(name + "_v", normalize(weight.new_empty(columns).normal_(), dim=0, eps=eps).detach())
        return rule
