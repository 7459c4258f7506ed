"""Solve on several ranks at once: agree on when to stop, and reduce over states that are sharded over the ranks.

A cell that communicates must be called equally often on every rank, or the ranks wait for each other forever. So the
ranks of a process group agree after each evaluation, by one all-reduce of a few integers, on whether any rank has a
running sample. A rank that is done keeps calling fn on its frozen states until no rank has one.
"""

from __future__ import annotations

import contextlib
import zlib
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pydeq.ops.reduction import WHOLE, Reduction

# How long a rank that failed waits for the other ranks to receive its message before it raises.
GRACE = timedelta(seconds=10)


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes that solve together.

    Args:
        process_group: Each rank calls with its own samples or, if ``sharded``, its own entries of the same samples.
        sharded: Whether each rank holds a shard of every sample.
    """

    process_group: dist.ProcessGroup
    sharded: bool

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # copies of a layer in this process solve with the same ranks

    def __reduce__(self) -> Any:
        raise TypeError("a process group cannot be pickled: save the state_dict, and make the layer again")

    def serves(self, device: torch.device) -> bool:
        """Whether the group has collectives for tensors on this device."""
        return f"{device.type}:" in dist.get_backend_config(self.process_group)  # like cpu:gloo,cuda:nccl

    def reduction(self) -> Reduction:
        """The reduction that completes sums over the entries of a state."""
        return _RankReduction(self) if self.sharded else WHOLE


def check_ranks(process_group: Any, sharded: Any) -> Ranks | None:
    """Check the arguments, and return the ranks that solve together; None where each rank solves by itself.

    Raises:
        TypeError, ValueError: If an argument is of the wrong type, there is no such group, or this rank is not in it.
    """
    if not isinstance(sharded, bool):
        raise TypeError(f"sharded must be a bool, got {type(sharded).__name__}")
    if process_group is None:
        if sharded:
            raise ValueError(
                "sharded=True needs process_group, the ranks that the states are sharded over, got None"
                " (torch.distributed.group.WORLD is None before init_process_group)"
            )
        return None
    if dist.is_available():
        if process_group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("process_group must have this rank in it: on other ranks, leave it out")
        if isinstance(process_group, dist.ProcessGroup):
            try:
                dist.get_rank(process_group)
            except ValueError:
                raise ValueError("process_group must be initialized, got one that was destroyed") from None
            return Ranks(process_group, sharded)
    advice = ", pass mesh.get_group()" if type(process_group).__name__ == "DeviceMesh" else ""
    raise TypeError(
        f"process_group must be a torch.distributed.ProcessGroup, got {type(process_group).__name__}{advice}"
    )


class Agreement:
    """The agreement of one solve with other ranks. This class is for a solve on a single rank."""

    def __enter__(self) -> Agreement:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return None

    def running(self, count: int) -> int:
        """The largest number of running samples on any rank, 0 once all are done; ``count`` is this rank's number."""
        return count

    def evaluated(self) -> None:
        """Wait until all ranks have evaluated fn."""


ALONE = Agreement()


class RankAgreement(Agreement):
    """The agreement of one solve on one rank with the other ranks.

    Used in a with statement, which tells the other ranks about an exception: they raise at their next agreement.

    Args:
        ranks: The ranks that agree.
        device: Device of the states.
        max_steps: Must be the same on all ranks.
        settings: Must be the same on all ranks where states are sharded.
    """

    def __init__(self, ranks: Ranks, device: torch.device, max_steps: int, settings: object) -> None:
        self.ranks = ranks
        cpu = torch.device("cpu")  # the counts are on the CPU, if the group can send from it
        self.device = cpu if ranks.serves(cpu) else device
        self.max_steps = max_steps
        self.settings = settings if ranks.sharded else None
        self.digest = zlib.crc32(repr((ranks.sharded, self.settings)).encode())
        self.open = True  # whether other ranks wait for this rank's next message

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not (self.open and isinstance(error, Exception)):
            return
        self.open = False
        # Other ranks may be inside a collective of fn and never answer: the error must not wait long for them.
        with contextlib.suppress(Exception):
            work = dist.all_reduce(
                self._message(0, failed=True), dist.ReduceOp.MAX, self.ranks.process_group, async_op=True
            )
            if work is not None:
                work.wait(GRACE)

    def running(self, count: int) -> int:
        if not self.ranks.sharded:
            count = self._agree(count)
        # With sharded states, all ranks have counted the same samples.
        self.open = count > 0
        return count

    def evaluated(self) -> None:
        if self.ranks.sharded:
            self._agree(1)

    def _message(self, count: int, failed: bool = False) -> Tensor:
        """Integers for an all-reduce by maximum: the maxima of x and of -x give the largest and the smallest x."""
        failure = dist.get_rank() + 1 if failed else 0
        numbers = (failure, count, self.max_steps, -self.max_steps, self.digest, -self.digest)
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)

    def _agree(self, count: int) -> int:
        self.open, message = False, self._message(count)
        dist.all_reduce(message, dist.ReduceOp.MAX, self.ranks.process_group)
        failure, count, most, least, digest, other = message.tolist()
        least, other = -least, -other
        if failure:
            raise RuntimeError(f"the solve failed on rank {failure - 1}, see the error there; this rank stops, too")
        if most != least:
            raise ValueError(
                f"max_steps must be the same on all ranks of process_group, got {least} to {most},"
                f" {self.max_steps} here"
            )
        if digest != other:
            raise ValueError(
                "sharded must be the same on all ranks of process_group, and if so also the batch size, solver, rtol,"
                f" atol, dtype, freeze and stall; here sharded is {self.ranks.sharded}, the others {self.settings}"
            )
        self.open = True
        return count


class _RankReduction(Reduction):
    """Sums over the ranks, in the order of the ranks: the same bits on every rank, and in every run."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def sum(self, partial: Tensor) -> Tensor:
        total, *others = self._gather(partial)
        for other in others:
            total = total + other
        return total

    def max(self, partial: Tensor) -> Tensor:
        return torch.stack(self._gather(partial)).amax(0)

    def _gather(self, partial: Tensor) -> list[Tensor]:
        group = self.ranks.process_group
        here = partial.contiguous() if self.ranks.serves(partial.device) else partial.cpu()
        parts = [torch.empty_like(here) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, here, group)
        return [part.to(partial.device) for part in parts]
