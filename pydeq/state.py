"""One flat (batch, state) view over a tensor or a tuple of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pydeq.ops.capture import exporting

State: TypeAlias = "Tensor | tuple[Tensor, ...]"

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Layout:
    """The shapes behind a flat state.

    Args:
        shapes: Shape of each part without the batch; one part unless ``is_tuple``.
        batch: B.
        dtype, device: Shared by all parts.
        is_tuple: Whether the state is a tuple; a tuple may have only one part.
    """

    shapes: tuple[torch.Size, ...]
    batch: int
    dtype: torch.dtype
    device: torch.device
    is_tuple: bool

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Entries of each part, per sample."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def size(self) -> int:
        """D, entries of state per sample."""
        return sum(self.sizes)

    @cached_property
    def is_flat(self) -> bool:
        """Whether a state is one tensor [B, D]."""
        return not self.is_tuple and len(self.shapes[0]) == 1

    @cached_property
    def _shape(self) -> torch.Size:
        """The shape of a state of one part, with the batch."""
        return torch.Size((self.batch, *self.shapes[0]))

    def with_batch(self, batch: int) -> Layout:
        return Layout(self.shapes, batch, self.dtype, self.device, self.is_tuple)

    def view(self, flat: Tensor) -> State:
        """Convert [B, D] to a state of views."""
        if not self.is_tuple:
            return flat.view(*self._shape)  # a shape passed as one argument takes twice as long
        parts = flat.split(self.sizes, dim=1)
        return tuple(part.view(self.batch, *shape) for part, shape in zip(parts, self.shapes, strict=True))

    def flatten(self, state: State) -> Tensor:
        """Convert a state to contiguous [B, D]; a view if possible."""
        if isinstance(state, Tensor):
            if state.is_contiguous():
                return state if state.dim() == 2 else state.view(self.batch, self.size)
            return state.reshape(self.batch, self.size).contiguous()
        if len(state) == 1:
            return state[0].reshape(self.batch, self.size).contiguous()
        return torch.cat([part.reshape(self.batch, n) for part, n in zip(state, self.sizes, strict=True)], dim=1)

    def check(self, state: Any, cast: bool, detach: bool = True) -> State:
        """Check that a result of ``fn`` is like the state that it got.

        Args:
            state: The result.
            cast: Cast a result of another floating dtype instead of raising; for autocast.
            detach: Remove the graph that a result may have even with gradients off.

        Raises:
            TypeError: If it is not a tensor, or not a tuple although the state is one.
            ValueError: If it has another shape, dtype or device.
        """
        if not self.is_tuple:
            usual = type(state) is Tensor and state.dtype is self.dtype and state.device == self.device
            if usual and state.shape == self._shape:
                return state.detach() if detach and state.requires_grad else state
            return self._check_part(state, self.shapes[0], "", cast, detach)
        if not isinstance(state, tuple | list):
            raise TypeError(f"fn must return a tuple of {len(self.shapes)} tensors like z0, got {type(state).__name__}")
        if len(state) != len(self.shapes):
            raise ValueError(f"fn must return a tuple of {len(self.shapes)} tensors like z0, got {len(state)}")
        return tuple(
            self._check_part(part, shape, f"[{i}]", cast, detach)
            for i, (part, shape) in enumerate(zip(state, self.shapes, strict=True))
        )

    def _check_part(self, part: Any, shape: torch.Size, index: str, cast: bool, detach: bool) -> Tensor:
        if not isinstance(part, Tensor):
            hint = ": for pairs (state, aux) pass has_aux=True" if isinstance(part, tuple) and len(part) == 2 else ""
            raise TypeError(f"fn must return a tensor like z0{index}, got {type(part).__name__}{hint}")
        if part.shape != (self.batch, *shape):
            expected, got = (self.batch, *shape), tuple(part.shape)
            hint = ""
            if got[1:] == expected:
                hint = f": if z0 lacks the batch dimension, which comes first, make it {got}"
            elif self.batch == 1 and got[1:] == tuple(shape):
                hint = f": if z0 is to have the batch of the context, make it {got}"
            raise ValueError(f"fn must return the shape of z0{index}, expected {expected}, got {got}{hint}")
        if part.device != self.device:
            raise ValueError(f"fn must return a tensor on the device of z0{index}, {self.device}, got {part.device}")
        if part.dtype != self.dtype:
            if not (cast and part.is_floating_point()):
                raise ValueError(
                    f"fn must return the dtype of z0{index}, {self.dtype}, got {part.dtype}: cast its result, or z0"
                )
            part = part.to(self.dtype)
        return part.detach() if detach and part.requires_grad else part


def layout_of(z0: Any, names: Sequence[str] = ()) -> Layout:
    """Validate an initial state and describe it.

    Args:
        names: The names of its parts in messages; by default z0[0], z0[1] and so on.

    Raises:
        TypeError: If z0 is neither a tensor nor a tuple of tensors, or has no values (meta tensors).
        ValueError: If it is an empty tuple, has no batch dimension, parts with different batch sizes, dtypes or
            devices, or a dtype that is not one of ``DTYPES``.
    """
    if type(z0) is Tensor and not z0.is_meta and z0.dtype in DTYPES and z0.dim():
        return _tensor_layout(z0.shape, z0.dtype, z0.device)
    if isinstance(z0, Tensor):
        parts: Sequence[Any] = (z0,)
    elif isinstance(z0, tuple):
        parts = z0
        if not parts:
            raise ValueError("z0 must have at least one tensor, got an empty tuple")
    else:
        raise TypeError(f"z0 must be a tensor or a tuple of tensors, got {type(z0).__name__}")
    for i, part in enumerate(parts):
        name = names[i] if names else f"z0[{i}]" if isinstance(z0, tuple) else "z0"
        if not isinstance(part, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(part).__name__}")
        if part.dim() == 0:
            raise ValueError(f"{name} must have a batch dimension, got a 0-d tensor: (B,) is B scalar states")
        if part.dtype not in DTYPES:
            expected = ", ".join(str(dtype) for dtype in DTYPES)
            raise ValueError(
                f"{name} must be of dtype {expected} or complex, got {part.dtype}: convert it, as by .float()"
            )
        for what, first, here in (
            ("batch size", parts[0].shape[0], part.shape[0]),
            ("dtype", parts[0].dtype, part.dtype),
            ("device", parts[0].device, part.device),
        ):
            if first != here:
                of = names[0] if names else "z0[0]"
                raise ValueError(f"{name} must have the {what} of {of}, {first}, got {here}")
        if (part.is_meta or isinstance(part, FakeTensor)) and not exporting():
            kind = "a FakeTensor" if isinstance(part, FakeTensor) else "a meta tensor"
            raise TypeError(
                f"{name} must have values, since they decide when a solve ends, got {kind}, which has none:"
                " to export a layer, see pydeq.export_mode"
            )
    return Layout(
        tuple(part.shape[1:] for part in parts),
        parts[0].shape[0],
        parts[0].dtype,
        parts[0].device,
        isinstance(z0, tuple),
    )


@lru_cache(maxsize=64)
def _tensor_layout(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Layout:
    """The layout of a state of one tensor; kept with all that it has computed, as many solves have the same."""
    return Layout((shape[1:],), shape[0], dtype, device, False)


def as_tuple(state: State) -> tuple[Tensor, ...]:
    """The parts of a state."""
    return (state,) if isinstance(state, Tensor) else tuple(state)
