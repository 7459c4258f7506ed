"""Tensors and tuples as one flat state, and what is refused."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_map

import pydeq
from pydeq.state import layout_of
from pydeq.testing import assert_identical, softsign_map


def half(z):
    return 0.5 * z


SHAPES = [(3,), (3, 1), (3, 7), (3, 2, 4, 5), (3, 0), (1, 2), (3, 2, 0)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_tensor_flattens_and_comes_back(shape):
    z = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    layout = layout_of(z)
    flat = layout.flatten(z)
    assert flat.shape == (shape[0], layout.size)
    assert flat.is_contiguous()
    assert torch.equal(layout.view(flat), z)


@pytest.mark.parametrize("shapes", [[(3, 2)], [(3, 2), (3,)], [(3,), (3, 0), (3, 2, 2)]], ids=str)
def test_a_tuple_flattens_and_comes_back(shapes):
    z = tuple(torch.full(shape, float(i)) for i, shape in enumerate(shapes))
    layout = layout_of(z)
    parts = layout.view(layout.flatten(z))
    assert isinstance(parts, tuple)
    assert [part.shape for part in parts] == [part.shape for part in z]
    assert all(torch.equal(part, other) for part, other in zip(parts, z, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_states_of_any_shape_are_solved(solver, shape):
    solution = pydeq.fixed_point(lambda z: 0.5 * z + 1.0, torch.zeros(shape), solver=solver)
    assert solution.converged.all()
    assert solution.value.shape == solution.image.shape == shape
    assert torch.allclose(solution.image, torch.full(shape, 2.0), rtol=2e-3)


def test_an_empty_state_has_converged_at_once(solver):
    solution = pydeq.fixed_point(half, torch.ones(3, 0), solver=solver)
    assert solution.nfe == 1
    assert torch.equal(solution.residual, torch.zeros(3))


@pytest.mark.parametrize(
    "z0", [torch.ones(0), torch.ones(0, 3), (torch.ones(0, 3),), (torch.ones(0, 3), torch.ones(0, 2, 2))], ids=str
)
def test_an_empty_batch_returns_at_once(solver, z0):
    def fn(z):
        raise AssertionError("fn was called")

    solution = pydeq.fixed_point(fn, z0, solver=solver, trace=True, throw=True)
    assert solution.nfe == 0
    assert solution.status.shape == solution.residual.shape == solution.sample_nfe.shape == (0,)
    assert solution.trace is not None
    assert solution.trace.shape == (0, 0)
    expected = z0 if isinstance(z0, tuple) else (z0,)
    for state in (solution.value, solution.image):
        assert isinstance(state, tuple) == isinstance(z0, tuple)
        parts = state if isinstance(state, tuple) else (state,)
        assert [part.shape for part in parts] == [part.shape for part in expected]
    assert "0 of 0" in repr(solution)


def test_a_tuple_of_one_stays_a_tuple(solver):
    seen = []

    def fn(z):
        seen.append(type(z))
        return (0.5 * z[0] + 1.0,)

    solution = pydeq.fixed_point(fn, (torch.zeros(2, 3),), solver=solver)
    assert set(seen) == {tuple}
    assert isinstance(solution.value, tuple)
    assert isinstance(solution.image, tuple)
    assert torch.allclose(solution.image[0], torch.full((2, 3), 2.0), rtol=2e-3)


@given(
    widths=st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any),
    seed=st.integers(0, 100),
    batch=st.integers(1, 4),
)
def test_a_tuple_is_its_concatenated_tensor(solver, widths, seed, batch):
    problem = softsign_map(0.9, sum(widths), batch=batch, seed=seed)

    def fn(parts, *context):
        return problem.fn(torch.cat(parts, dim=1), *context).split(widths, dim=1)

    options = {"solver": solver, "rtol": 1e-5, "max_steps": 25, "trace": True}
    one = problem.solve(**options)
    other = pydeq.fixed_point(fn, problem.z0.split(widths, dim=1), *problem.context, **options)
    assert one.nfe == other.nfe
    assert torch.equal(one.trace.nan_to_num(-1.0), other.trace.nan_to_num(-1.0))
    other.value, other.image = torch.cat(other.value, dim=1), torch.cat(other.image, dim=1)
    assert_identical(one, other)


LAYOUTS = {
    "contiguous": lambda z: z,
    "transposed": lambda z: z.transpose(1, 3).contiguous().transpose(1, 3),
    "channels last": lambda z: z.to(memory_format=torch.channels_last),
    "expanded": lambda z: z[:1].expand(z.shape),
    "strided": lambda z: torch.stack([z, z], dim=-1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_z0_does_not_matter(solver, layout):
    generator = torch.Generator().manual_seed(0)
    z0 = torch.randn(3, 4, 5, 6, generator=generator)
    z0 = z0[:1].expand(z0.shape).clone()
    kept = z0.clone()
    expected = pydeq.fixed_point(lambda z: 0.5 * z + 1.0, z0, solver=solver)
    solution = pydeq.fixed_point(lambda z: 0.5 * z + 1.0, LAYOUTS[layout](z0), solver=solver)
    assert torch.equal(solution.value, expected.value)
    assert torch.equal(z0, kept)


def test_z0_is_not_written_to(solver):
    z0 = torch.zeros(3, 4)
    solution = pydeq.fixed_point(lambda z: 0.5 * z + 1.0, z0, solver=solver)
    solution.value.fill_(7.0)
    assert not z0.any()


@pytest.mark.parametrize(
    ("z0", "error", "message"),
    [
        (torch.tensor(1.0), ValueError, "z0 must have a batch dimension, got a 0-d tensor: (B,) is B scalar states"),
        ((), ValueError, "z0 must have at least one tensor, got an empty tuple"),
        ({}, ValueError, "z0 must have at least one tensor, got an empty dict"),
        (1.0, TypeError, "z0 must be a tensor or tensors in tuples, lists, dicts and namedtuples, got float"),
        (np.ones((2, 3)), TypeError, "namedtuples, got ndarray: convert it by torch.as_tensor"),
        (object(), TypeError, "got object: register a type of your own by torch.export.register_dataclass"),
        ([torch.ones(2), 1.0], TypeError, "z0[1] must be a tensor, got float"),
        ({"h": (torch.ones(2), None)}, TypeError, "z0['h'][1] must be a tensor, got NoneType"),
        (
            {"h": torch.ones(2), "c": torch.ones(3)},
            ValueError,
            "z0['c'] must have the batch size of z0['h'], 2, got 3",
        ),
        (
            [torch.ones(2, dtype=torch.complex64), torch.ones(2).double()],
            ValueError,
            "z0[1] must have the dtype of z0[0], torch.float32, got torch.float64",
        ),
        ((torch.ones(2), 1.0), TypeError, "z0[1] must be a tensor, got float"),
        ((torch.ones(2), torch.tensor(1.0)), ValueError, "z0[1] must have a batch dimension, got a 0-d tensor"),
        (
            (torch.ones(2, 3), torch.ones(4, 3)),
            ValueError,
            "z0[1] must have the batch size of z0[0], 2, got 4",
        ),
        (
            (torch.ones(2), torch.ones(2).double()),
            ValueError,
            "z0[1] must have the dtype of z0[0], torch.float32, got torch.float64",
        ),
        (
            (torch.ones(2), torch.ones(2, device="meta")),
            ValueError,
            "z0[1] must have the device of z0[0], cpu, got meta",
        ),
        (torch.ones(2, dtype=torch.int64), ValueError, "or complex, got torch.int64: convert it, as by .float()"),
        (torch.ones(2, dtype=torch.bool), ValueError, "got torch.bool"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_initial_states(z0, error, message):
    with pytest.raises(error, match=re.escape(message)):
        pydeq.fixed_point(half, z0)


@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        (lambda z: z[:, :1], ValueError, "fn must return the shape of z0, expected (2, 3), got (2, 1)"),
        (lambda z: z[:1], ValueError, "fn must return the shape of z0, expected (2, 3), got (1, 3)"),
        (lambda z: z[None], ValueError, "expected (2, 3), got (1, 2, 3)"),
        (lambda z: z.double(), ValueError, "fn must return the dtype of z0, torch.float32, got torch.float64"),
        (lambda z: z.bfloat16(), ValueError, "got torch.bfloat16: cast its result, or z0"),
        (lambda z: z.to("meta"), ValueError, "fn must return a tensor on the device of z0, cpu, got meta"),
        (lambda z: None, TypeError, "fn must return a tensor like z0, got NoneType"),
        (lambda z: (z,), TypeError, "fn must return a tensor like z0, got tuple"),
        (lambda z: z.numpy(), TypeError, "fn must return a tensor like z0, got ndarray"),
    ],
    ids=range(9),
)
def test_refuses_what_fn_returned(solver, fn, error, message):
    with pytest.raises(error, match=re.escape(message)):
        pydeq.fixed_point(fn, torch.ones(2, 3), solver=solver)


@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        (lambda z: z[0], TypeError, "fn must return a tuple of 2 tensors like z0, got Tensor"),
        (lambda z: z[:1], ValueError, "fn must return a tuple of 2 tensors like z0, got 1"),
        (lambda z: (z[0], None), TypeError, "fn must return a tensor like z0[1], got NoneType"),
        (lambda z: z[::-1], ValueError, "fn must return the shape of z0[0], expected (2, 3), got (2,)"),
        (lambda z: (z[0], z[1].double()), ValueError, "fn must return the dtype of z0[1], torch.float32"),
    ],
    ids=range(5),
)
def test_refuses_what_fn_returned_for_a_tuple(fn, error, message):
    with pytest.raises(error, match=re.escape(message)):
        pydeq.fixed_point(fn, (torch.ones(2, 3), torch.ones(2)))


@pytest.mark.parametrize(
    ("z0", "message"),
    [
        (torch.zeros(4), "got (8, 4): if z0 lacks the batch dimension, which comes first, make it (8, 4)"),
        (torch.zeros(1, 4), "got (8, 4): if z0 is to have the batch of the context, make it (8, 4)"),
        ((torch.zeros(4),), "got (8, 4): if z0 lacks the batch dimension, which comes first, make it (8, 4)"),
        ({"h": torch.zeros(4)}, "got (8, 4): if it lacks the batch dimension, which comes first, give it one"),
        ({"h": torch.zeros(1, 4)}, "got (8, 4): if z0 is to have the batch of the context, make it (8, 4)"),
    ],
    ids=range(5),
)
def test_a_forgotten_batch_is_named(z0, message):
    x = torch.ones(8, 4)
    for solve in (pydeq.fixed_point, lambda fn, z0: pydeq.DEQ(fn)(z0)):
        with pytest.raises(ValueError, match=re.escape(message)):
            solve(lambda z: tree_map(lambda part: 0.5 * part + x, z), z0)


def test_a_wrong_shape_that_is_not_about_the_batch_has_no_hint():
    for fn in (lambda z: z[:, :1], lambda z: z[:1], lambda z: z.T):
        with pytest.raises(ValueError, match=r"got \(\d, \d\)$"):
            pydeq.fixed_point(fn, torch.ones(2, 3))


def test_a_list_is_as_good_as_a_tuple_from_fn(solver):
    solution = pydeq.fixed_point(lambda z: [0.5 * z[0], 0.5 * z[1]], (torch.ones(2), torch.ones(2, 3)), solver=solver)
    assert isinstance(solution.image, tuple)


def test_fn_may_change_its_mind_only_into_an_error(solver):
    """A wrong return value is found at whichever call it comes."""
    calls = iter([half, half, partial(torch.sum, dim=1)])
    with pytest.raises(ValueError, match=re.escape("fn must return the shape of z0, expected (2, 3), got (2,)")):
        pydeq.fixed_point(lambda z: next(calls)(z), torch.ones(2, 3), solver=solver, rtol=0.0)
