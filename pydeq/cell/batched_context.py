"""Check which arguments of a cell carry the batch, for solves that evaluate only some of the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from pydeq.cell.adapter import Adapter
from pydeq.cell.scope import Scoped
from pydeq.state import layout_of


def check_compact(
    fn: Callable[..., Any],
    context: Sequence[Any],
    batched_context: Sequence[bool] | None,
    adapter: Adapter,
    freeze: bool,
) -> Sequence[bool]:
    """Check a call with ``compact=True``; return for each entry of the context whether it carries the batch."""
    layout = layout_of(adapter.z0)
    if not freeze:
        raise ValueError("compact=True leaves out samples that are done, but freeze=False continues them")
    if batched_context is None:
        if context:
            raise ValueError(
                f"batched_context must say for each of the {len(context)} context arguments whether it carries the"
                " batch, got None"
            )
        batched_context = ()
    if len(batched_context) != len(context):
        raise ValueError(
            f"batched_context must have one entry for each of the {len(context)} context arguments, got"
            f" {len(batched_context)}"
        )
    for i, (entry, batched) in enumerate(zip(context, batched_context, strict=True)):
        if not batched:
            continue
        for tensor in _tensors(entry, f"context[{i}]"):
            if tensor.dim() == 0 or tensor.shape[0] != layout.batch:
                raise ValueError(
                    f"context[{i}] must carry the batch of {layout.batch} first, got shape {tuple(tensor.shape)}"
                )
    cell = getattr(fn, "__self__", fn)  # fn may be a module's bound method
    if isinstance(cell, torch.nn.Module):
        for name, module in cell.named_modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.training:
                raise ValueError(
                    f"compact=True changes the batch that {name or 'fn'} ({type(module).__name__} in training mode)"
                    " computes its statistics from: use eval mode, another norm, or compact=False"
                )
            if isinstance(module, Scoped) and module.has_row_per_sample():
                raise ValueError(
                    f"compact=True changes the batch that {name or 'fn'} ({type(module).__name__} in training mode)"
                    " drew its mask for: use eval mode, or compact=False"
                )
    for name, entry in adapter.keywords.items():
        if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(entry)):
            raise ValueError(
                f"compact=True cannot tell whether {name} carries the batch, since it is passed by name: pass it by its"
                " place, and say so in batched_context"
            )
    return (*batched_context, False) if adapter.keywords else tuple(batched_context)


def _tensors(entry: Any, name: str) -> Iterator[torch.Tensor]:
    """The tensors of a batched context argument, a tensor or a (nested) tuple or list of them."""
    if isinstance(entry, torch.Tensor):
        yield entry
    elif isinstance(entry, tuple | list):
        for part in entry:
            yield from _tensors(part, name)
    else:
        raise TypeError(f"{name} is batched, so it must be a tensor or a tuple, got {type(entry).__name__}")
