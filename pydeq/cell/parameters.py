"""A module's tensors, told apart from the module: for calls with substituted tensors, and for calls long after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize


class Stateless:
    """``fn``, which uses ``module``, as a function of the module's tensors.

    These are its parameters, its buffers, and what was put in their place: ``torch.func.functional_call`` exchanges
    them for the time of a call, a loop of meta-learning or forward-mode AD may set plain attributes.

    Attributes:
        tensors: What is in the module now, each once.
    """

    def __init__(self, module: nn.Module, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.tensors: list[Tensor] = []
        self.learning: set[int] = set()  # numbers of buffers that a call may write to
        self._slots: list[tuple[Any, str, int]] = []  # which of the tensors belongs where
        numbers: dict[int, int] = {}
        for part in module.modules():  # each once, while a tensor may be in several
            for holder in (part._parameters, part._buffers, part.__dict__):
                for name, x in holder.items():
                    if isinstance(x, Tensor):
                        number = numbers.setdefault(id(x), len(self.tensors))
                        if number == len(self.tensors):
                            self.tensors.append(x)
                        self._slots.append((holder, name, number))
                        if holder is part._buffers and part.training:
                            self.learning.add(number)

    def call(self, tensors: Sequence[Tensor], args: tuple[Any, ...]) -> Any:
        """fn(*args) with these in the place of ``self.tensors``."""
        before: list[tuple[Any, str, Tensor | None]] = []
        try:
            for holder, name, number in self._slots:
                found = holder.get(name) if isinstance(holder, dict) else holder[name]
                if found is not tensors[number]:
                    before.append((holder, name, found))
                    holder[name] = tensors[number]
            return self.fn(*args)
        finally:
            for holder, name, found in before:
                holder[name] = found


def fill_parametrization_cache(module: nn.Module) -> None:
    """Inside ``parametrize.cached()``: let the cache hold parametrized tensors with their graphs.

    The first one to use a tensor fills it, which would be a solve, without gradients.
    """
    if parametrize._cache_enabled:
        for part in module.modules():
            if parametrize.is_parametrized(part):
                for name in part.parametrizations:  # pyright: ignore
                    getattr(part, name)
