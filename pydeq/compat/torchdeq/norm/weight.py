"""The base of the norms: a weight computed from parameters, kept as a plain attribute of its module between resets."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

TARGETS = {
    nn.Linear: ("weight", 0),
    nn.Conv1d: ("weight", 0),
    nn.Conv2d: ("weight", 0),
    nn.Conv3d: ("weight", 0),
    nn.ConvTranspose1d: ("weight", 1),
    nn.ConvTranspose2d: ("weight", 1),
    nn.ConvTranspose3d: ("weight", 1),
}


class WeightRule(ABC):
    """w <- w * scale / norm(w), with ``clip`` w <- w * min(clip_value, scale / norm(w)).

    Args:
        names: Weights of the module.
        dims: The output dimension of each weight.
        learn_scale: Whether scale is a parameter; else it is ``target_norm``.
        target_norm: Scale.
        clip: Whether the factor is bounded.
        clip_value: Its bound.
    """

    def __init__(
        self,
        names: Sequence[str],
        dims: Sequence[int],
        learn_scale: bool = True,
        target_norm: float = 1.0,
        clip: bool = False,
        clip_value: float = 1.0,
    ) -> None:
        self.names, self.dims = names, dims
        self.learn_scale, self.target_norm = learn_scale, target_norm
        self.clip, self.clip_value = clip, clip_value

    @abstractmethod
    def weight(self, module: nn.Module, name: str, dim: int, learn: bool) -> Tensor:
        """The normed weight, with a graph; ``learn`` allows updates of running estimates."""

    @abstractmethod
    def parameters(self, name: str) -> tuple[str, ...]:
        """The names of the parameters that the weight is computed from."""

    def scaled(self, module: nn.Module, name: str, weight: Tensor, norm: Tensor) -> Tensor:
        """``weight`` times its factor."""
        factor = (getattr(module, name + "_g") if self.learn_scale else self.target_norm) / norm
        if self.clip:  # at the bound, minimum halves the gradient, as in torchdeq; clamp does not
            factor = torch.minimum(factor, torch.full_like(factor, self.clip_value))
        return weight * factor

    def __call__(self, module: nn.Module) -> None:
        """Compute the weights of ``module`` again."""
        for name, dim in zip(self.names, self.dims, strict=True):
            hold(module, name, self.weight(module, name, dim, module.training))

    def remove(self, module: nn.Module) -> None:
        """Make the weights of ``module`` plain parameters."""
        for name, dim in zip(self.names, self.dims, strict=True):
            with torch.no_grad():
                weight = self.weight(module, name, dim, False)
            delattr(module, name)
            for part in self.parameters(name):
                delattr(module, part)
            module.register_parameter(name, nn.Parameter(weight.detach()))


def hold(module: nn.Module, name: str, weight: Tensor) -> None:
    """Make ``weight`` an attribute of ``module``.

    torch refuses to copy a tensor with a graph, or to send it to another process. So a copied or pickled module holds
    the weight's value, without a graph, until the next reset.
    """
    setattr(module, name, weight)
    if "__reduce_ex__" not in module.__dict__:
        module.__dict__["__reduce_ex__"] = _Detached(module)


class _Detached:
    """Reduce a module for ``copy`` and ``pickle``, without the graphs of its attributes.

    Args:
        module: The module; this object is its ``__reduce_ex__``.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)  # no reference cycle: parameters are freed with their module

    def __call__(self, protocol: Any) -> tuple[Any, ...]:
        module = self.module()
        assert module is not None
        make, arguments, state, *rest = type(module).__reduce_ex__(module, protocol)
        if isinstance(state, dict):
            state = {
                key: value.detach() if isinstance(value, Tensor) and value.grad_fn is not None else value
                for key, value in state.items()
                if not isinstance(value, _Detached)  # the next reset makes a new one
            }
        return (make, arguments, state, *rest)


def named(targets: dict[type, Any], module: nn.Module, names: Any, dims: Any) -> tuple[list[str], list[int]]:
    """The weights of ``module`` to norm, and their dimensions, as lists."""
    if names is None or dims is None:
        names, dims = targets[type(module)]
    names, dims = [names] if isinstance(names, str) else list(names), [dims] if isinstance(dims, int) else list(dims)
    if len(names) != len(dims):
        raise AssertionError(f"names and dims must be of one length, got {len(names)} and {len(dims)}")
    return names, dims


def shared_options(args: Any, learn_scale: bool, target_norm: float, clip: bool, clip_value: float) -> dict[str, Any]:
    """The options of every norm; ``args`` overrides them."""
    get = (args or {}).get
    return {
        "learn_scale": not get("norm_no_scale", not learn_scale),
        "target_norm": get("norm_target_norm", target_norm),
        "clip": get("norm_clip", clip),
        "clip_value": get("norm_clip_value", clip_value),
    }
