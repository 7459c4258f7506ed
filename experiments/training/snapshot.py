"""The tensors of a model and its optimizer by flat names, and a check that a checkpoint fits a configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from experiments.training.checkpoint import CheckpointError
from experiments.training.distribution import copy_into, whole

# Fields that may change when a training is resumed: they do not change what is learned, or they set its length.
FREE = ("epochs", "steps", "logging", "checkpoint", "evaluation", "device", "strategy", "data.root", "data.workers")


def entries(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters and buffers, each once, even if it has several names."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def portable(tensor: Tensor) -> Tensor:
    """A whole copy on the CPU that shares no memory with other tensors; all ranks must call."""
    return whole(tensor.detach()).to("cpu", copy=True).contiguous()


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the :func:`entries` of a model; all ranks must call."""
    return {name: portable(tensor) for name, tensor in entries(model)}


def load_model_tensors(model: nn.Module, tensors: dict[str, Tensor], prefix: str) -> None:
    """Set a model's entries to the tensors whose names begin with ``prefix``.

    Raises:
        CheckpointError: If a tensor is missing, or has another shape.
    """
    for name, tensor in entries(model):
        copy_into(tensor, found(tensors, f"{prefix}{name}", tensor))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of the optimizer's state as <key>.<parameter>; all ranks must call."""
    tensors = {}
    for name, parameter in model.named_parameters():
        # In the same order on all ranks, which gather one tensor after the other.
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            if isinstance(value, Tensor):
                tensors[f"{key}.{name}"] = portable(value)
    return tensors


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str
) -> None:
    """Set the optimizer's state to the tensors whose names begin with ``prefix``."""
    keys = {name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)}
    for name, parameter in model.named_parameters():
        moments = {}
        for key in sorted(keys):
            saved = tensors.get(f"{prefix}{key}.{name}")
            if saved is None:
                continue
            if saved.shape == parameter.shape and not (key == "step" and saved.dim() == 0):
                moments[key] = torch.zeros_like(parameter, dtype=saved.dtype)
                copy_into(moments[key], saved)
            else:
                moments[key] = saved.clone()  # Adam counts its steps on the CPU
        if moments:
            optimizer.state[parameter] = moments


def found(tensors: dict[str, Tensor], name: str, like: Tensor | None = None) -> Tensor:
    """The tensor of a name.

    Raises:
        CheckpointError: If it is missing, or of another shape than ``like``.
    """
    tensor = tensors.get(name)
    if tensor is None or (like is not None and tensor.shape != like.shape):
        expected = "" if like is None else f" of shape {tuple(like.shape)}"
        got = "nothing" if tensor is None else tuple(tensor.shape)
        raise CheckpointError(f"the checkpoint must hold {name}{expected}, got {got}")
    return tensor


def check_configuration(saved: dict[str, Any], now: dict[str, Any], notice: Callable[[str], None]) -> None:
    """Raise for a checkpoint of another training; give a notice about allowed differences.

    Raises:
        ValueError: If the configurations differ in a field that is not :data:`FREE`.
    """
    before, after = _flat(saved), _flat(now)
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        if not any(key == free or key.startswith(f"{free}.") for free in FREE):
            raise ValueError(
                f"{key} is {new!r}, and the training to be resumed has {old!r}: keep it, or start a new training in"
                " another folder"
            )
        notice(f"{key} was {old!r} and is {new!r} from here on")


def _flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
