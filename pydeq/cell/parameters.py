"""Call a module with substituted or remembered parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from pydeq.cell.scope import Scoped

# Attributes that every module has; none of them is a tensor.
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


class Stateless:
    """A function that uses modules, as a function of their tensors.

    The tensors are parameters, buffers, and tensors that replace them: ``torch.func.functional_call`` replaces them
    during a call, and meta-learning or forward-mode AD may set plain attributes.

    Args:
        modules: A module and all modules in it, each once; empty if fn uses no module.
        fn: Any function.

    Attributes:
        tensors: The tensors that the modules have now, each once.
        learning: Indices in ``tensors`` of the buffers that a call may write to.
        lasting: Parameters and buffers that must not change before a call is repeated. Modules that keep their values
            in the scope of a solve have none, so their tensors may change.
    """

    def __init__(self, modules: Sequence[nn.Module], fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.tensors: list[Tensor] = []
        self.learning: set[int] = set()
        self.lasting: list[Tensor] = []
        self._slots: list[tuple[Any, str, int]] = []  # module, attribute, and index of its tensor
        numbers: dict[int, int] = {}
        for part in modules:  # a tensor may be in several
            attributes = part.__dict__
            lasts = not isinstance(part, Scoped)
            for holder in (part._parameters, part._buffers, attributes):
                for name, x in holder.items():
                    if name not in _OF_EVERY_MODULE and isinstance(x, Tensor):  # isinstance takes longer
                        number = numbers.setdefault(id(x), len(self.tensors))
                        if number == len(self.tensors):
                            self.tensors.append(x)
                        self._slots.append((holder, name, number))
                        if lasts and holder is not attributes:
                            self.lasting.append(x)
                        if holder is part._buffers and part.training:
                            self.learning.add(number)

    def call(self, tensors: Sequence[Tensor], args: tuple[Any, ...]) -> Any:
        """Call fn(*args) with these tensors instead of ``self.tensors``."""
        if not self._slots:
            return self.fn(*args)
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

    The first use of a tensor fills the cache. In a solve that first use would be without gradients.
    """
    if parametrize._cache_enabled:
        for part in module.modules():
            if parametrize.is_parametrized(part):
                for name in part.parametrizations:  # pyright: ignore
                    getattr(part, name)
