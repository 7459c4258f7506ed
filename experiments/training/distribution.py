"""The processes that train together: their ranks, their exchanges, and the distribution of a model over them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from experiments.training.batch_norm import share_batch_norm


class Distribution:
    """One process, or one of several.

    Several processes are started by torchrun, which gives the ranks in environment variables, or are in an existing
    process group.

    Args:
        strategy: none, ddp or fsdp2.
        device: cpu, cuda or auto.

    Raises:
        ValueError: If there are several processes but no strategy, or the device is not available.
    """

    def __init__(self, strategy: str, device: str) -> None:
        self.strategy = strategy
        self.owner = False  # whether this object has to end the process group
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        initialized = dist.is_available() and dist.is_initialized()
        cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
        if cuda and not torch.cuda.is_available():
            raise ValueError("device must be cpu or auto: torch has no CUDA here, got 'cuda'")
        if strategy == "none":
            if launched > 1:
                raise ValueError(f"strategy must be ddp or fsdp2 for {launched} processes, got 'none'")
            self.rank, self.world = 0, 1
        else:
            if not dist.is_available():
                raise ValueError(f"strategy must be none: torch has no distributed package here, got {strategy!r}")
            if not initialized:
                if "RANK" not in os.environ:
                    raise ValueError(
                        f"strategy {strategy!r} needs torchrun: torchrun --nproc-per-node N -m experiments train"
                    )
                dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
                self.owner = True
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        index = int(os.environ.get("LOCAL_RANK", "0")) if self.world > 1 else torch.cuda.current_device() if cuda else 0
        self.device = torch.device("cuda", index) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)

    @property
    def main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wrap a model for training on all ranks; the wrapper shares its parameters."""
        if self.strategy == "none":
            return model
        if self.world > 1:
            share_batch_norm(model, self.device)
        if self.strategy == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            return DistributedDataParallel(model)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.world,))
        # The model is one unit, gathered once per step. If the cell were a separate unit, each evaluation of a solve
        # would gather it, and all ranks would have to evaluate it equally often.
        empty = {parameter for parameter in model.parameters() if not parameter.numel()}  # nothing to shard
        fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=empty)
        return model

    @contextmanager
    def accumulating(self, wrapped: nn.Module, last: bool) -> Iterator[None]:
        """Context manager around one part of a step: gradients are exchanged only after the last part."""
        if self.strategy == "ddp" and not last:
            with wrapped.no_sync():  # pyright: ignore[reportCallIssue]
                yield
            return
        if self.strategy == "fsdp2":
            wrapped.set_requires_gradient_sync(last)  # pyright: ignore[reportCallIssue]
        yield

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in their order; each rank gets the result."""
        if self.world == 1:
            return tensor
        return torch.stack(self.gather(tensor)).sum(0)

    def max(self, tensor: Tensor) -> Tensor:
        """Maximum over the ranks; each rank gets the result."""
        return tensor if self.world == 1 else torch.stack(self.gather(tensor)).amax(0)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Gather the ranks' tensors, all of one shape, in the order of the ranks."""
        if self.world == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous())
        return parts

    def broadcast(self, value: Any) -> Any:
        """Send rank 0's value, which must be picklable, to all ranks."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def close(self) -> None:
        """End the process group if this object started it."""
        if self.owner:
            dist.destroy_process_group()
            self.owner = False


def whole(tensor: Tensor) -> Tensor:
    """Return all entries of a tensor that may be sharded over the ranks; all ranks must call."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def local(tensor: Tensor) -> Tensor:
    """Return this rank's entries of a tensor that may be sharded over the ranks."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def copy_into(target: Tensor, entries: Tensor) -> None:
    """Set a tensor that may be sharded over the ranks; ``entries`` is complete on each rank."""
    with torch.no_grad():
        if hasattr(target, "full_tensor"):
            from torch.distributed.tensor import DTensor, distribute_tensor

            assert isinstance(target, DTensor)
            local = distribute_tensor(
                entries.to(target.device), target.device_mesh, target.placements, src_data_rank=None
            )
            target.to_local().copy_(local.to_local())
        else:
            target.copy_(entries)
