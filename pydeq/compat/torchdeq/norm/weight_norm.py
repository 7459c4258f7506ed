"""Weight normalization (Salimans and Kingma, NeurIPS 2016)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pydeq.compat.torchdeq.norm.weight import TARGETS, WeightRule, hold, named, shared_options

__all__ = ["WeightNorm"]


def _norm(v: Tensor, dim: int | None) -> Tensor:
    """The norm of ``v`` over all dimensions except ``dim``; these dimensions have size 1 in the result."""
    others = [i for i in range(v.dim()) if dim is None or i != dim % v.dim()]
    return torch.linalg.vector_norm(v, dim=others, keepdim=True)


class WeightNorm(WeightRule):
    """w = v * g / ||v||, the norm of each output; parameters <name>_v and <name>_g."""

    _target_modules: ClassVar[dict[type, Any]] = dict(TARGETS)

    def weight(self, module: nn.Module, name: str, dim: int, learn: bool) -> Tensor:
        v = getattr(module, name + "_v")
        return self.scaled(module, name, v, _norm(v, dim))

    def compute_weight(self, module: nn.Module, name: str, dim: int) -> Tensor:
        """The normed weight."""
        return self.weight(module, name, dim, False)

    def parameters(self, name: str) -> tuple[str, ...]:
        return (name + "_v", name + "_g") if self.learn_scale else (name + "_v",)

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
    ) -> WeightNorm:
        """Norm the weights of ``module``; its parameters change their names."""
        names, dims = named(cls._target_modules, module, names, dims)
        rule = cls(names, dims, **shared_options(deq_args, learn_scale, target_norm, clip, clip_value))
        for name, dim in zip(names, dims, strict=True):
            weight = getattr(module, name).detach()
            del module._parameters[name]
            if rule.learn_scale:
                module.register_parameter(name + "_g", nn.Parameter(_norm(weight, dim)))
            module.register_parameter(name + "_v", nn.Parameter(weight))
            hold(module, name, rule.weight(module, name, dim, False))
        return rule
