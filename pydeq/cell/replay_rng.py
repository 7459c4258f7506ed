"""Draw the same random numbers at every call of a map: a map that draws new ones at each call has no fixed point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode


def random_modules(module: nn.Module | None) -> list[str]:
    """Names of the submodules that draw a new mask at each call."""
    names = []
    for name, part in () if module is None else module.named_modules():
        dropout = getattr(part, "p", 0.0) if isinstance(part, _DropoutNd) else getattr(part, "dropout", 0.0)
        drawing = isinstance(part, _DropoutNd | nn.MultiheadAttention | nn.RNNBase) and dropout > 0
        if drawing or isinstance(part, nn.RReLU):
            names.append(name or type(part).__name__)
    return names


class RefuseDraws(TorchDispatchMode):
    """Context manager in which operations that draw random numbers raise an error; works while torch.export records.

    Raises:
        RuntimeError: If an operation draws random numbers.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs):
            raise RuntimeError(
                "this DEQ cannot be exported, since freeze_rng=True replays random numbers, and the cell draws some"
                f" ({func}): export without it, or put modules that draw in evaluation mode"
            )
        return func(*args, **kwargs)


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation with a seed draws: dropout and attention may have a rate of 0 or be in evaluation mode."""
    given = {entry.name: entry.default_value for entry in func._schema.arguments}
    given |= dict(zip(given, args, strict=False)) | kwargs
    rates = [given[name] for name in ("p", "dropout_p", "dropout") if name in given]
    modes = [given[name] for name in ("train", "training") if name in given]
    none = any(isinstance(rate, float | int) and rate == 0 for rate in rates)
    return not none and not any(mode is False for mode in modes)


class Replayed:
    """A map that draws the same random numbers in every call as in its first call.

    After any number of calls, the generators have the state that one call leaves.

    Args:
        fn: Draws from torch's own generators.
        device: The device that fn draws on, in addition to the CPU.
    """

    def __init__(self, fn: Callable[..., Any], device: torch.device) -> None:
        self.fn, self.device = fn, device
        # The generators' states before the first call; shared with the results of ``of``.
        self.states: list[tuple[Tensor, ...]] = []

    def of(self, fn: Callable[..., Any]) -> Replayed:
        """Make another map draw the same numbers."""
        other = Replayed(fn, self.device)
        other.states = self.states
        return other

    def __call__(self, *args: Any) -> Any:
        if not self.states:
            self.states.append(self._get())
            return self.fn(*args)
        after = self._get()
        self._set(self.states[0])
        try:
            return self.fn(*args)
        finally:
            self._set(after)

    def drew(self) -> bool:
        """Whether the first call drew random numbers. Use it directly after that call."""
        return any(not torch.equal(a, b) for a, b in zip(self.states[0], self._get(), strict=True))

    def _get(self) -> tuple[Tensor, ...]:
        if self.device.type == "cuda":
            return torch.get_rng_state(), torch.cuda.get_rng_state(self.device)
        return (torch.get_rng_state(),)

    def _set(self, state: tuple[Tensor, ...]) -> None:
        torch.set_rng_state(state[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state[1], self.device)
