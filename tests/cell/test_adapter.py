"""What a cell takes and returns beside its state: keywords, auxiliary results; and what a call of a layer may set."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import pydeq

FINE = {"rtol": 1e-12, "max_steps": 300}


def exact():
    return pydeq.Implicit(pydeq.Broyden(), **FINE)


class Attention(nn.Module):
    """A cell with a mask by name, and its attention map beside its state."""

    def __init__(self, aux=False):
        super().__init__()
        self.project = nn.Linear(4, 12).double()
        self.aux = aux

    def forward(self, z, x, attention_mask=None, scale=1.0):
        q, k, v = self.project(z).chunk(3, dim=-1)
        scores = scale * q @ k.mT
        if attention_mask is not None:
            scores = scores + attention_mask
        weights = scores.softmax(-1)
        z = x + 0.5 * weights @ v
        return (z, {"weights": weights}) if self.aux else z


def problem():
    x = torch.randn(3, 5, 4, dtype=torch.float64).requires_grad_()
    mask = torch.randn(3, 5, 5, dtype=torch.float64).requires_grad_()
    return torch.zeros(3, 5, 4, dtype=torch.float64), x, mask


# Keywords


@pytest.mark.parametrize(
    "adjoint",
    [exact(), pydeq.Phantom(steps=2), pydeq.Unrolled(), pydeq.Unrolled(checkpoint=True), pydeq.Reversible()],
    ids=repr,
)
def test_a_keyword_is_context_by_name(adjoint):
    (z0, x, mask), cell = problem(), Attention()
    deq = pydeq.DEQ(cell, adjoint=adjoint, rtol=1e-8)
    results = []
    for z in (deq(z0, x, mask), deq(z0, x, attention_mask=mask)):
        results.append([z.detach(), *torch.autograd.grad(z.pow(3).sum(), (x, mask, *cell.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_keywords_reach_solves_second_derivatives_transforms_and_penalties():
    (z0, x, mask), cell = problem(), Attention()
    a = pydeq.fixed_point(cell, z0, x, mask, 2.0)
    b = pydeq.fixed_point(cell, z0, x, attention_mask=mask, scale=2.0)
    assert torch.equal(a.image, b.image)

    deq = pydeq.DEQ(cell, adjoint=exact(), **FINE)
    seconds = []
    for z in (deq(z0, x, mask), deq(z0, x, attention_mask=mask)):
        (g,) = torch.autograd.grad(z.pow(3).sum(), mask, create_graph=True)
        seconds.append(torch.autograd.grad(g.square().sum(), (x, mask)))
    for one, other in zip(*seconds, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)

    a = torch.func.grad(lambda mask: deq(z0, x.detach(), mask).pow(3).sum())(mask.detach())
    b = torch.func.grad(lambda mask: deq(z0, x.detach(), attention_mask=mask).pow(3).sum())(mask.detach())
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)

    penalty = pydeq.JacobianPenalty(1.0, method="exact")
    a = deq(z0, x, mask, return_solution=True, penalty=penalty)[1].penalty
    b = deq(z0, x, attention_mask=mask, return_solution=True, penalty=penalty)[1].penalty
    torch.testing.assert_close(a, b)


def test_keywords_reach_a_compiled_cell():
    (z0, x, mask), cell = problem(), Attention()
    expected = pydeq.DEQ(cell, rtol=1e-8)(z0, x, mask)
    for deq in (
        pydeq.DEQ(torch.compile(cell, backend="eager"), rtol=1e-8),
        torch.compile(pydeq.DEQ(cell, rtol=1e-8), backend="eager"),
    ):
        torch.testing.assert_close(deq(z0, x, attention_mask=mask), expected)


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ("max_iter", "unexpected keyword argument 'max_iter': did you mean 'max_steps'?"),
        ("f_solver", "unexpected keyword argument 'f_solver': did you mean 'solver'?"),
        ("attn_mask", "unexpected keyword argument 'attn_mask': did you mean 'attention_mask'?"),
        ("z", "unexpected keyword argument 'z'"),
    ],
)
def test_a_keyword_that_nobody_takes_names_the_nearest(keyword, message):
    z0, x, _ = problem()
    cell = Attention()
    for call in (pydeq.DEQ(cell), lambda *a, **k: pydeq.fixed_point(cell, *a, **k)):
        with pytest.raises(TypeError, match=re.escape(message)):
            call(z0, x, **{keyword: 1})


def test_a_cell_that_takes_any_keyword_does_not_get_misspelt_ones():
    seen = {}

    def cell(z, x, **options):
        seen.update(options)
        return 0.5 * z + x

    z0, x, mask = problem()
    pydeq.DEQ(cell)(z0, x, positions=3, mask=mask)
    assert seen["positions"] == 3
    assert seen["mask"] is not None
    for keyword, meant in (("max_iter", "max_steps"), ("rtoll", "rtol"), ("max_step", "max_steps"), ("tol", "rtol")):
        with pytest.raises(TypeError, match=f"did you mean '{meant}'"):
            pydeq.DEQ(cell)(z0, x, **{keyword: 1})


def test_a_cell_that_names_a_keyword_gets_it_whatever_it_resembles():
    z = pydeq.fixed_point(lambda z, threshold, eps: 0.5 * z + threshold + eps, torch.zeros(2), threshold=1.0, eps=0.5)
    assert torch.allclose(z.image, torch.full((2,), 3.0), rtol=1e-2)


def test_a_name_of_the_layer_is_never_passed_on():
    """A cell that has an argument of such a name gets it by its place."""

    def cell(z, x, trace=0.0):
        return 0.5 * z + x + trace

    z0, x, _ = problem()
    solution = pydeq.DEQ(cell)(z0, x, trace=True, return_solution=True)[1]
    assert solution.trace is not None
    moved = pydeq.DEQ(cell, **FINE)(z0, x, 1.0) - pydeq.DEQ(cell, **FINE)(z0, x)
    torch.testing.assert_close(moved, torch.full_like(x, 2.0))


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ("adjoint", "DEQ.forward does not take adjoint: it is the layer's: DEQ(cell, adjoint=...)"),
        ("states_at", "DEQ.forward does not take states_at: it is the layer's"),
        ("eval_max_steps", "does not take eval_max_steps"),
        ("throw", "does not take throw: with return_solution=True, look at solution.converged"),
    ],
)
def test_what_a_call_does_not_take_has_its_advice(keyword, message):
    z0, x, _ = problem()
    with pytest.raises(TypeError, match=re.escape(message)):
        pydeq.DEQ(Attention())(z0, x, **{keyword: None})


def test_a_scripted_cell_takes_keywords():
    class Scripted(nn.Module):
        def forward(self, z: torch.Tensor, x: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
            return 0.5 * z + x + shift

    z0, x, _ = problem()
    with torch.no_grad():
        z = pydeq.DEQ(torch.jit.script(Scripted()), **FINE)(z0, x, shift=1.0)
    torch.testing.assert_close(z, 2 * (x.detach() + 1.0))


# Auxiliary results


def test_aux_comes_with_the_image(solver):
    z0, x, _ = problem()
    if isinstance(solver, pydeq.GMRES):

        def cell(z, x):
            return 0.5 * z + x, (z + 0.0, {"step": 1})
    else:
        attention = Attention()

        def cell(z, x):
            return attention(z, x), (z + 0.0, {"step": 1})

    for max_steps in (1, 2, 3, 50):
        solution = pydeq.fixed_point(cell, z0, x, solver=solver, has_aux=True, max_steps=max_steps)
        at, rest = solution.aux
        assert torch.equal(at, solution.value)
        assert rest == {"step": 1}


def test_aux_costs_no_evaluation_where_all_converge():
    calls = []

    def cell(z, x):
        calls.append(1)
        return torch.tanh(0.5 * z + x), len(calls)

    x = torch.randn(8, 3) * torch.logspace(-4, 0, 8)[:, None]
    solution = pydeq.fixed_point(cell, torch.zeros(8, 3), x, has_aux=True)
    assert solution.converged.all()
    assert len(calls) == solution.nfe == solution.aux


def test_aux_is_of_the_best_iterate_where_some_do_not_converge():
    calls = []

    def cell(z):  # its residual grows from the first evaluation on
        calls.append(z.clone())
        return 2.0 * z + 1.0, z.clone()

    solution = pydeq.fixed_point(cell, torch.ones(2, 3), has_aux=True, solver=pydeq.Picard(), max_steps=3)
    assert torch.equal(solution.aux, solution.value)
    assert len(calls) == solution.nfe + 1


@pytest.mark.parametrize(
    "adjoint", [exact(), pydeq.Phantom(steps=80), pydeq.Unrolled(), pydeq.Reversible(checkpoints=40)], ids=repr
)
def test_aux_of_a_layer_has_the_gradients_of_the_fixed_point(adjoint):
    (z0, x, _), cell = problem(), Attention(aux=True)
    deq = pydeq.DEQ(cell, solver=pydeq.Picard(), adjoint=adjoint, has_aux=True, rtol=1e-13, max_steps=100)
    z, solution = deq(z0, x, return_solution=True)
    assert solution.image.shape == z.shape
    weigh = torch.randn(3, 5, 5, dtype=torch.float64)
    inputs = (x, *cell.parameters())
    found = torch.autograd.grad((solution.aux["weights"] * weigh).sum(), inputs)
    iterate = z0
    for _ in range(100):
        iterate, aux = cell(iterate, x)
    expected = torch.autograd.grad((aux["weights"] * weigh).sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_aux_of_a_layer_without_gradients_is_free(mode):
    (z0, x, _), cell = problem(), Attention(aux=True)
    deq = pydeq.DEQ(cell, has_aux=True)
    calls = []
    cell.register_forward_hook(lambda *_: calls.append(1))
    with mode():
        _, solution = deq(z0, x, return_solution=True)
        assert len(calls) == solution.nfe
        torch.testing.assert_close(solution.aux["weights"], cell(solution.value, x)[1]["weights"])


def test_aux_goes_with_other_types_keywords_compaction_and_func():
    def cell(z, x, *, shift):
        return {"h": torch.tanh(0.5 * z["h"] + x + shift)}, z["h"].square()

    x = torch.randn(6, 3, dtype=torch.float64) * torch.logspace(-4, 0, 6, dtype=torch.float64)[:, None]
    z0 = {"h": torch.zeros(6, 3, dtype=torch.float64)}
    solution = pydeq.fixed_point(cell, z0, x, shift=0.1, has_aux=True, compact=True, batched_context=[True])
    torch.testing.assert_close(solution.aux, solution.value["h"].square())

    deq = pydeq.DEQ(cell, has_aux=True, adjoint=exact(), **FINE)

    def of(x):
        return deq(z0, x, shift=0.1, return_solution=True)[1].aux.sum()

    g = torch.func.grad(of)(x)
    leaf = x.clone().requires_grad_()
    of(leaf).backward()
    torch.testing.assert_close(g, leaf.grad, rtol=1e-8, atol=1e-10)


def test_a_cell_without_a_pair_is_refused():
    z0, x, _ = problem()
    with pytest.raises(TypeError, match=r"fn must return a pair \(state, aux\) with has_aux=True, got Tensor"):
        pydeq.fixed_point(Attention(), z0, x, has_aux=True)
    with pytest.raises(TypeError, match=r"fn must return a tensor like z0, got tuple: for pairs .* pass has_aux=True"):
        pydeq.fixed_point(Attention(aux=True), z0, x)


# What a call of a layer may set


def test_a_call_sets_what_a_solve_takes():
    (z0, x, _), cell = problem(), Attention()
    deq = pydeq.DEQ(cell, max_steps=30)
    with torch.no_grad():
        for options in (
            {"solver": pydeq.Broyden()},
            {"atol": 1e-2},
            {"trace": True},
            {"freeze": False},
            {"stall": False, "rtol": 0.0},
            {"compact": True, "batched_context": [True]},
            {"max_steps": np.int64(3), "rtol": np.float32(1e-6)},
        ):
            z, solution = deq(z0, x, return_solution=True, **options)
            expected = pydeq.fixed_point(cell, z0, x, **{"max_steps": 30} | options)
            assert torch.equal(z, expected.image)
            assert solution.nfe == expected.nfe
            assert (solution.trace is None) == (expected.trace is None)


def test_gradients_of_a_call_with_options_are_the_same():
    (z0, x, _), cell = problem(), Attention()
    deq = pydeq.DEQ(cell, adjoint=exact(), **FINE)
    (expected,) = torch.autograd.grad(deq(z0, x).pow(3).sum(), x)
    for options in ({"solver": pydeq.Broyden()}, {"freeze": False}, {"compact": True, "batched_context": [True]}):
        (g,) = torch.autograd.grad(deq(z0, x, **options).pow(3).sum(), x)
        torch.testing.assert_close(g, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("layer", "call", "error", "message"),
    [
        ({}, {"solver": "anderson"}, TypeError, "solver must be a solver like pydeq.Anderson(), got 'anderson'"),
        ({"adjoint": pydeq.Shine(), "solver": pydeq.Broyden()}, {"solver": pydeq.Picard()}, TypeError, "Shine needs"),
        ({}, {"trace": True}, ValueError, "trace is returned in the solution: it needs return_solution=True"),
        ({"adjoint": pydeq.Unrolled()}, {"freeze": False}, ValueError, "freeze=False does not work with Unrolled"),
        ({"adjoint": pydeq.Reversible()}, {"compact": True}, ValueError, "compact=True does not work with Reversible"),
        ({}, {"compact": True}, ValueError, "batched_context must say for each of the 1 context arguments"),
        ({}, {"batched_context": [True]}, ValueError, "batched_context belongs to compact=True"),
        ({}, {"atol": -1.0}, ValueError, "atol must be at least 0, got -1.0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(layer, call, error, message):
    z0, x, _ = problem()
    with pytest.raises(error, match=re.escape(message)):
        pydeq.DEQ(Attention(), **layer)(z0, x, **call)


@pytest.mark.filterwarnings("ignore:the samples of a batch depend on each other through BatchNorm")
def test_compaction_refuses_what_it_cannot_gather():
    z0, x, mask = problem()
    with pytest.raises(ValueError, match="compact=True cannot tell whether attention_mask carries the batch"):
        pydeq.DEQ(Attention())(z0, x, attention_mask=mask, compact=True, batched_context=[True])
    with pytest.raises(ValueError, match="BatchNorm1d in training mode"):
        pydeq.DEQ(nn.BatchNorm1d(5).double())(z0, compact=True, batched_context=[])
    cell = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)).double()
    with pytest.raises(ValueError, match="the random numbers that freeze_rng=True replays for 1"):
        pydeq.DEQ(cell, freeze_rng=True)(z0, compact=True)
