"""Maps of any size and precision, whose constants take no more memory than the state.

For how the work per iteration scales: with the entries of a sample, the batch, the length of a sequence, the bytes of
an entry. The maps are contractions by 0.9 or less, in the maximum norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.problems.base import Problem, from_formula

FAMILY = "sizes"
SOURCE = "pydeq's benchmarks"
NAMES = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16"}
RTOL = {torch.float64: 1e-8, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def _problem(name: str, title: str, formula: Any, shape: tuple[int, int], dtype: torch.dtype, **constants: Tensor):
    return from_formula(
        f"{FAMILY}.{name}.{NAMES[dtype]}",
        f"{title}, {NAMES[dtype]}",
        formula,
        torch.zeros(shape, dtype=dtype),
        facts={"batch": shape[0], "dim": shape[1]},
        family=FAMILY,
        source=SOURCE,
        rtol=RTOL[dtype],
        constants={key: array.to(dtype) for key, array in constants.items()},
        sample_axes={"rows": 0},
    )


def _tanh_diagonal(xp: Any, z: Any, slopes: Any, rows: Any, columns: Any) -> Any:
    return xp.tanh(slopes * z + rows * columns)


def _diagonal(xp: Any, z: Any, slopes: Any, rows: Any, columns: Any) -> Any:
    return slopes * z + rows * columns


def _elementwise(batch: int, dim: int) -> dict[str, Tensor]:
    """Slopes that fill [-0.9, 0.9], and an injection of rank 1: an array of [batch, 1] times one of [dim]."""
    return {
        "slopes": torch.linspace(-0.9, 0.9, dim),
        "rows": torch.linspace(0.5, 1.5, batch)[:, None],
        "columns": torch.cos(torch.arange(dim, dtype=torch.float32)),
    }


def tanh_diagonal(batch: int, dim: int, dtype: torch.dtype = torch.float32) -> Problem:
    """z = tanh(a z + x), entry by entry."""
    return _problem(
        f"tanh.{batch}x{dim}",
        f"tanh(a z + x), ({batch}, {dim})",
        _tanh_diagonal,
        (batch, dim),
        dtype,
        **_elementwise(batch, dim),
    )


def diagonal(batch: int, dim: int, dtype: torch.dtype = torch.float32) -> Problem:
    """z = a z + x, entry by entry."""
    return _problem(
        f"diagonal.{batch}x{dim}",
        f"a z + x, ({batch}, {dim})",
        _diagonal,
        (batch, dim),
        dtype,
        **_elementwise(batch, dim),
    )


def _causal_convolution(xp: Any, z: Any, taps: Any, rows: Any, injection: Any) -> Any:
    length, channels = injection.shape
    sequence = z.reshape(z.shape[0], length, channels)
    mixed = taps[0] * sequence
    for delay in range(1, taps.shape[0]):
        before = xp.zeros_like(sequence[:, :delay])
        mixed = mixed + taps[delay] * xp.concatenate([before, sequence[:, :-delay]], axis=1)
    return xp.tanh(mixed + rows[:, :, None] * injection).reshape(z.shape[0], length * channels)


def _sequence(batch: int, length: int, channels: int) -> dict[str, Tensor]:
    steps = torch.arange(length * channels, dtype=torch.float32)
    return {"rows": torch.linspace(0.5, 1.5, batch)[:, None], "injection": torch.cos(steps).view(length, channels)}


def causal_convolution(
    batch: int, length: int, channels: int = 8, taps: int = 4, dtype: torch.dtype = torch.float32
) -> Problem:
    """z_t = tanh(sum_k w_k z_{t - k} + x_t) channel by channel, k = 0, ..., taps - 1, with sum_k |w_k| = 0.9."""
    return _problem(
        f"convolution.{batch}x{length}x{channels}",
        f"causal convolution, ({batch}, {length}, {channels})",
        _causal_convolution,
        (batch, length * channels),
        dtype,
        taps=torch.full((taps, channels), 0.9 / taps) * torch.tensor([1.0, -1.0]).repeat(taps)[:taps, None],
        **_sequence(batch, length, channels),
    )


def _causal_attention(xp: Any, z: Any, gain: Any, rows: Any, injection: Any) -> Any:
    length, channels = injection.shape
    sequence = z.reshape(z.shape[0], length, channels)
    keys = rows[:, :, None] * injection
    scores = xp.einsum("blc,bmc->blm", keys, keys) / channels**0.5
    scores = xp.where(xp.tril(xp.ones_like(scores)) > 0, scores, -1e30 * xp.ones_like(scores))
    weights = xp.exp(scores - xp.amax(scores, axis=2, keepdims=True))
    weights = weights / xp.sum(weights, axis=2, keepdims=True)
    mixed = gain * xp.einsum("blm,bmc->blc", weights, sequence)
    return xp.tanh(mixed + keys).reshape(z.shape[0], length * channels)


def causal_attention(batch: int, length: int, channels: int = 8, dtype: torch.dtype = torch.float32) -> Problem:
    """z_t = tanh(0.9 sum_{s <= t} p_ts z_s + x_t), where p_ts is the softmax over s of x_t . x_s / sqrt(channels).

    It forms all ``length``^2 scores of each sample.
    """
    return _problem(
        f"attention.{batch}x{length}x{channels}",
        f"causal attention, ({batch}, {length}, {channels})",
        _causal_attention,
        (batch, length * channels),
        dtype,
        gain=torch.tensor(0.9),
        **_sequence(batch, length, channels),
    )


SHAPES = ((1, 10), (1, 1_000), (1, 100_000), (32, 10), (32, 1_000), (32, 10_000), (4096, 10), (4096, 100))
LARGE_SHAPES = ((1, 1_000_000), (1, 10_000_000), (32, 100_000), (4096, 1_000))


def family() -> Iterator[Problem]:
    """The large shapes in float32 only."""
    for dtype in NAMES:
        for batch, dim in SHAPES:
            yield tanh_diagonal(batch, dim, dtype)
        yield diagonal(32, 1_000, dtype)
        yield causal_convolution(1, 4096, dtype=dtype)
        yield causal_convolution(32, 512, dtype=dtype)
        yield causal_attention(32, 64, dtype=dtype)
        yield causal_attention(1, 1024, dtype=dtype)
    for batch, dim in LARGE_SHAPES:
        yield tanh_diagonal(batch, dim)
    yield diagonal(1, 10_000_000)
