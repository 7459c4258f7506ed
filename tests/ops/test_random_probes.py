"""Random probes: known words, the same bits everywhere, the distributions they name."""

import math
from itertools import pairwise

import pytest
import torch
from check_op import DTYPES, check_op
from hypothesis import given
from hypothesis import strategies as st

from pydeq.ops import random_probes
from pydeq.ops.constants import Distribution
from pydeq.ops.random_probes import normal_pair, philox, random_probes_reference

OP = torch.ops.pydeq.random_probes.default

# Counter, key, words: the Philox 4x32-10 rows of kat_vectors in Random123, the library of Salmon et al.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


def draw(shape, seed=0, probes=1, distribution=Distribution.GAUSSIAN, dtype=torch.float32):
    return OP(torch.empty(shape, dtype=dtype), torch.tensor(seed), probes, distribution)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter, key, expected):
    block = philox([torch.tensor(word) for word in words(counter)], tuple(map(torch.tensor, words(key))))
    assert [int(word) for word in block] == words(expected)


def test_signs_are_the_published_words():
    """Rademacher probes of seed 0 begin with the block of counter 0: the operation shows its bits."""
    signs = draw((1, 128), distribution=Distribution.RADEMACHER)[0, 0]
    bits = [word >> i & 1 for word in words(KNOWN_ANSWERS[0][2]) for i in range(32)]
    assert signs.tolist() == [1.0 - 2.0 * bit for bit in bits]


def test_counter_and_key_are_used_as_documented():
    seed = -0x0123456789ABCDEF
    key = (torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32 & 0xFFFFFFFF))
    counter = [torch.tensor(word) for word in (3, 2, 1, int(Distribution.GAUSSIAN))]
    block = philox(counter, key)
    expected = torch.stack([*normal_pair(block[0], block[1]), *normal_pair(block[2], block[3])])
    assert torch.equal(draw((3, 16), seed, 2)[1, 2, 12:], expected)


@pytest.mark.parametrize("distribution", Distribution)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_its_reference(dtype, distribution):
    """To the last bit, on every instruction set."""
    shapes = [(0, 3), (2, 0), (1, 1), (3, 31), (2, 127), (2, 128), (3, 129), (2, 4095), (1, 4097), (2, 9000)]
    seeds = (0, -1, 2**63 - 1, -(2**63), 0x123456789)
    samples = [
        (torch.empty(shape, dtype=dtype), torch.tensor(seeds[i % len(seeds)]), 1 + i % 3, int(distribution))
        for i, shape in enumerate(shapes)
    ]
    check_op(OP, random_probes_reference, samples, opcheck=[0, 3])


@given(st.integers(-(2**63), 2**63 - 1), st.sampled_from(Distribution), st.integers(1, 3), st.integers(1, 300))
def test_a_probe_depends_on_its_place_alone(seed, distribution, probes, dim):
    whole = draw((5, 300), seed, 4, distribution)
    assert torch.equal(draw((2, dim), seed, probes, distribution), whole[:probes, :2, :dim])


