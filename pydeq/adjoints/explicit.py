"""A map as a function of all that it is known to depend on, for evaluations long after the layer has returned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from pydeq.cell.parameters import Stateless


class Explicit:
    """fn(z, *context) as a function of z and of the tensors in the context and in a module.

    Args:
        fn: fn(z, *context) -> like z.
        context: May be nested; what is no tensor in it stays what it is.
        module: What holds tensors that fn uses; None where fn is no module.

    Attributes:
        tensors: Those of the context, then those of the module.
        given: How many belong to the context.
    """

    def __init__(self, fn: Callable[..., Any], context: Sequence[Any], module: nn.Module | None) -> None:
        leaves, self._tree = tree_flatten(tuple(context))
        self._places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._stateless = None if module is None else Stateless(module, fn)
        self._fn = fn
        self.given = len(self._places)
        self.tensors: list[Tensor] = [leaves[i] for i in self._places]
        self.learning: set[int] = set()  # numbers of buffers that an evaluation may write to
        if self._stateless is not None:
            self.tensors += self._stateless.tensors
            self.learning = {self.given + number for number in self._stateless.learning}

    def __call__(self, z: Any, tensors: Sequence[Tensor]) -> Any:
        """fn at z with these in the place of ``self.tensors``."""
        leaves = list(self._constants)
        for i, x in zip(self._places, tensors[: self.given], strict=True):
            leaves[i] = x
        arguments = (z, *tree_unflatten(leaves, self._tree))
        if self._stateless is None:
            return self._fn(*arguments)
        return self._stateless.call(tensors[self.given :], arguments)
