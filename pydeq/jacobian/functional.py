"""Products with the Jacobian by torch.func: in forward mode, and inside transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _autograd  # pyright: ignore
from torch.overrides import TorchFunctionMode

from pydeq.cell.linearization import vectorize
from pydeq.cell.plain_operations import RefuseNorms, any_order
from pydeq.jacobian.graphs import is_once_differentiable
from pydeq.state import State, as_tuple, layout_of


class FunctionalLinearization:
    """The products of :class:`pydeq.cell.linearization.Linearization`, but each call evaluates fn.

    J v is computed in forward mode. Norms and attention are evaluated in plain operations, so that their higher
    derivatives are correct (:mod:`pydeq.cell.plain_operations`). It also works in a function that ``torch.func.grad``
    or ``vmap`` transforms, where autograd's own graph cannot be used. There is always a graph to the tensors that fn
    captures.

    Args:
        fn: fn(z, *context) -> like z.
        z: The point at which J is taken, a constant.
        context: Passed on to fn.
    """

    def __init__(self, fn: Callable[..., Any], z: State, context: Sequence[Any]) -> None:
        self.layout = layout_of(z)
        # A dual number needs its own memory for every entry; an expanded state shares it.
        self._point = tuple(part.detach().contiguous() for part in as_tuple(z))
        self._fn, self._context = fn, context
        self._cast = torch.is_autocast_enabled(self.layout.device.type)

    def flat_vjps(self, v: Tensor, create_graph: bool = False) -> Tensor:
        """v_k^T J for v [K, B, D], as [K, B, D]."""
        what, instead = "the gradient of a penalty by products eps^T J", "use mode='difference', which needs first ones"
        with RefuseOnce(what, instead) if create_graph else nullcontext():
            pull = torch.func.vjp(self._image, *self._point)[1]
        return self._map(lambda v: self._flat(pull(as_tuple(self.layout.view(v)))), v)

    def flat_jvps(self, v: Tensor, create_graph: bool = False) -> Tensor:
        """J v_k for v [K, B, D], as [K, B, D]."""

        def tangent(v: Tensor) -> Tensor:
            return self._flat(torch.func.jvp(self._image, self._point, as_tuple(self.layout.view(v)))[1])

        def product(v: Tensor) -> Tensor:
            if not create_graph:
                return tangent(v)
            with RefuseNorms(), _RefuseCheckpoints():
                return tangent(v)

        return self._map(product, v)

    def _image(self, *parts: Tensor) -> tuple[Tensor, ...]:
        with any_order():
            y = self._fn(parts if self.layout.is_tuple else parts[0], *self._context)
        return as_tuple(self.layout.check(y, self._cast, detach=False))

    def _flat(self, parts: Sequence[Tensor]) -> Tensor:
        flat = [part.reshape(self.layout.batch, n) for part, n in zip(parts, self.layout.sizes, strict=True)]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)

    @staticmethod
    def _map(product: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        # fn draws the same masks for all products.
        return vectorize(lambda v: torch.func.vmap(product, randomness="same")(v), product, v)


class _RefuseCheckpoints(TorchFunctionMode):
    """Raise if fn uses ``torch.utils.checkpoint``: its second evaluation, in backward, is not in forward mode.

    Raises:
        RuntimeError: If fn uses a checkpoint.
    """

    def __init__(self) -> None:
        super().__init__()
        self._outside = _autograd._top_saved_tensors_default_hooks(True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        hooks = _autograd._top_saved_tensors_default_hooks(True)
        if hooks and hooks != self._outside and hooks[0].__module__ == "torch.utils.checkpoint":
            raise RuntimeError("saved tensor hooks of torch.utils.checkpoint")
        return func(*args, **(kwargs or {}))


class RefuseOnce(TorchFunctionMode):
    """Raise if fn calls a function that is once_differentiable: torch.func silently drops its second-order terms.

    Args:
        second: The derivative that is a second derivative of fn, for the message.
        instead: The advice, for the message.

    Raises:
        RuntimeError: If such a function is called under a transform.
    """

    def __init__(self, second: str, instead: str) -> None:
        super().__init__()
        self._second, self._instead = second, instead

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", None) == "custom_function_call" and is_once_differentiable(args[0]):
            raise RuntimeError(
                f"{self._second} is a second derivative of fn, and the backward pass of {args[0].__name__} is marked"
                f" with once_differentiable: {self._instead}"
            )
        return func(*args, **(kwargs or {}))
