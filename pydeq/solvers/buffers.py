"""The large buffers of a solve: scratch that is allocated once, uninitialized, and laid out for the kernels."""

from __future__ import annotations


import torch
from torch import Tensor

from pydeq.compiled import advise_huge_pages

# From here on a system call pays.
_LARGE = 1 << 21
# Rows of a history are read at the same entries all at once. A cache finds a line by its place within a page: rows that
# start at the same place would push each other out. So each starts 17 lines after the one before, with room for that.
_PAGE, _LINE, _LINES_APART, _STAGGERED_FROM = 4096, 64, 17, 1 << 16


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialized buffer of this shape, of the device and, by default, the dtype of ``like``.

    Large ones on the CPU lie in huge pages as far as these fit.
    """
    buffer = like.new_empty(shape, dtype=dtype or like.dtype)
    if like.device.type == "cpu" and buffer.nbytes >= _LARGE:
        advise_huge_pages(buffer.data_ptr(), buffer.nbytes)
    return buffer


def rows(like: Tensor, first: int, count: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Rows ``first`` to ``first + count - 1`` of a history that grows, each an uninitialized buffer like ``like``.

    Args:
        like: A contiguous tensor: shape, device and, by default, dtype of a row.
    """
    dtype = dtype or like.dtype
    size, entries = like.numel(), like.numel() * dtype.itemsize
    if like.device.type != "cpu" or entries < _STAGGERED_FROM:
        return list(empty(like, count, *like.shape, dtype=dtype).unbind())
    page, line = _PAGE // dtype.itemsize, _LINE // dtype.itemsize
    storage = empty(like, count * (size + page), dtype=dtype)
    strides = like.stride()
    starts = (i * (size + page) + (first + i) * _LINES_APART * line % page for i in range(count))
    return [storage.as_strided(like.shape, strides, start) for start in starts]
