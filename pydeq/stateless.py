"""A module's parameters and buffers, told apart from the module: for calls with others, and for calls long after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Stateless(nn.Module):
    """``fn``, which uses ``module``, as a function of the module's parameters and buffers.

    Attributes:
        tensors: What is in the module now, each once.
    """

    def __init__(self, module: nn.Module, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.fn = (fn,)  # not as another submodule
        self.tensors: list[Tensor] = []
        self.slots: dict[str, int] = {}  # which of the tensors belongs where
        numbers: dict[int, int] = {}
        for prefix, part in self.named_modules():  # each once, while a tensor may be in several
            for name, x in (part._parameters | part._buffers).items():
                if x is not None:
                    if id(x) not in numbers:
                        numbers[id(x)] = len(self.tensors)
                        self.tensors.append(x)
                    self.slots[f"{prefix}.{name}" if prefix else name] = numbers[id(x)]

    def forward(self, *args: Any) -> Any:
        return self.fn[0](*args)

    def call(self, tensors: Sequence[Tensor], args: tuple[Any, ...]) -> Any:
        """fn(*args) with these in the place of ``self.tensors``."""
        state = {name: tensors[number] for name, number in self.slots.items()}
        return torch.func.functional_call(self, state, args, tie_weights=False)


class Remembered:
    """``fn`` with the parameters and buffers that ``module`` has now, also once it has others.

    ``torch.func.functional_call`` exchanges them for the time of a call; what is evaluated again in backward must not
    fall back to the module's own.
    """

    def __init__(self, module: nn.Module, fn: Callable[..., Any]) -> None:
        self.stateless = Stateless(module, fn)
        self.late = False  # whether the layer has returned: before, nothing is exchanged back

    def __call__(self, *args: Any) -> Any:
        if not self.late:
            return self.stateless(*args)
        now = Stateless(self.stateless.module, self.stateless.fn[0])
        if all(a is b for a, b in zip(now.tensors, self.stateless.tensors, strict=False)):
            return self.stateless(*args)
        return self.stateless.call(self.stateless.tensors, args)


def is_exchanged(module: nn.Module) -> bool:
    """Whether parameters were exchanged for tensors, as ``torch.func.functional_call`` does."""
    return any(
        x is not None and not isinstance(x, nn.Parameter)
        for part in module.modules()
        for x in part._parameters.values()
    )


def fill_parametrization_cache(module: nn.Module) -> None:
    """Inside ``parametrize.cached()``: let the cache hold parametrized tensors with their graphs.

    The first one to use a tensor fills it, which would be a solve, without gradients.
    """
    if parametrize._cache_enabled:
        for part in module.modules():
            if parametrize.is_parametrized(part):
                for name in part.parametrizations:  # pyright: ignore
                    getattr(part, name)
