"""Keep running statistics and power iterations unchanged while a penalty evaluates fn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


class KeptStatistics:
    """Context manager in which evaluations of ``fn`` do not change running statistics of batch and instance norms.

    The power methods of spectral norms, torch's and pydeq's, take no steps in it, so their weights do not change.

    It finds a module only if fn is the module or its method, or if fn holds it, closes over it or names it.

    Args:
        fn: The function that is evaluated.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        parts = {part for module in modules_of(fn) for part in module.modules() if part.training}
        norms = [part for part in parts if isinstance(part, _NormBase) and part.track_running_stats]
        self.iterating = [part for part in parts if _iterates(part)]
        self.buffers = list({id(x): x for norm in norms for x in norm.buffers(recurse=False)}.values())

    def __enter__(self) -> None:
        self.values = [x.detach().clone() for x in self.buffers]
        for part in self.iterating:
            part.training = False

    @torch.no_grad()
    def __exit__(self, *exception: object) -> None:
        for buffer, value in zip(self.buffers, self.values, strict=True):
            buffer.data.copy_(
                value
            )  # .data keeps the version: backward does not read these tensors, but a new version would be an error
        for part in self.iterating:
            part.training = True


def _iterates(module: nn.Module) -> bool:
    """Whether a training call of this module itself takes a step of a power method; its submodules do not count."""
    return any(hasattr(x, "n_power_iterations") for x in (module, *module._forward_pre_hooks.values()))


def modules_of(fn: Callable[..., Any]) -> list[nn.Module]:
    """Find the modules in a callable, each once."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    waiting: list[tuple[Any, int]] = [(fn, 0)]
    while waiting:
        thing, depth = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            found[id(thing)] = thing
        elif callable(thing) and not isinstance(thing, type) and depth < 6:
            waiting.extend((part, depth + 1) for part in _held(thing))
    return list(found.values())


def _held(thing: Any) -> Iterator[Any]:
    if (owner := getattr(thing, "__self__", None)) is not None:
        yield owner
    if isinstance(thing, functools.partial):
        yield from (thing.func, *thing.args, *thing.keywords.values())
    for cell in getattr(thing, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # the closure's cell is not filled yet
            continue
    code = getattr(thing, "__code__", None)
    names = getattr(thing, "__globals__", {})
    yield from (names[name] for name in getattr(code, "co_names", ()) if isinstance(names.get(name), nn.Module))
    yield from getattr(thing, "__dict__", {}).values()
