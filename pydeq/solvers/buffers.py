"""The large buffers of a solve: uninitialized, laid out for the kernels, and kept for the next solve.

New memory costs a page fault for every page that is written for the first time. For states of medium size this takes as
long as the steps of a short solve. So histories, which no user ever sees, are kept when a solve is done, at most 64 MiB
of them.
"""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor

from pydeq.ops.kernels import advise_huge_pages

# Bytes: the least size of a buffer that asks for huge pages, the least size of a buffer that is kept, the total kept.
_LARGE, _KEPT_FROM, _KEPT_BYTES = 1 << 21, 1 << 17, 1 << 26
# All rows of a history are read at the same entries. A cache finds a line by its place within a page, so rows that
# start at the same place would evict each other. So each row starts 17 lines later in its page than the row before.
_PAGE, _LINE, _LINES_APART, _STAGGERED_FROM = 4096, 64, 17, 1 << 16
# Rows of a growing history that are allocated at once: enough that small states use huge pages, and few enough that
# little memory is unused. More, where they are so small that the memory counts less than the allocations.
_ROWS, _SMALL_ROWS, _SMALL_BYTES = 3, 16, 1 << 13

# Threads share it without a lock, since a deque's operations are atomic. A fork could leave a lock locked.
_kept: deque[Tensor] = deque()


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialized buffer of this shape, of the device and, by default, the dtype of ``like``.

    A large buffer on the CPU is in huge pages, where they fit.
    """
    buffer = like.new_empty(*shape, dtype=dtype)  # a shape passed as one argument takes twice as long, here and below
    # A tensor of another type may have no memory, and a batch without a known size.
    if type(buffer) is Tensor and buffer.nbytes >= _LARGE and like.device.type == "cpu":
        advise_huge_pages(buffer.data_ptr(), buffer.nbytes)
    return buffer


def pair(like: Tensor) -> tuple[Tensor, Tensor]:
    """Two buffers like a contiguous tensor: a copy of it, and an uninitialized one."""
    if type(like) is not Tensor or like.nbytes < _LARGE:
        return like.clone(), torch.empty_like(like)
    return empty(like, *like.shape).copy_(like), empty(like, *like.shape)


def zeros(like: Tensor, *parts: tuple[torch.dtype, tuple[int, ...]]) -> list[Tensor]:
    """Zeroed buffers of these dtypes, of 4 or 8 bytes, and shapes, on the device of ``like``.

    On a GPU each fill is a launch, which costs as much as a step. So there the buffers are parts of one buffer, and
    each part begins with a new cache line. On the CPU a view costs as much as a small fill, so each buffer is separate.
    """
    if like.device.type == "cpu":
        return [like.new_zeros(*shape, dtype=dtype) for dtype, shape in parts]
    counts = [math.prod(shape) * dtype.itemsize for dtype, shape in parts]  # bytes
    words = [-(-count // _LINE) * (_LINE // 8) for count in counts]
    memory = like.new_zeros(sum(words), dtype=torch.float64).split_with_sizes(words)
    found = []
    for (dtype, shape), count, part in zip(parts, counts, memory, strict=True):
        found.append(part.view(dtype)[: count // dtype.itemsize].view(shape))
    return found


class Scratch:
    """The history of one solve.

    Args:
        like: A contiguous tensor: device and, by default, dtype of all buffers, and the shape of a row.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._taken: list[Tensor] = []

    def empty(self, *shape: int) -> Tensor:
        """An uninitialized buffer of this shape."""
        count = math.prod(shape)
        if count * self._like.itemsize < _KEPT_FROM:
            return self._like.new_empty(*shape)
        return self._take(count, self._like.dtype).view(shape)

    def more_rows(self, first: int, most: int, dtype: torch.dtype) -> list[Tensor]:
        """The next rows of a history that grows, at most ``most``; more at once where they are small."""
        fit = _SMALL_BYTES // max(1, self._like.numel() * dtype.itemsize)
        return self.rows(first, min(most, max(_ROWS, min(fit, _SMALL_ROWS))), dtype)

    def rows(self, first: int, count: int, dtype: torch.dtype) -> list[Tensor]:
        """Rows ``first`` to ``first + count - 1`` of a history that grows, uninitialized, each like ``like``."""
        like, size = self._like, self._like.numel()
        if like.device.type != "cpu" or size * dtype.itemsize < _STAGGERED_FROM:
            return list(self._take(count * size, dtype).view(count, *like.shape).unbind())
        page, line = _PAGE // dtype.itemsize, _LINE // dtype.itemsize
        storage = self._take(count * (size + page), dtype)
        starts = (i * (size + page) + (first + i) * _LINES_APART * line % page for i in range(count))
        return [storage[start : start + size].view(like.shape) for start in starts]

    def release(self) -> None:
        """Keep the buffers for the next solve. Nothing may use them any more."""
        if not self._taken:
            return
        for buffer in self._taken:
            if buffer.device.type == "cpu" and buffer.nbytes >= _KEPT_FROM and type(buffer) is Tensor:
                _kept.append(buffer)
        self._taken.clear()
        total = sum(buffer.nbytes for buffer in list(_kept))
        while total > _KEPT_BYTES:
            try:
                total -= _kept.popleft().nbytes
            except IndexError:  # another thread took it
                break

    def _take(self, count: int, dtype: torch.dtype) -> Tensor:
        buffer = None
        if self._like.device.type == "cpu":
            buffer = _find_kept(count, dtype)
        if buffer is None:
            buffer = empty(self._like, count, dtype=dtype)
        self._taken.append(buffer)
        return buffer


def _find_kept(count: int, dtype: torch.dtype) -> Tensor | None:
    """Take a kept buffer of this size, if there is one."""
    inference = torch.is_inference_mode_enabled()
    for _ in range(len(_kept)):
        try:
            buffer = _kept.popleft()
        except IndexError:
            return None
        # Buffers made in inference mode must not be written outside of inference mode.
        if buffer.dtype == dtype and buffer.numel() == count and buffer.is_inference() == inference:
            return buffer
        _kept.append(buffer)
    return None


def clear() -> None:
    """Free the buffers that are kept."""
    _kept.clear()
