"""States of any type: the cell gets what the user gave, and results come back in it, with the bits of a tuple's."""

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn

import pydeq
from pydeq.cell.adapter import canonical
from pydeq.cell.pytree import structure_of


class Pair(NamedTuple):
    hidden: torch.Tensor
    flow: torch.Tensor


@dataclass
class Registered:
    hidden: torch.Tensor
    flow: torch.Tensor


torch.export.register_dataclass(Registered)

# How a state of two parts is made of them, and taken apart.
TYPES = {
    "namedtuple": (Pair, tuple),
    "dict": (lambda a, b: {"a": a, "b": b}, lambda z: (z["a"], z["b"])),
    "OrderedDict": (lambda a, b: OrderedDict(a=a, b=b), lambda z: (z["a"], z["b"])),
    "list": (lambda a, b: [a, b], tuple),
    "nested": (lambda a, b: {"x": [a], "y": (Pair(b, b),)}, lambda z: (z["x"][0], z["y"][0].hidden)),
    "tuple of one": (lambda a, b: ((a, b),), lambda z: z[0]),
    "dataclass": (Registered, lambda z: (z.hidden, z.flow)),
}

SHAPES = (3, 5), (3, 2, 2)
FINE = {"rtol": 1e-12, "max_steps": 300}


class Tuple(nn.Module):
    """A cell of two parts that depend on each other."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(9, 5).double(), nn.Linear(9, 4).double()

    def forward(self, z, x):
        both = torch.cat([z[0], z[1].flatten(1)], dim=1)
        return torch.tanh(self.first(both) + x), 0.8 * torch.tanh(self.second(both)).unflatten(1, (2, 2))


class Typed(nn.Module):
    """The same, of another type of state."""

    def __init__(self, cell, kind):
        super().__init__()
        self.cell = cell
        self.make, self.read = TYPES[kind]
        self.type = type(self.make(*(torch.zeros(1), torch.zeros(1))))

    def forward(self, z, x):
        assert type(z) is self.type
        return self.make(*self.cell(self.read(z), x))


@pytest.fixture
def x():
    return torch.randn(3, 5, dtype=torch.float64).requires_grad_()


@pytest.fixture(params=TYPES)
def kind(request):
    return request.param


def start(kind=None):
    parts = tuple(torch.zeros(shape, dtype=torch.float64) for shape in SHAPES)
    return parts if kind is None else TYPES[kind][0](*parts)


def same(one, other, read):
    return all(torch.equal(a, b) for a, b in zip(read(one), other, strict=True))


def test_a_solve_gives_what_a_tuple_gives(kind, solver, x):
    cell, (_, read) = Tuple(), TYPES[kind]
    typed, z0 = Typed(cell, kind), start(kind)
    a = pydeq.fixed_point(cell, start(), x, solver=solver, trace=True, states_at=[2, 4])
    b = pydeq.fixed_point(typed, z0, x, solver=solver, trace=True, states_at=[2, 4])
    if kind != "nested":  # there one part is twice in the norm
        assert same(b.value, a.value, read)
        assert same(b.image, a.image, read)
        torch.testing.assert_close(a.trace, b.trace, rtol=0.0, atol=0.0, equal_nan=True)
        assert torch.equal(a.residual, b.residual)
        assert all(same(one, other, read) for one, other in zip(b.states, a.states, strict=True))
    assert b.converged.all()
    for state in (b.value, b.image, *b.states):
        assert type(state) is type(z0)


ADJOINTS = (
    pydeq.Implicit(pydeq.Broyden(), **FINE),
    pydeq.Phantom(steps=3, damping=0.8),
    pydeq.Phantom(steps=3, form="neumann"),
    pydeq.Shine(refine_steps=2),
    pydeq.Unrolled(),
    pydeq.Unrolled(checkpoint=True),
    pydeq.Reversible(),
)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_every_adjoint_gives_what_it_gives_for_a_tuple(adjoint, kind, x):
    solver = pydeq.Broyden() if isinstance(adjoint, pydeq.Shine) else pydeq.Anderson()
    cell, (_, read) = Tuple(), TYPES[kind]
    gradients, solutions = [], []
    for of, z0 in ((cell, start()), (Typed(cell, kind), start(kind))):
        deq = pydeq.DEQ(of, solver=solver, adjoint=adjoint, states_at=[2], **FINE)
        z, solution = deq(z0, x, return_solution=True)
        assert type(z) is type(z0)
        assert [type(state) for state in solution.states] == [type(z0)] * 2
        first, second = z if of is cell else read(z)
        loss = first.pow(3).sum() + (second * torch.arange(12.0).view(3, 2, 2)).sum()
        gradients.append(torch.autograd.grad(loss, [x, *cell.parameters()]))
        solutions.append(solution)
    exact = kind != "nested" and not isinstance(adjoint, pydeq.Unrolled)
    close = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-4, "atol": 1e-6}
    if kind == "nested" and isinstance(adjoint, pydeq.Shine):
        return  # the memory of another state is another approximation
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(b, a, **close)
    if isinstance(adjoint, pydeq.Implicit):
        backward = solutions[1].backward
        assert type(backward.value) is type(start(kind))
        if exact:
            assert same(backward.image, solutions[0].backward.image, read)


def test_second_derivatives_reach_through_the_type(kind, x):
    cell, (_, read) = Tuple(), TYPES[kind]
    seconds = []
    for of, z0 in ((cell, start()), (Typed(cell, kind), start(kind))):
        deq = pydeq.DEQ(of, adjoint=ADJOINTS[0], **FINE)
        z = deq(z0, x)
        first, _ = z if of is cell else read(z)
        (g,) = torch.autograd.grad(first.pow(3).sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(g.square().sum(), [x, *cell.parameters()], allow_unused=True))
    for a, b in zip(*seconds, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-9)


def test_torch_func_reaches_through_the_type(kind, x):
    cell, (_, read) = Tuple(), TYPES[kind]
    typed = pydeq.DEQ(Typed(cell, kind), adjoint=ADJOINTS[0], **FINE)
    plain = pydeq.DEQ(cell, adjoint=ADJOINTS[0], **FINE)
    x = x.detach()
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        a = transform(lambda x: plain(start(), x)[1].sum())(x)
        b = transform(lambda x: read(typed(start(kind), x))[1].sum())(x)
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-10)
    a = torch.func.vmap(lambda x: plain(start(), x)[0])(torch.stack([x, 2 * x]))
    b = torch.func.vmap(lambda x: read(typed(start(kind), x))[0])(torch.stack([x, 2 * x]))
    torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-10)


def test_the_jacobian_is_that_of_the_parts(kind, x):
    if kind == "nested":  # one part is there twice
        return
    cell, (make, _) = Tuple(), TYPES[kind]
    z, typed = tuple(torch.randn(shape, dtype=torch.float64) for shape in SHAPES), Typed(cell, kind)
    for function in (
        lambda fn, z: pydeq.jacobian_penalty(fn, z, x, probes=2, generator=torch.Generator().manual_seed(1)),
        lambda fn, z: pydeq.frobenius_norm_squared(fn, z, x, method="exact"),
        lambda fn, z: pydeq.spectral_radius(fn, z, x, method="arnoldi", generator=torch.Generator().manual_seed(1)),
        lambda fn, z: pydeq.jacobian_spectrum(fn, z, x).abs(),
        lambda fn, z: pydeq.JacobianPenalty(2.0, method="exact").evaluate(fn, z, (x,)),
    ):
        torch.testing.assert_close(function(typed, make(*z)), function(cell, z), rtol=1e-12, atol=1e-12)


def test_a_penalty_in_a_layer(kind, x):
    cell = Typed(Tuple(), kind)
    deq = pydeq.DEQ(cell, **FINE)
    penalty = pydeq.JacobianPenalty(1.0, method="exact")
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            z, solution = deq(start(kind), x, return_solution=True, penalty=penalty)
            expected = pydeq.jacobian_penalty(cell, z, x, method="exact")
            torch.testing.assert_close(solution.penalty, expected, rtol=1e-6, atol=1e-9)


def test_compaction_gathers_the_parts(kind, x):
    typed, (_, read) = Typed(Tuple(), kind), TYPES[kind]
    x = x.detach() * torch.tensor([[1e-3], [1.0], [3.0]])
    whole = pydeq.fixed_point(typed, start(kind), x)
    part = pydeq.fixed_point(typed, start(kind), x, compact=True, batched_context=[True])
    for a, b in zip(read(whole.image), read(part.image), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_tuple_may_come_back_in_place_of_a_namedtuple_or_a_list(x):
    cell = Tuple()
    for kind in ("namedtuple", "list"):
        solution = pydeq.fixed_point(cell, start(kind), x)
        assert type(solution.image) is type(start(kind))
        assert same(solution.image, pydeq.fixed_point(cell, start(), x).image, tuple)


def test_the_keys_of_a_dict_may_come_back_in_another_order(x):
    cell = Tuple()

    def fn(z, x):
        a, b = cell((z["a"], z["b"]), x)
        return {"b": b, "a": a}

    z = pydeq.fixed_point(fn, start("dict"), x).image
    assert list(z) == ["a", "b"]
    assert same(z, pydeq.fixed_point(cell, start(), x).image, lambda z: (z["a"], z["b"]))


@pytest.mark.parametrize(
    ("kind", "result", "error", "message"),
    [
        ("dict", lambda a, b: (a, b), TypeError, "fn must return a dict like z0, got tuple"),
        ("dict", lambda a, b: {"a": a}, ValueError, "fn must return the keys of z0, ['a', 'b'], got ['a']"),
        ("dict", lambda a, b: {"a": a, "b": None}, TypeError, "fn must return a tensor like z0['b'], got NoneType"),
        ("list", lambda a, b: {"a": a}, TypeError, "fn must return a list like z0, got dict"),
        ("list", lambda a, b: [a], ValueError, "fn must return a list of 2 like z0, got 1"),
        ("namedtuple", lambda a, b: Pair(a, b[:, 0]), ValueError, "z0.flow, expected (batch, 2, 2), got (3, 2)"),
        ("nested", lambda a, b: {"x": [a], "y": ((b,),)}, ValueError, "a Pair of 2 like z0['y'][0], got 1"),
        ("nested", lambda a, b: {"x": a, "y": ()}, TypeError, "fn must return a list like z0['x'], got Tensor"),
        ("dataclass", lambda a, b: (a, b), TypeError, "fn must return a Registered like z0, got tuple"),
        ("dict", lambda a, b: {"a": a, "b": torch.complex(b, b)}, ValueError, "the dtype of z0['b'], torch.float64"),
    ],
)
def test_other_results_are_refused_by_name(kind, result, error, message):
    read = TYPES[kind][1]
    with pytest.raises(error, match=re.escape(message)):
        pydeq.fixed_point(lambda z: result(*read(z)), start(kind))


# Complex states


def complex_cell(z, a, x):
    return torch.einsum("ij,bj->bi", a, z) / (1 + z.abs().square()) + x


def complex_problem():
    a = 0.25 * torch.randn(4, 4, dtype=torch.complex128)
    x = torch.randn(3, 4, dtype=torch.complex128)
    return a.requires_grad_(), x.requires_grad_(), torch.zeros(3, 4, dtype=torch.complex128)


def test_a_complex_state_is_solved(solver):
    a, x, z0 = complex_problem()
    solution = pydeq.fixed_point(complex_cell, z0, a, x, solver=solver, rtol=1e-10, max_steps=200)
    z = z0
    for _ in range(300):
        z = complex_cell(z, a, x)
    if isinstance(solver, pydeq.GMRES):  # of affine maps
        solution = pydeq.fixed_point(lambda z: z @ a.T + x, z0, solver=solver, rtol=1e-10, max_steps=200)
        z = torch.linalg.solve(torch.eye(4) - a, x.T).T
    assert solution.image.dtype == torch.complex128
    torch.testing.assert_close(solution.image, z.detach(), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "adjoint",
    [
        ADJOINTS[0],
        pydeq.Phantom(steps=60, form="neumann"),
        pydeq.Unrolled(),
        pydeq.Unrolled(checkpoint=True),
        pydeq.Reversible(checkpoints=40),
    ],
    ids=repr,
)
def test_gradients_of_complex_states_are_those_of_iterations(adjoint):
    a, x, z0 = complex_problem()
    deq = pydeq.DEQ(complex_cell, adjoint=adjoint, solver=pydeq.Picard(), rtol=1e-13, max_steps=400)
    z = z0
    for _ in range(300):
        z = complex_cell(z, a, x)
    expected = torch.autograd.grad((z.real.pow(3) + z.imag * z.real).sum(), (a, x))
    z = deq(z0, a, x)
    found = torch.autograd.grad((z.real.pow(3) + z.imag * z.real).sum(), (a, x))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_real_and_complex_parts_mix():
    def cell(z, x):
        return {"r": torch.tanh(z["c"].imag + x), "c": 0.3 * torch.complex(z["r"], x).conj() * z["c"].exp()}

    x = torch.randn(2, 3, dtype=torch.float64)
    z0 = {"r": torch.zeros(2, 3, dtype=torch.float64), "c": torch.zeros(2, 3, dtype=torch.complex128)}
    z = pydeq.fixed_point(cell, z0, x, rtol=1e-10, max_steps=100).image
    again = cell(z, x)
    for key, part in z.items():
        assert part.dtype == z0[key].dtype
        torch.testing.assert_close(part, again[key], rtol=1e-8, atol=1e-9)


def test_a_real_result_of_a_complex_state_is_refused():
    with pytest.raises(ValueError, match=r"fn must return the dtype of z0, torch.complex128, got torch.float64"):
        pydeq.fixed_point(lambda z: z.abs(), complex_problem()[2])


# What is taken as it is


def test_tensors_and_tuples_of_them_cost_nothing():
    def fn(z):
        return z

    for z in (torch.zeros(2, 3), (torch.zeros(2, 3), torch.zeros(2))):
        assert structure_of(z) is None
        assert canonical(fn, z) == (fn, z)


def test_an_empty_batch_comes_back_in_its_type(kind):
    z0 = TYPES[kind][0](torch.zeros(0, 5), torch.zeros(0, 2, 2))
    assert type(pydeq.fixed_point(lambda z: z, z0).value) is type(z0)
