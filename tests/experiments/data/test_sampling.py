from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.data import batches
from experiments.data.sampling import _mix, permutation, sample_seed

SIZES = {"n": st.integers(0, 60), "batch": st.integers(4, 20), "seed": st.integers(0, 2**63 - 1)}


def listed(sequence):
    return [indices.tolist() for indices in sequence]


@given(**SIZES, epoch=st.integers(0, 2**40), world=st.integers(1, 4))
def test_an_epoch_has_each_sample_once_and_the_same_batches_on_any_number_of_ranks(n, batch, seed, epoch, world):
    whole = listed(batches(n, batch, seed, epoch))
    assert sorted(chain(*whole)) == list(range(n))
    assert [len(indices) for indices in whole[:-1]] == [batch] * (len(whole) - 1)
    ranks = [listed(batches(n, batch, seed, epoch, rank, world)) for rank in range(world)]
    assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == whole
    sizes = [[len(part) for part in parts] for parts in zip(*ranks, strict=True)]
    assert all(max(parts) - min(parts) <= 1 for parts in sizes)


@given(**SIZES, done=st.integers(0, 15))
def test_an_epoch_goes_on_where_it_stopped(n, batch, seed, done):
    whole = listed(batches(n, batch, seed, 3))
    done = min(done, len(whole))
    rest = batches(n, batch, seed, 3, start=done)
    assert listed(rest) == whole[done:]
    assert len(rest) == len(whole) - done
    assert listed(rest[:2]) == whole[done : done + 2]


def test_orders_differ_between_seeds_and_epochs():
    orders = [tuple(permutation(50, seed, epoch).tolist()) for seed in range(20) for epoch in range(20)]
    assert len(set(orders)) == 400


def test_orders_are_random():
    # Each sample is as likely in each place: of 4000 orders of 8, about 500 each; sixfold of sqrt(500 * 7 / 8).
    counts = torch.zeros(8, 8)
    for epoch in range(4000):
        counts[torch.arange(8), permutation(8, 7, epoch)] += 1
    assert (counts - 500).abs().max() < 6 * (500 * 7 / 8) ** 0.5


def test_orders_are_the_same_for_ever():
    # The published generator's first words for seed 1234567; then what must never change, for trainings to resume.
    words = [_mix(np.array([(1234567 + i * 0x9E3779B97F4A7C15) % 2**64], np.uint64))[0] for i in range(2)]
    assert words == [6457827717110365317, 3203168211198807973]
    assert permutation(10, 1, 0).tolist() == [9, 8, 7, 4, 2, 0, 3, 6, 5, 1]
    assert sample_seed(1, 2, 3) == 6683717603074897428


def test_samples_draw_from_seeds_of_their_own():
    seeds = {sample_seed(seed, epoch, sample) for seed in range(5) for epoch in range(5) for sample in range(40)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_without_shuffling_and_without_the_rest():
    assert listed(batches(7, 3, shuffle=False)) == [[0, 1, 2], [3, 4, 5], [6]]
    short = batches(7, 3, shuffle=False, drop_last=True)
    assert listed(short) == [[0, 1, 2], [3, 4, 5]]
    assert short[-1].tolist() == [3, 4, 5]
    assert short[0].dtype == torch.int64
    with pytest.raises(IndexError, match="batch 2 of 2"):
        short[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": -1}, "n must be at least 0, got -1"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 2**63}, r"seed must be below 2\*\*63"),
        ({"epoch": -1}, "epoch must be at least 0"),
        ({"epoch": 2**63}, r"epoch must be below 2\*\*63"),
        ({"rank": 2, "world": 2}, r"rank must be in \[0, 2\), the world, got 2"),
        ({"batch": 3, "world": 4}, "batch must be at least world, 4"),
        ({"start": 5}, "start must be at most 4, the batches of an epoch, got 5"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        batches(**({"n": 10, "batch": 3} | change))


def test_numbers_that_are_not_whole_are_refused():
    with pytest.raises(TypeError, match=r"batch must be a whole number, got 2\.5"):
        batches(10, 2.5)  # pyright: ignore[reportArgumentType]
