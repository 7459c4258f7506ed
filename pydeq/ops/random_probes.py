"""Random probes for estimators of traces and norms, from a counter-based generator.

Entry d of probe k of sample b depends only on the seed and (k, b, d). A block of four random words is Philox 4x32-10 of
the counter (block, b, k, distribution) with the seed as the key. Rademacher probes take 128 signs from a block, entry d
the bit d % 32 of word d % 128 // 32 of block d // 128, +1 where it is 0. Gaussian probes take 4 numbers from a block,
the transforms of its words (0, 1) and (2, 3); they are computed in float32 for every dtype, by additions,
multiplications and square roots, which IEEE 754 defines to the last bit.

So a seed gives the same bits on every device, instruction set and number of threads; a sample's probes do not depend on
other samples, and the first probes do not depend on the number of probes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pydeq.ops.constants import (
    COSINE_TERMS,
    LOG_2,
    LOG_TERMS,
    PHILOX_INCREMENTS,
    PHILOX_MULTIPLIERS,
    PHILOX_ROUNDS,
    SINE_TERMS,
    Distribution,
)
from pydeq.ops.registry import define

_MASK = 0xFFFFFFFF
_UNIT = 2.0**-32
_ROOT_HALF, _ONE = 0x3F3504F3, 0x3F800000  # the bits of sqrt(1/2) and 1 as floats


def _multiply(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product of 32-bit words, which would overflow int64."""
    low = (x & 0xFFFF) * multiplier
    high = (x >> 16) * multiplier + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def philox(counter: Sequence[Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter, in plain torch.

    Args:
        counter: Four words in [0, 2^32), int64 tensors that broadcast.
        key: Two words.

    Source: Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        high0, low0 = _multiply(PHILOX_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(PHILOX_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + PHILOX_INCREMENTS[0]) & _MASK, (k1 + PHILOX_INCREMENTS[1]) & _MASK
    return c0, c1, c2, c3


def _polynomial(terms: Sequence[float], x: Tensor) -> Tensor:
    p = torch.full_like(x, terms[-1])
    for term in reversed(terms[:-1]):
        p = p * x + term
    return p


def _log_of_word(w: Tensor) -> Tensor:
    """log((w + 1/2) / 2^32) in float32."""
    bits = ((w.float() + 0.5) * _UNIT).view(torch.int32) + (_ONE - _ROOT_HALF)
    e = (bits >> 23) - 127
    m = ((bits & 0x7FFFFF) + _ROOT_HALF).view(torch.float32)
    # Near u = 1, 1 - u has more correct digits than u.
    from_one = ((_MASK - w).float() + 0.5) * -_UNIT
    f = torch.where(e == 0, from_one, m - 1.0)
    return e.float() * LOG_2 + (f + f * f * _polynomial(LOG_TERMS, f))


def normal_pair(w0: Tensor, w1: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normal numbers from two random words: sqrt(-2 log u) (cos a, sin a), u and a / 2 pi uniform.

    Args:
        w0, w1: int64 in [0, 2^32).

    Returns:
        float32, at most sqrt(66 log 2) = 6.76 in modulus.

    Source: Box and Muller, A Note on the Generation of Random Normal Deviates, 1958.
    """
    # torch's float32 square root may be off by an ulp. Its float64 square root rounds to the float32 number of IEEE
    # 754.
    r = (-2.0 * _log_of_word(w0)).double().sqrt().float()
    quadrant = (w1 + 0x20000000 & _MASK) >> 30
    i = (w1 - (quadrant << 30) + 0x80000000 & _MASK) - 0x80000000
    t = (2 * i + 1).float() * (2.0 * _UNIT)
    s = t * t
    sine = _polynomial(SINE_TERMS, s) * t
    cosine = _polynomial(COSINE_TERMS, s) * s + 1.0
    swap = (quadrant & 1).bool()
    x, y = r * torch.where(swap, sine, cosine), r * torch.where(swap, cosine, sine)
    return torch.where((quadrant + 1 & 2).bool(), -x, x), torch.where((quadrant & 2).bool(), -y, y)


def random_probes_reference(
    like: Tensor,  # [B, D]
    seed: Tensor,  # int64 []
    probes: int,
    distribution: int,
) -> Tensor:  # [K, B, D]
    batch, state = like.shape
    per_block = 4 if distribution == Distribution.GAUSSIAN else 128
    blocks = -(-state // per_block)
    k, b, block = (torch.arange(n, device=like.device) for n in (probes, batch, blocks))
    tag = torch.full((), int(distribution), device=like.device)
    key = (seed & _MASK, seed >> 32 & _MASK)
    words = philox(torch.broadcast_tensors(block, b[:, None], k[:, None, None], tag), key)
    if distribution == Distribution.GAUSSIAN:
        numbers = torch.stack([*normal_pair(words[0], words[1]), *normal_pair(words[2], words[3])], -1)
    else:
        bits = torch.stack(words, -1)[..., None] >> torch.arange(32, device=like.device) & 1
        numbers = 1.0 - 2.0 * bits.float()
    return numbers.reshape(probes, batch, blocks * per_block)[..., :state].to(like.dtype).contiguous()


def random_probes_fake(like: Tensor, seed: Tensor, probes: int, distribution: int) -> Tensor:
    return like.new_empty((probes, *like.shape))


_random_probes = define(
    "random_probes(Tensor like, Tensor seed, int probes, int distribution) -> Tensor",
    random_probes_reference,
    random_probes_fake,
)


def random_probes(
    like: Tensor,
    probes: int,
    distribution: Distribution,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """Draw probes v with E[v v^T] = I.

    Args:
        like: [B, D], read only for its shape, dtype and device.
        probes: K, at least 1.
        distribution: The distribution of the entries, which are independent with mean 0 and variance 1.
        generator: Draws the seed; by default torch's own generator for the device of ``like``.
        seed: 0-d int64, used instead of a drawn seed.

    Returns:
        [K, B, D]; half types have the float32 numbers after rounding, float64 has them unchanged.

    Raises:
        ValueError: If like is not [B, D], or probes < 1.

    Examples:
        >>> from pydeq.ops.constants import Distribution
        >>> probes = pydeq.ops.random_probes(torch.zeros(2, 3), 4, Distribution.RADEMACHER)
        >>> probes.shape, probes.abs().unique()
        (torch.Size([4, 2, 3]), tensor([1.]))
    """
    if like.dim() != 2:
        raise ValueError(f"like must be of shape (batch, state), got {tuple(like.shape)}")
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    if seed is None:
        device = like.device if generator is None else generator.device
        seed = torch.randint(-(2**63), 2**63 - 1, (), device=device, generator=generator)
    return _random_probes(like.detach(), seed.to(like.device), probes, int(distribution))
