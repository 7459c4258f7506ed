"""The penalty: its schedule, and what a layer's call makes of it."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import pydeq
from pydeq import JacobianPenalty
from pydeq.testing import CallCounter, assert_close

DIM = 6


class Cell(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(DIM, DIM, generator=generator, dtype=torch.float64) / (2 * DIM**0.5)
        self.weight = nn.Parameter(weight.to(dtype))

    def forward(self, z, x):
        return torch.tanh(z @ self.weight.T + x)


def problem(dtype=torch.float64):
    x = torch.randn(3, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return torch.zeros_like(x), x


def layer(**options):
    return pydeq.DEQ(Cell(), **{"rtol": 1e-10, **options})


def test_strength_is_that_of_the_latest_milestone_and_rises_from_there():
    penalty = JacobianPenalty(0.03, milestones=[(10, 2.5), (25, 1.0)], increment=0.5, every=5, stop=32)
    expected = {0: 0.03, 4: 0.03, 5: 0.53, 9: 0.53, 10: 2.5, 14: 2.5, 15: 3.0, 24: 3.5, 25: 1.0, 30: 1.5, 31: 1.5}
    assert {step: penalty.strength_at(step) for step in expected} == pytest.approx(expected)
    assert penalty.strength_at(32) == penalty.strength_at(10**6) == 0.0
    falling = JacobianPenalty(1.0, increment=-0.4, every=1)
    assert [falling.strength_at(step) for step in range(4)] == pytest.approx([1.0, 0.6, 0.2, 0.0])


def test_numbers_of_numpy_are_numbers():
    options = {"frequency": 0.5, "probes": 2, "order": 2, "step": 0.25, "stop": 9, "increment": 0.5, "every": 2}
    scalars = {name: (np.float32 if isinstance(x, float) else np.int64)(x) for name, x in options.items()}
    penalty = JacobianPenalty(np.float32(0.5), milestones=[(np.int64(3), np.float64(1.0))], **scalars)
    assert penalty == JacobianPenalty(0.5, milestones=[(3, 1.0)], **options)
    assert repr(penalty) == repr(JacobianPenalty(0.5, milestones=[(3, 1.0)], **options))
    assert penalty.strength_at(np.int64(5)) == 1.5
    cell, (z, x), generator = Cell(), problem(), torch.Generator()
    found, expected = (
        pydeq.jacobian_penalty(
            cell, z, x, probes=n, order=k, step=h, mode="difference", generator=generator.manual_seed(0)
        )
        for n, k, h in ((np.int32(2), np.int64(2), np.float64(0.5)), (2, 2, 0.5))
    )
    assert torch.equal(found, expected)


def test_recipes_of_the_paper():
    wikitext = JacobianPenalty(1.9, frequency=0.35, increment=0.1, every=35_000)
    assert wikitext.strength_at(299_999) == pytest.approx(1.9 + 0.1 * 8)
    cifar = JacobianPenalty(0.4, frequency=0.02, stop=90)
    assert (cifar.strength_at(89), cifar.strength_at(90)) == (0.4, 0.0)
    imagenet = JacobianPenalty(0.03, frequency=0.08, milestones=[(510_000, 2.5)], increment=0.1, every=50_000, probes=2)
    assert imagenet.strength_at(510_000 + 50_000) == pytest.approx(2.6)


def test_active_as_often_as_asked():
    generator, n, p = torch.Generator().manual_seed(0), 10000, 0.35
    penalty = JacobianPenalty(1.0, frequency=p, stop=5)
    share = sum(penalty.active(0, generator) for _ in range(n)) / n
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / n)
    before = generator.get_state()
    assert not penalty.active(5, generator)
    assert JacobianPenalty(1.0).active(7, generator)
    assert not JacobianPenalty(0.0).active(7, generator)
    assert torch.equal(generator.get_state(), before)  # nothing to decide, nothing drawn


def test_at_a_step_only_the_strength_is_left_of_the_schedule():
    penalty = JacobianPenalty(1.0, frequency=0.5, milestones=[(3, 2.0)], increment=0.5, every=2, stop=9, probes=4)
    assert penalty.at(5) == JacobianPenalty(2.5, frequency=0.5, probes=4)
    assert penalty.at(9).strength == 0.0
    assert pickle.loads(pickle.dumps(penalty)) == copy.deepcopy(penalty) == penalty
    assert hash(penalty) == hash(copy.deepcopy(penalty))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"strength": -1.0}, ValueError, "strength must be finite and not negative, got -1.0"),
        ({"strength": math.nan}, ValueError, "strength must be finite and not negative, got nan"),
        ({"strength": "1"}, TypeError, "strength must be a number, got str"),
        ({"frequency": 0.0}, ValueError, r"frequency must be in \(0, 1\], got 0.0"),
        ({"frequency": 1.5}, ValueError, r"frequency must be in \(0, 1\], got 1.5"),
        ({"frequency": None}, TypeError, "frequency must be a number, got NoneType"),
        ({"milestones": [3]}, TypeError, r"milestones\[0\] must be a pair \(step, strength\), got 3"),
        ({"milestones": [(3, 1.0), (3, 2.0)]}, ValueError, r"the step of milestones\[1\] must be at least 4, got 3"),
        ({"milestones": [(3, -1.0)]}, ValueError, r"the strength of milestones\[0\] must be finite"),
        ({"increment": 0.1}, ValueError, "increment and every belong together, got 0.1 and None"),
        ({"every": 5}, ValueError, "increment and every belong together, got 0.0 and 5"),
        ({"increment": 0.1, "every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"increment": "a", "every": 1}, TypeError, "increment must be a number, got str"),
        ({"increment": math.inf, "every": 1}, ValueError, "increment must be finite, got inf"),
        ({"stop": 1.5}, TypeError, "stop must be an int, got float"),
        ({"stop": -1}, ValueError, "stop must be at least 0, got -1"),
        ({"probes": 0}, ValueError, "probes must be at least 1, got 0"),
        ({"method": "hutch++"}, ValueError, "probes must be at least 3 for method='hutch"),
        ({"jac_loss_freq": 0.1}, TypeError, "unexpected keyword argument 'jac_loss_freq': did you mean 'frequency'?"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        JacobianPenalty(**{"strength": 1.0, **arguments})


@pytest.mark.parametrize("step", [-1, 1.0])
def test_bad_steps(step):
    with pytest.raises((TypeError, ValueError), match="step must be"):
        JacobianPenalty(1.0).strength_at(step)


WAYS = [("hutchinson", "vjp", 2), ("hutchinson", "jvp", 2), ("hutch++", "vjp", 5), ("exact", "vjp", 1)]


@pytest.mark.parametrize(("method", "mode", "probes"), WAYS)
def test_a_layer_gives_the_penalty_at_its_fixed_point_for_no_further_evaluation(method, mode, probes):
    cell, (z0, x) = Cell(), problem()
    deq = pydeq.DEQ(CallCounter(cell), rtol=1e-10)
    options = {"method": method, "mode": mode, "probes": probes}
    torch.manual_seed(0)
    _, solution = deq(z0, x, return_solution=True, penalty=JacobianPenalty(0.7, **options))
    assert deq.cell.calls == solution.nfe + 1  # the one that attaches the graph
    assert solution.penalty.shape == ()
    torch.manual_seed(0)
    expected = 0.7 * pydeq.jacobian_penalty(cell, solution.image, x, **options)
    assert_close(solution.penalty, expected, size=DIM, condition=20)
    (actual,) = torch.autograd.grad(solution.penalty, cell.weight)
    (wanted,) = torch.autograd.grad(expected, cell.weight)
    assert_close(actual, wanted, size=DIM, condition=20)


@pytest.mark.parametrize(
    "adjoint", [pydeq.Implicit(rtol=1e-12), pydeq.Phantom(steps=2), pydeq.Phantom(steps=2, form="neumann")], ids=str
)
def test_one_backward_pass_of_loss_and_penalty_adds_their_gradients(adjoint):
    deq, (z0, x) = layer(adjoint=adjoint), problem()
    weight = deq.cell.weight
    z, solution = deq(z0, x, return_solution=True, penalty=JacobianPenalty(0.5, method="exact"))
    (z.square().sum() + solution.penalty).backward()
    (expected,) = torch.autograd.grad(deq(z0, x).square().sum(), weight)
    (penalty,) = torch.autograd.grad(0.5 * pydeq.jacobian_penalty(deq.cell, solution.image, x, method="exact"), weight)
    assert penalty.abs().max() > 0
    assert_close(weight.grad, expected + penalty, size=DIM, condition=100)


def test_adjoints_without_a_linearization_cost_one_more_evaluation():
    deq, (z0, x) = pydeq.DEQ(CallCounter(Cell()), adjoint=pydeq.Phantom(steps=2)), problem()
    _, solution = deq(z0, x, return_solution=True, penalty=JacobianPenalty(1.0))
    assert deq.cell.calls == solution.nfe + 2 + 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_computed_for_watching(mode):
    deq, (z0, x) = layer().eval(), problem()
    rare = JacobianPenalty(2.0, frequency=1e-12, method="exact")
    with mode():
        _, solution = deq(z0, x.clone(), return_solution=True, penalty=rare)
        image = solution.image.clone()
    assert not solution.penalty.requires_grad
    expected = 2.0 * pydeq.jacobian_penalty(deq.cell, image, x, method="exact").detach()
    assert_close(solution.penalty, expected, size=DIM, condition=4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_inactive_calls_give_a_zero_and_cost_nothing(dtype):
    z0, x = problem(dtype)
    deq = pydeq.DEQ(CallCounter(Cell(dtype)))
    wide = torch.promote_types(dtype, torch.float32)
    for penalty in (JacobianPenalty(1.0, frequency=1e-12), JacobianPenalty(1.0, stop=3).at(3)):
        deq.cell.batches.clear()
        z, solution = deq(z0, x, return_solution=True, penalty=penalty)
        assert deq.cell.calls == solution.nfe + 1
        assert torch.equal(solution.penalty, torch.zeros((), dtype=wide))
        (z.sum() + solution.penalty).backward()
    _, solution = deq(z0, x, return_solution=True, penalty=JacobianPenalty(1.0))
    assert solution.penalty.dtype == wide
    assert solution.penalty > 0


@pytest.mark.filterwarnings("ignore:the forward solve of a pydeq.DEQ")
def test_frequency_decides_for_each_training_call():
    deq, (z0, x) = layer(max_steps=1), problem()
    torch.manual_seed(0)
    penalty, n = JacobianPenalty(1.0, frequency=0.25), 400
    active = sum(bool(deq(z0, x, return_solution=True, penalty=penalty)[1].penalty > 0) for _ in range(n))
    assert abs(active / n - 0.25) < 5 * math.sqrt(0.25 * 0.75 / n)


def test_without_a_penalty_there_is_none():
    deq, (z0, x) = layer(), problem()
    assert deq(z0, x, return_solution=True)[1].penalty is None


def test_tuple_states_and_autocast():
    cell = Cell(torch.float32)
    z0, x = problem(torch.float32)

    def pair(parts, x):
        y = cell(torch.cat(parts, 1), x)
        return y[:, :2], y[:, 2:]

    deq = pydeq.DEQ(pair)
    _, solution = deq((z0[:, :2], z0[:, 2:]), x, return_solution=True, penalty=JacobianPenalty(1.0, method="exact"))
    with torch.autocast("cpu", torch.bfloat16):
        _, half = deq((z0[:, :2], z0[:, 2:]), x, return_solution=True, penalty=JacobianPenalty(1.0, method="exact"))
    assert half.penalty.dtype == torch.float32
    torch.testing.assert_close(half.penalty, solution.penalty, rtol=0.05, atol=0)
    half.penalty.backward()
    assert cell.weight.grad.isfinite().all()


def test_what_a_layer_refuses():
    deq, (z0, x) = layer(), problem()
    with pytest.raises(ValueError, match="penalty is returned in the solution: it needs return_solution=True"):
        deq(z0, x, penalty=JacobianPenalty(1.0))
    with pytest.raises(TypeError, match=r"must be a penalty like pydeq\.JacobianPenalty\(0.5\), got 0.3"):
        deq(z0, x, return_solution=True, penalty=0.3)
    with pytest.raises(TypeError, match="got the class JacobianPenalty, not an instance"):
        deq(z0, x, return_solution=True, penalty=JacobianPenalty)
    for schedule in ({"stop": 5}, {"milestones": [(1, 1.0)]}, {"increment": 0.1, "every": 2}):
        with pytest.raises(ValueError, match=r"constant strength, got a schedule: pass penalty.at\(step\)"):
            deq(z0, x, return_solution=True, penalty=JacobianPenalty(1.0, **schedule))


def test_training_with_it_shrinks_the_jacobian():
    deq, (z0, x) = layer(), problem()
    optimizer = torch.optim.SGD(deq.parameters(), lr=0.5)
    penalties = []
    torch.manual_seed(0)
    for _ in range(40):
        z, solution = deq(z0, x, return_solution=True, penalty=JacobianPenalty(1.0))
        optimizer.zero_grad()
        (0.0 * z.sum() + solution.penalty).backward()
        optimizer.step()
        penalties.append(pydeq.jacobian_penalty(deq.cell, solution.image, x, method="exact").item())
    assert penalties[-1] < 0.5 * penalties[0]
