"""A map as a function of all tensors that it is known to depend on, for evaluations after the layer has returned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pydeq.cell.parameters import Stateless


class Explicit:
    """fn(z, *context) as a function of z and of the tensors in the context and in a module.

    Args:
        fn: fn(z, *context) -> like z.
        context: May be nested. Entries that are not tensors are constants.
        modules: The modules whose tensors fn uses.

    Attributes:
        tensors: The tensors of the context, then those of the modules.
        given: The number of tensors in the context.
        lasting: The tensors that must be unchanged when fn is evaluated again.
        learning: Indices in ``tensors`` of the buffers that an evaluation may write to.
    """

    def __init__(self, fn: Callable[..., Any], context: Sequence[Any], modules: Sequence[nn.Module] = ()) -> None:
        leaves: Sequence[Any] = context
        self._tree: TreeSpec | None = None
        if not all(type(x) is Tensor for x in context):
            leaves, self._tree = tree_flatten(tuple(context))
        self._places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._stateless = Stateless(modules, fn)
        self.given = len(self._places)
        self.tensors: list[Tensor] = [*(leaves[i] for i in self._places), *self._stateless.tensors]
        self.lasting: list[Tensor] = [*self.tensors[: self.given], *self._stateless.lasting]
        self.learning = {self.given + number for number in self._stateless.learning}

    def __call__(self, z: Any, tensors: Sequence[Tensor]) -> Any:
        """Evaluate fn at z with these tensors instead of ``self.tensors``."""
        leaves = list(self._constants)
        for i, x in zip(self._places, tensors[: self.given], strict=True):
            leaves[i] = x
        context = leaves if self._tree is None else tree_unflatten(leaves, self._tree)
        return self._stateless.call(tensors[self.given :], (z, *context))
