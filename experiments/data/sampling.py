"""Shuffled batches that can be repeated, resumed, and divided among ranks.

The order of an epoch is a function of only (seed, epoch, n), the same on every machine and for every version of torch
and numpy: samples are sorted by words of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014). A batch is cut from that
order before it is divided, so that step i sees the same samples for any number of ranks.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Batches(Sequence[Tensor]):
    """The batches of one epoch; see :func:`batches`. Entry i is this rank's part of batch i, int64 indices."""

    n: int
    batch: int
    seed: int = 0
    epoch: int = 0
    rank: int = 0
    world: int = 1
    start: int = 0
    shuffle: bool = True
    drop_last: bool = False
    order: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        least = {"n": 0, "batch": 1, "seed": 0, "epoch": 0, "rank": 0, "world": 1, "start": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, operator.index(value))
            except TypeError:
                raise TypeError(f"{name} must be a whole number, got {value!r}") from None
            if value < bound:
                raise ValueError(f"{name} must be at least {bound}, got {value}")
            if value >= 2**63:
                raise ValueError(f"{name} must be below 2**63, got {value}")
        if self.rank >= self.world:
            raise ValueError(f"rank must be in [0, {self.world}), the world, got {self.rank}")
        if self.batch < self.world:
            raise ValueError(f"batch must be at least world, {self.world}, a sample for each rank, got {self.batch}")
        if self.start > self.total:
            raise ValueError(f"start must be at most {self.total}, the batches of an epoch, got {self.start}")
        order = permutation(self.n, self.seed, self.epoch) if self.shuffle else torch.arange(self.n, device="cpu")
        object.__setattr__(self, "order", order)

    @property
    def total(self) -> int:
        """Number of batches of the whole epoch, including those before ``start``."""
        return self.n // self.batch if self.drop_last else -(-self.n // self.batch)

    def __len__(self) -> int:
        return self.total - self.start

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        begin = (self.start + index % len(self)) * self.batch
        whole = self.order[begin : begin + self.batch]
        # Parts differ by at most one sample.
        return whole[len(whole) * self.rank // self.world : len(whole) * (self.rank + 1) // self.world]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))


def batches(
    n: int,
    batch: int,
    seed: int = 0,
    epoch: int = 0,
    rank: int = 0,
    world: int = 1,
    *,
    start: int = 0,
    shuffle: bool = True,
    drop_last: bool = False,
) -> Batches:
    """Make the batches of one epoch, as indices of samples.

    To resume, pass the ``epoch``, and as ``start`` the number of its batches that are done.

    Args:
        n: Number of samples.
        batch: Samples of a batch, over all ranks.
        seed, epoch: The order depends on these and on n only.
        rank, world: This rank's number, and the number of ranks. Parts of a batch differ by at most one sample; if the
            last batch is smaller than world, some of its parts are empty.
        start: Number of batches to leave out at the beginning.
        shuffle: Whether the order is random; otherwise it is 0, 1, 2, ...
        drop_last: Whether to leave out a smaller last batch.

    Returns:
        A sequence of int64 tensors, of the same length on all ranks. Concatenated over the ranks, entry i is batch i.

    Raises:
        TypeError: If a number is not whole.
        ValueError: If a number is out of range.
    """
    return Batches(n, batch, seed, epoch, rank, world, start, shuffle, drop_last)


def permutation(n: int, seed: int, epoch: int) -> Tensor:
    """Compute a random order of 0, ..., n - 1, int64, a function of only the arguments."""
    words = _words(seed, epoch, np.arange(n, dtype=np.uint64))
    return torch.from_numpy(np.argsort(words, kind="stable").astype(np.int64, copy=False))


def sample_seed(seed: int, epoch: int, sample: int) -> int:
    """Compute a seed for the random numbers of one sample in one epoch, in [0, 2**63)."""
    # The epoch's order does not use these bits.
    return int(_mix(~_words(seed, epoch, np.array([sample], np.uint64)))[0] >> np.uint64(1))


def _words(seed: int, epoch: int, samples: np.ndarray) -> np.ndarray:
    """Compute a random word for each sample, uint64."""
    key = _mix(_mix(np.array([seed], np.uint64)) + np.uint64(epoch))
    return _mix(key + samples * np.uint64(_GOLDEN))


def _mix(words: np.ndarray) -> np.ndarray:
    """Compute SplitMix64's output for the states ``words``, uint64, modulo 2**64."""
    z = words + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
