"""Stored cells: what is in their files, their maps in every form, and their adjoint systems."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open

import pydeq
from benchmarks.problems import cells
from benchmarks.problems.base import Problem

NAMES = cells.names()


def _crop(name: str) -> cells.StoredCell:
    """The cell of a file in float64 on two small samples: a corner of an image, the start of a text, a few nodes."""
    stored = cells.load(name).to(torch.float64)
    injection, *rest = stored.context
    if name.startswith("mdeq"):
        shapes = tuple((shape[0], -(-4 // 2**i), -(-4 // 2**i)) for i, shape in enumerate(stored.shapes))
        return replace(stored, context=(injection[:2, :, :4, :4],), shapes=shapes)
    if name.startswith("transformer"):
        keys, values, positions, mask = rest
        few = (injection[:2, :5], keys[:2], values[:2], positions[:, -5:], mask[:5, :5])
        return replace(stored, context=few, shapes=((5, stored.shapes[0][1]),))
    weight, sources, targets, values = rest
    inside = (sources < 12) & (targets < 12)
    few = (injection[:, :12], weight, sources[inside], targets[inside], values[inside])
    return replace(stored, context=few, shapes=((12, stored.shapes[0][1]),))


def test_the_files_are_small():
    sizes = [path.stat().st_size for path in cells.WEIGHTS.iterdir()]
    assert len(sizes) == len(NAMES) >= 3
    assert sum(sizes) < 2_500_000


@pytest.mark.parametrize("name", NAMES)
def test_a_file_says_how_it_was_made_and_the_model_had_learned(name):
    with safe_open(cells.WEIGHTS / f"{name}.safetensors", "pt") as file:
        about = json.loads(file.metadata()["about"])
        assert all(file.get_tensor(key).isfinite().all() for key in file.keys())  # noqa: SIM118
    assert about["command"].startswith("python -m experiments train ")
    facts = about["facts"]
    assert facts["spectral_radius"] >= facts["spectral_radius_mean"] > 0
    assert facts["residual"] <= 1e-8  # of the whole batch in float64
    if "accuracy" in facts:
        assert facts["accuracy"] > 2 * facts["chance"]
    else:
        assert facts["perplexity"] < facts["chance"] / 4


@pytest.mark.parametrize("name", NAMES)
def test_a_cell_has_a_fixed_point(name):
    stored = _crop(name)
    solver = pydeq.Broyden(memory=100)
    solution = pydeq.fixed_point(stored, stored.start(), solver=solver, rtol=1e-9, max_steps=2000)
    distance = (stored(solution.value) - solution.value).flatten(1).norm(dim=1)
    assert solution.value.flatten(1).norm(dim=1).min() > 1.0
    assert (distance <= 1e-8 * solution.value.flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_adjoint_map_is_that_of_the_jacobian(name):
    stored = _crop(name)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(stored.start().shape, dtype=torch.float64, generator=generator)
    u, v = (torch.randn(z.shape, dtype=torch.float64, generator=generator) for _ in range(2))
    # Differences, since autograd is what is being tested.
    step, columns = 1e-6, []
    for place in torch.eye(z[0].numel(), dtype=torch.float64).view(-1, *z.shape[1:]):
        columns.append((stored(z + step * place) - stored(z - step * place)).flatten(1) / (2 * step))
    jacobian = torch.stack(columns, dim=2)  # [B, D, D]
    expected = torch.einsum("bij,bi->bj", jacobian, u.flatten(1)).view_as(z) + v
    torch.testing.assert_close(cells.adjoint_map(stored, z, v)(u), expected, rtol=1e-5, atol=1e-5)


def _forward(name: str) -> list[Problem]:
    """The kinds of problems of one cell."""
    found = [cells.forward_problem(name, 1e-5)]
    if name in cells.UNEVEN:
        found.append(cells.forward_problem(name, 1e-5, uneven=True))
    if name.startswith("ignn"):
        found.append(cells.nodes_problem(name, 1e-5))
    if name == cells.HALF:
        found.append(cells.forward_problem(name, cells.HALF_RTOL, dtype=torch.bfloat16))
    return found


def test_the_families_hold_all_problems_once():
    forward = cells.cells()
    keys = [problem.key for problem in forward]
    assert len(set(keys)) == len(keys)
    assert {problem.key for name in NAMES for problem in _forward(name)} <= set(keys)
    assert {problem.rtol for problem in forward} == {*cells.RTOLS, cells.HALF_RTOL}
    assert {problem.family for problem in forward} == {"cell"}
    assert all(problem.source for problem in forward)


@pytest.mark.parametrize("name", NAMES)
def test_a_map_its_formula_and_its_map_in_float64_are_one(name):
    for problem in _forward(name):
        assert problem.exact is not None
        z = torch.randn(problem.z0.shape, generator=torch.Generator().manual_seed(0)).double()
        z = problem.exact(problem.exact(z)).to(problem.z0.dtype)  # near the states that a solve goes through
        expected = problem.exact(z.double())
        error = ((problem.fn(z).double() - expected).norm() / expected.norm()).item()
        assert error < (2e-2 if z.dtype == torch.bfloat16 else 1e-5), problem.key
        assert (problem.formula is None) == name.startswith("mdeq")
        if problem.formula is not None:
            constants = {key: array.double() for key, array in problem.constants.items()}
            found = problem.formula(torch, z.double(), **constants)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("mdeq")])
def test_formulas_are_for_jax_too(name, jax):
    jnp = jax.numpy
    for problem in _forward(name):
        assert problem.formula is not None
        assert problem.exact is not None
        z = torch.randn(problem.z0.shape, generator=torch.Generator().manual_seed(0)).to(problem.z0.dtype).float()
        constants = {key: jnp.asarray(array.float().numpy()) for key, array in problem.constants.items()}
        found = torch.from_numpy(np.array(problem.formula(jnp, jnp.asarray(z.numpy()), **constants)))
        expected = problem.exact(z.double())
        assert ((found - expected).norm() / expected.norm()).item() < 1e-5, problem.key


@pytest.mark.parametrize("name", NAMES)
def test_an_adjoint_map_is_the_same_in_float64(name):
    problem = cells.adjoint_problem(name, 1e-5)
    assert problem.family == "adjoint"
    assert problem.exact is not None
    u = torch.randn(problem.z0.shape, generator=torch.Generator().manual_seed(1))
    expected = problem.exact(u.double())
    error = (problem.fn(u).double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    # Where f32 and f64 see a relu on different sides of 0, more than rounding would differ.
    assert error.max().item() < 1e-6


@pytest.mark.parametrize("name", cells.UNEVEN)
def test_few_samples_of_an_uneven_batch_are_hard(name):
    problem = cells.forward_problem(name, 1e-5, uneven=True)
    solution = pydeq.fixed_point(problem.fn, problem.z0, rtol=1e-5, max_steps=300)
    spent = solution.sample_nfe.sort().values
    assert solution.converged.all()
    assert spent[-4] >= 1.3 * spent[-5]
    assert problem.excess(solution.value).max().item() < 2
