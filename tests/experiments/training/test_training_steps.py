"""What changes from step to step: learning rates, caps, penalties; and the optimizers."""

import itertools
import math

import pytest
import torch
from small_trainings import small

from experiments.training import OptimizerConfig, ScheduleConfig
from experiments.training.optimizers import build_optimizer
from experiments.training.penalties import PenaltySchedule, cap
from experiments.training.schedules import learning_rate
from experiments.training.seeds import Purpose, seed_of
from pydeq.models import PenaltyConfig


def test_the_cosine_falls_to_the_floor():
    schedule = ScheduleConfig(name="cosine", floor=1e-6)
    rates = [learning_rate(schedule, 0.05, step, 100) for step in range(101)]
    assert rates[0] == 0.05
    assert rates[50] == pytest.approx((0.05 + 1e-6) / 2)
    assert rates[100] == pytest.approx(1e-6)
    assert all(before > after for before, after in itertools.pairwise(rates))
    # torch's own, which the published recipes step through
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.05)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100, eta_min=1e-6)
    for rate in rates:
        assert rate == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_the_warm_up_rises_to_the_peak_and_the_cosine_counts_from_the_beginning():
    schedule = ScheduleConfig(name="cosine", warmup=4)
    assert [learning_rate(schedule, 1.0, step, 10) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(schedule, 1.0, 4, 10) == pytest.approx((1 + math.cos(math.pi * 0.4)) / 2)
    assert learning_rate(ScheduleConfig(name="constant", warmup=2), 3.0, 1, 5) == 3.0
    assert learning_rate(ScheduleConfig(name="constant"), 3.0, 4, 5) == 3.0


def test_caps_are_drawn_from_all_of_the_range_and_depend_on_the_step_alone():
    config = small(jitter=[-2, 1])
    caps = [cap(config, step) for step in range(200)]
    assert set(caps) == {6, 7, 8, 9}
    assert caps == [cap(config, step) for step in range(200)]
    assert caps != [cap(small(jitter=[-2, 1], seed=1), step) for step in range(200)]
    assert {cap(small(jitter=[0, 0]), step) for step in range(20)} == {8}


def test_the_penalty_has_a_strength_in_pretraining_rises_after_it_and_stops_with_an_epoch():
    config = PenaltyConfig(strength=2.0, increment=0.1, every=10, stop_epoch=5, pretraining_strength=0.03)
    schedule = PenaltySchedule(config, pretraining_steps=20, seed=0)
    assert schedule.strength(0, 0) == schedule.strength(19, 0) == 0.03
    assert schedule.strength(20, 1) == schedule.strength(29, 1) == 2.0
    assert schedule.strength(30, 1) == pytest.approx(2.1)
    assert schedule.strength(59, 4) == pytest.approx(2.3)
    assert schedule.strength(60, 5) == 0.0
    assert schedule.penalty(60, 5) is None
    assert schedule.penalty(30, 1).strength == pytest.approx(2.1)
    assert schedule.penalty(3, 0).strength == 0.03
    none = PenaltySchedule(None, 0, seed=0)
    assert none.penalty(0, 0) is None
    assert none.strength(0, 0) == 0.0


def test_penalties_are_as_frequent_as_they_should_be_and_depend_on_the_step_alone():
    schedule = PenaltySchedule(PenaltyConfig(strength=1.0, frequency=0.3), 0, seed=4)
    steps = [schedule.penalty(step, 0) is not None for step in range(2000)]
    # Five standard deviations of a binomial share.
    assert abs(sum(steps) / 2000 - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 2000)
    assert steps == [schedule.penalty(step, 0) is not None for step in range(2000)]
    drawn = next(step for step in range(2000) if steps[step])
    assert schedule.penalty(drawn, 0).frequency == 1.0  # the draw was made
    assert PenaltySchedule(PenaltyConfig(strength=1.0, pretraining_strength=0.0), 5, 0).penalty(2, 0) is None


def test_seeds_differ_by_purpose_step_and_seed():
    seeds = {seed_of(seed, purpose, step) for seed in range(5) for purpose in Purpose for step in range(20)}
    assert len(seeds) == 5 * len(Purpose) * 20
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_optimizers():
    parameters = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))]
    sgd = build_optimizer(OptimizerConfig(name="sgd", lr=0.5, momentum=0.9, weight_decay=0.1), parameters)
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.param_groups[0]["nesterov"]
    assert sgd.param_groups[0]["weight_decay"] == 0.1
    assert len(sgd.param_groups[0]["params"]) == 2
    plain = build_optimizer(OptimizerConfig(name="sgd", momentum=0.0), parameters)
    assert not plain.param_groups[0]["nesterov"]
    adam = build_optimizer(OptimizerConfig(name="adam", betas=(0.5, 0.6), eps=1e-4), parameters)
    assert type(adam) is torch.optim.Adam
    assert adam.param_groups[0]["betas"] == (0.5, 0.6)
    adamw = build_optimizer(OptimizerConfig(name="adamw", weight_decay=0.3, decay_vectors=False), parameters)
    assert type(adamw) is torch.optim.AdamW
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.3, 0.0]
    assert [group["params"][0].dim() for group in adamw.param_groups] == [2, 1]
    parameters[0].requires_grad_(False)
    assert len(build_optimizer(OptimizerConfig(), parameters).param_groups[0]["params"]) == 1
