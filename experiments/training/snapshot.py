"""All that a training carries from one step to the next, as tensors and numbers, and the way back.

What can be computed from the step is not here: the order of samples, learning rates, caps, which steps are penalized.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from experiments.training.checkpoint import CheckpointError
from experiments.training.distribution import copy_into, whole
from experiments.training.history import History
from experiments.training.seeds import Purpose, seed_of
from pydeq.ops.kernels import package_version

if TYPE_CHECKING:
    from experiments.training.trainer import Trainer

# What may be different when a training goes on: it does not change what is learned, or says how far.
FREE = ("epochs", "steps", "logging", "checkpoint", "evaluation", "device", "strategy", "data.root", "data.workers")


def entries(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters and buffers, each once, however many names it has."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def portable(tensor: Tensor) -> Tensor:
    """A whole copy on the CPU that shares no memory with others; all ranks must call."""
    return whole(tensor.detach()).to("cpu", copy=True).contiguous()


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What :func:`entries` are, to be saved; all ranks must call."""
    return {name: portable(tensor) for name, tensor in entries(model)}


def take(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and numbers of a training between two steps; all ranks must call, and rank 0's answer counts."""
    distribution = trainer.distribution
    tensors = {f"model.{name}": tensor for name, tensor in model_tensors(trainer.model).items()}
    for name, parameter in trainer.model.named_parameters():
        # In the same order on all ranks, which gather one after the other.
        for key, value in sorted(trainer.optimizer.state.get(parameter, {}).items()):
            if isinstance(value, Tensor):
                tensors[f"optimizer.{key}.{name}"] = portable(value)
    for key, value in trainer.task.state().items():
        tensors[f"task.{key}"] = portable(torch.cat(distribution.gather(value)))
    for key, value in _of_rank(trainer).items():
        for rank, part in enumerate(distribution.gather(value)):
            tensors[f"rank{rank}.{key}"] = portable(part)
    state = {
        "step": trainer.step,
        "seconds": trainer.seconds,
        "world": distribution.world,
        "config": trainer.config.mapping(),
        "data": trainer.fingerprint,
        "scaler": trainer.precision.state(),
        "history": trainer.history.mapping(),
        "versions": {"pydeq": package_version(), "torch": torch.__version__, "python": platform.python_version()},
    }
    return tensors, state


def restore(trainer: Trainer, tensors: dict[str, Tensor], state: dict[str, Any], notice: Callable[[str], None]) -> None:
    """Put a training where :func:`take` saw it.

    Args:
        trainer: Newly made.
        tensors, state: From a checkpoint.
        notice: Told of what will not be the same to the last bit.

    Raises:
        CheckpointError: If it does not hold what this training needs.
        ValueError: If it is of another configuration, or of other data.
    """
    check_configuration(state["config"], trainer.config.mapping(), notice)
    if state["data"] != trainer.fingerprint:
        raise ValueError(
            f"data {trainer.config.data.name!r} is not what the training began with: its files have changed, or are"
            " others"
        )
    for name, tensor in entries(trainer.model):
        copy_into(tensor, _found(tensors, f"model.{name}", tensor))
    for name, parameter in trainer.model.named_parameters():
        moments = {}
        for key in sorted({key.split(".")[1] for key in tensors if key.startswith("optimizer.")}):
            saved = tensors.get(f"optimizer.{key}.{name}")
            if saved is None:
                continue
            if saved.shape == parameter.shape and not (key == "step" and saved.dim() == 0):
                moments[key] = torch.zeros_like(parameter, dtype=saved.dtype)
                copy_into(moments[key], saved)
            else:
                moments[key] = saved.clone()  # Adam's count of steps is on the CPU
        if moments:
            trainer.optimizer.state[parameter] = moments
    task = {key.removeprefix("task."): value for key, value in tensors.items() if key.startswith("task.")}
    distribution = trainer.distribution
    if task:
        share = {key: value.tensor_split(distribution.world)[distribution.rank] for key, value in task.items()}
        trainer.task.load({key: value.to(distribution.device) for key, value in share.items()})
    trainer.step = state["step"]
    _restore_rank(trainer, tensors, state["world"], notice)
    trainer.precision.load(state["scaler"])
    trainer.history = History.of(state["history"])
    trainer.seconds_before = state["seconds"]


def check_configuration(saved: dict[str, Any], now: dict[str, Any], notice: Callable[[str], None]) -> None:
    """Refuse to go on with another training's checkpoint; say what else is different."""
    before, after = _flat(saved), _flat(now)
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        if not any(key == free or key.startswith(f"{free}.") for free in FREE):
            raise ValueError(
                f"{key} is {new!r}, and the training to be resumed has {old!r}: leave it, or start another in another"
                " folder"
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


def _of_rank(trainer: Trainer) -> dict[str, Tensor]:
    """What each rank has for itself, on the ranks' device."""
    device = trainer.distribution.device
    tensors = {
        "means": trainer.means.sums,
        "means_of_evaluation": trainer.means_of_evaluation.sums,
        "rng.cpu": torch.get_rng_state().to(device),
    }
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device).to(device)
    return tensors


def _restore_rank(trainer: Trainer, tensors: dict[str, Tensor], world: int, notice: Callable[[str], None]) -> None:
    rank, device = trainer.distribution.rank, trainer.distribution.device
    for name, means in (("means", trainer.means), ("means_of_evaluation", trainer.means_of_evaluation)):
        parts = [_found(tensors, f"rank{r}.{name}", means.sums) for r in range(world)]
        if world == trainer.distribution.world:
            means.sums = parts[rank].to(device)
        elif rank == 0:
            means.sums = torch.stack(parts).sum(0).to(device)
    if world != trainer.distribution.world:
        notice(f"the training had {world} processes and has {trainer.distribution.world} from here on")
        torch.manual_seed(seed_of(trainer.config.seed, Purpose.RANK, (trainer.step << 20) + rank))
        return
    torch.set_rng_state(tensors[f"rank{rank}.rng.cpu"])
    if device.type == "cuda":
        saved = tensors.get(f"rank{rank}.rng.cuda")
        if saved is None:
            notice("the training was on another device, whose random numbers are others")
        else:
            torch.cuda.set_rng_state(saved, device)


def _found(tensors: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    found = tensors.get(name)
    if found is None or found.shape != like.shape:
        got = "nothing" if found is None else tuple(found.shape)
        raise CheckpointError(f"the checkpoint must hold {name} of shape {tuple(like.shape)}, got {got}")
    return found
