"""Wrappers that turn a user's map into a function of one tensor and a damping, for solvers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pydeq.compat.processes import flatten


class DEQWrapper:
    """A map of one tensor.

    Args:
        func: func(z) -> like z.
        z_init: A state, for its shapes.
    """

    def __init__(self, func: Callable[..., Any], z_init: Any = None) -> None:
        self.func = func

    def list2vec(self, z: Any) -> Any:
        """Convert a state from the user's format to the solver's."""
        return z

    def vec2list(self, z: Any) -> Any:
        """Convert a state from the solver's format to the user's."""
        return z

    def detach(self, z: Any) -> Any:
        """The state without its graph."""
        return z.detach()

    def __call__(self, z: Any, tau: float = 1.0) -> Any:
        """(1 - tau) z + tau func(z)."""
        image = self.func(z)
        return image if tau == 1.0 else tau * image + (1 - tau) * z

    def norm_diff(self, z_new: Any, z_old: Any, **kwargs: Any) -> Any:
        """The sum of |z_new - z_old|."""
        return (z_new - z_old).norm(p=1)


class MDEQWrapper(DEQWrapper):
    """A map of several tensors as a map of one, (B, all entries); func(*tensors) -> as many tensors."""

    def __init__(self, func: Callable[..., Any], z_init: Sequence[Tensor]) -> None:
        super().__init__(func)
        self.z_shape = [z.shape for z in z_init]
        self.sizes = [flatten(z).shape[1] for z in z_init]

    def list2vec(self, z: Sequence[Tensor]) -> Tensor:
        return torch.cat([flatten(part) for part in z], dim=1)

    def vec2list(self, z: Tensor) -> list[Tensor]:
        return [part.reshape(shape) for part, shape in zip(z.split(self.sizes, dim=1), self.z_shape, strict=True)]

    def __call__(self, z: Tensor, tau: float = 1.0) -> Tensor:
        image = self.list2vec(self.func(*self.vec2list(z)))
        return image if tau == 1.0 else tau * image + (1 - tau) * z

    def norm_diff(self, z_new: Tensor, z_old: Tensor, show_list: bool = False, **kwargs: Any) -> Any:
        parts = [part.norm(p=1).item() for part in self.vec2list(z_new - z_old)]
        return parts if show_list else sum(parts)


class SpeedyMDEQWrapper(DEQWrapper):
    """A map of several tensors, for a solver that measures nothing and so does not need a single tensor."""

    def detach(self, z: Sequence[Tensor]) -> list[Tensor]:
        return [part.detach() for part in z]

    def __call__(self, z: Sequence[Tensor], tau: float = 1.0) -> Any:
        image = self.func(*z)
        if tau == 1.0:
            return image
        return [tau * new + (1 - tau) * old for new, old in zip(image, z, strict=True)]

    def norm_diff(
        self, z_new: Sequence[Tensor], z_old: Sequence[Tensor], show_list: bool = False, **kwargs: Any
    ) -> Any:
        parts = [(new - old).norm(p=1).item() for new, old in zip(z_new, z_old, strict=True)]
        return parts if show_list else sum(parts)


def deq_decorator(func: Callable[..., Any], z_init: Any = None, no_stat: bool = True) -> tuple[DEQWrapper, Any]:
    """Wrap the map and the initial state for solvers.

    Args:
        func: func(z) for a tensor, func(*tensors) for a tuple or list of them.
        z_init: The initial state.
        no_stat: Keep several tensors separate, since the solver measures nothing.
    """
    if isinstance(z_init, Tensor):
        return DEQWrapper(func, z_init), z_init
    if not isinstance(z_init, tuple | list) or not z_init:
        raise AssertionError(f"z_init must be a tensor or a tuple of tensors, got {z_init!r}")
    if no_stat:
        return SpeedyMDEQWrapper(func, z_init), z_init
    wrapper = MDEQWrapper(func, z_init)
    return wrapper, wrapper.list2vec(z_init)
