"""Registration of an operation: schema, reference and fake kernel from Python, compiled kernels on top.

The reference serves every device without a compiled kernel (CompositeExplicitAutograd). The bindings in ``csrc/cpu``
and ``csrc/cuda`` override it for their device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pydeq.ops.reduction import Reduction

_library = torch.library.Library("pydeq", "DEF")
schemas: list[str] = []
"""The schemas of all operations, which the compiled libraries must have been built for."""


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register one operation and return its callable overload.

    Args:
        schema: ``name(args) -> returns``, without defaults.
        reference: The definition of the operation, in plain torch.
        fake: Output shapes and dtypes, for torch.compile.
    """
    name = schema.split("(", 1)[0]
    schemas.append(schema)
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    _library.impl(name, without_autocast(reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"pydeq::{name}", fake, lib=_library)
    return getattr(torch.ops.pydeq, name).default


def without_autocast(reference: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``reference`` with autocast off: autocast would round its products, and steps may run under autocast."""

    @functools.wraps(reference)
    def exact(first: Tensor, *others: Any, **options: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return reference(first, *others, **options)

    return exact


def reducing(reference: Callable[..., Any], reduction: Reduction) -> Callable[..., Any]:
    """Return the reference with sums over a state completed by ``reduction``."""
    return functools.partial(without_autocast(reference), reduction=reduction)


def returns_nothing(*args: Any) -> None:
    """The fake kernel of an operation that only mutates its workspace."""


def refuse_gradients(name: str, *tensors: Tensor) -> None:
    """Raise if autograd would have to differentiate through a solver's step.

    Raises:
        RuntimeError: If gradients are on and an input requires grad.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{name} is not differentiable, but an input requires grad: differentiate a solve with pydeq.DEQ, or call"
            f" it under torch.no_grad()"
        )