def test_every_place_and_seed_has_its_own():
    probes = torch.cat([draw((3, 40), seed, 2).flatten(0, 1) for seed in (0, 1, 2**32, -1)])
    assert len(probes.unique(dim=0)) == len(probes)
    signs = torch.cat([draw((3, 128), seed, 2, Distribution.RADEMACHER).flatten(0, 1) for seed in (0, 1, 2**32, -1)])
    assert len(signs.unique(dim=0)) == len(signs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types_hold_the_same_numbers_rounded(dtype):
    assert torch.equal(draw((3, 500), 5, dtype=dtype), draw((3, 500), 5).to(dtype))
    signs = draw((3, 500), 5, distribution=Distribution.RADEMACHER, dtype=dtype)
    assert signs.abs().eq(1).all()


def test_normal_pair_is_the_transform_it_names():
    generator = torch.Generator().manual_seed(0)
    w0, w1 = torch.randint(0, 2**32, (2, 200000), generator=generator)
    edges = torch.tensor([0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 2, 2**32 - 1])
    edges = torch.cat([edges, (torch.tensor([0.5, 2.0]).sqrt() * 2**31).long()])  # where the exponent changes
    w0, w1 = (
        torch.cat([w, e.flatten()]) for w, e in zip((w0, w1), torch.meshgrid(edges, edges, indexing="ij"), strict=True)
    )
    x, y = normal_pair(w0, w1)
    # log u from whichever end of (0, 1) is nearer, in float64.
    log_u = torch.where(
        w0 < 2**31, torch.log((w0 + 0.5).double() / 2**32), torch.log1p(-(2**32 - w0.double() - 0.5) / 2**32)
    )
    radius, angle = (-2.0 * log_u).sqrt(), 2.0 * math.pi * (w1.double() + 0.5) / 2**32
    # Two rounded factors, each a polynomial of rounded numbers: within 4 eps of the radius.
    allowed = 4.0 * torch.finfo(torch.float32).eps * radius
    assert ((x - radius * angle.cos()).abs() <= allowed).all()
    assert ((y - radius * angle.sin()).abs() <= allowed).all()
    assert max(x.abs().max(), y.abs().max()) <= math.sqrt(66 * math.log(2)) * (1 + 1e-6)


def test_normal_pairs_are_symmetric_to_the_last_bit():
    w0, w1 = torch.randint(0, 2**32, (2, 1000), generator=torch.Generator().manual_seed(1))
    x, y = normal_pair(w0, w1)
    opposite = normal_pair(w0, (w1 + 2**31) % 2**32)
    mirrored = normal_pair(w0, 2**32 - 1 - w1)
    quarter = normal_pair(w0, (w1 + 2**30) % 2**32)
    assert torch.equal(torch.stack(opposite), torch.stack([-x, -y]))
    assert torch.equal(torch.stack(mirrored), torch.stack([x, -y]))
    assert torch.equal(torch.stack(quarter), torch.stack([-y, x]))


def test_gaussian_moments():
    """Each statistic within five of its standard errors, on 2 million numbers."""
    x = draw((32, 32768), seed=11, probes=2).double().flatten()
    n = x.numel()
    moments = {1: 0, 2: 1, 3: 0, 4: 3, 5: 0, 6: 15, 8: 105}
    double_factorial = {2: 1, 4: 3, 6: 15, 8: 105, 10: 945, 12: 10395, 16: 2027025}
    for power, moment in moments.items():
        error = math.sqrt((double_factorial[2 * power] - moment**2) / n)
        assert abs(float(x.pow(power).mean()) - moment) < 5 * error, power
    # Neighbours: the two of a pair, two pairs of a block, two blocks; also of squares, which share a radius.
    for lag in (1, 2, 3, 4, 128):
        assert abs(float((x[:-lag] * x[lag:]).mean())) < 5 / math.sqrt(n), lag
        squares = x.square() - 1.0
        assert abs(float((squares[:-lag] * squares[lag:]).mean())) < 5 * 2 / math.sqrt(n), lag


def test_gaussian_tails_and_body():
    """Counts in 400 cells by the chi-square test, and of the tails beyond: each within five standard errors."""
    x = draw((64, 32768), seed=12, probes=2).double().flatten()
    edges = torch.linspace(-3.9, 3.9, 399, dtype=torch.float64)
    probability = torch.cat([torch.zeros(1), torch.special.ndtr(edges), torch.ones(1)]).diff()
    counts = torch.bincount(torch.bucketize(x, edges), minlength=400)
    expected = probability * x.numel()
    assert expected.min() > 10
    statistic = float(((counts - expected).square() / expected).sum())
    assert abs(statistic - 399) < 5 * math.sqrt(2 * 399)
    for limit in (4.0, 4.25, 4.5):
        tail = 2.0 * x.numel() * float(torch.special.ndtr(torch.tensor(-limit, dtype=torch.float64)))
        assert abs(int((x.abs() > limit).sum()) - tail) < 5 * math.sqrt(tail), limit


def test_coordinates_are_uncorrelated():
    """E[v v^T] = I, over samples and over probes."""
    for probes, batch in ((1, 40000), (40000, 1)):
        for distribution in Distribution:
            v = draw((batch, 12), seed=3, probes=probes, distribution=distribution).double().reshape(40000, 12)
            second = v.mT @ v / len(v) - torch.eye(12)
            error = math.sqrt(2.0 / len(v))  # of a Gaussian's variance, the largest of them all
            assert second.abs().max() < 5 * error


def test_signs_are_fair_and_independent():
    signs = draw((64, 65536), seed=13, distribution=Distribution.RADEMACHER).flatten()
    n = signs.numel()
    assert abs(float(signs.double().mean())) < 5 / math.sqrt(n)
    for lag in (1, 2, 31, 32, 127, 128):
        assert abs(float((signs[:-lag] * signs[lag:]).double().mean())) < 5 / math.sqrt(n), lag


def test_distributions_share_no_bits():
    signs = draw((64, 4096), seed=1, distribution=Distribution.RADEMACHER)
    gaussian = draw((64, 4096), seed=1).sign()
    assert abs(float((signs * gaussian).mean())) < 5 / math.sqrt(signs.numel())


def test_seeds_come_from_the_generator():
    like = torch.empty(2, 9)

    def three(**options):
        return [random_probes(like, 1, Distribution.GAUSSIAN, **options) for _ in range(3)]

    first = three(generator=torch.Generator().manual_seed(4))
    again = three(generator=torch.Generator().manual_seed(4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in pairwise(first))
    torch.manual_seed(4)
    default = three()
    torch.manual_seed(4)
    assert all(torch.equal(a, b) for a, b in zip(default, three(), strict=True))
    fixed = three(seed=torch.tensor(9))
    assert torch.equal(fixed[0], fixed[2])
    assert torch.equal(fixed[0], draw((2, 9), 9))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"like must be of shape .batch, state., got .3,."):
        random_probes(torch.empty(3), 1, Distribution.GAUSSIAN)
    with pytest.raises(ValueError, match="probes must be at least 1, got 0"):
        random_probes(torch.empty(3, 2), 0, Distribution.GAUSSIAN)


@pytest.mark.kernels
def test_kernel_refuses_what_it_would_misread():
    like, seed = torch.empty(2, 3), torch.tensor(0)
    for arguments, named in (
        ((like[0], seed, 1, 0), "like"),
        ((like.int(), seed, 1, 0), "like"),
        ((like, seed.int(), 1, 0), "seed"),
        ((like, seed[None], 1, 0), "seed"),
        ((like, seed, -1, 0), "probes"),
        ((like, seed, 1, 2), "distribution"),
        ((like, seed, 1, -1), "distribution"),
    ):
        with pytest.raises(RuntimeError, match=f"{named} must"):
            OP(*arguments)
