"""Tests of the list of cells itself: each cell is what its case says."""

import pytest
import torch
from cells import CELLS, Case
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

pytestmark = pytest.mark.filterwarnings("ignore:the samples of a batch depend on each other")

each = pytest.mark.parametrize("case", CELLS, ids=str)


def flat(case: Case):
    """The cell as a map of one tensor [B, D], the initial state, and the context."""
    cell, z0, context = case.build()
    parts, spec = tree_flatten(z0)
    sizes = [part[0].numel() for part in parts]

    def fn(z, *context):
        split = [p.reshape(part.shape) for p, part in zip(z.split(sizes, dim=1), parts, strict=True)]
        y = cell(tree_unflatten(split, spec), *context)
        y = y[0] if case.has_aux else y
        assert tree_flatten(y)[1] == spec
        return torch.cat([part.flatten(1) for part in tree_leaves(y)], dim=1)

    return fn, torch.cat([part.flatten(1) for part in parts], dim=1), context


def test_names_are_unique():
    assert len({case.name for case in CELLS}) == len(CELLS)


@each
@torch.no_grad()
def test_a_cell_is_the_same_for_the_same_seed(case):
    (fn, z0, context), (again, _, _) = flat(case), flat(case)
    assert torch.equal(fn(z0, *context), again(z0, *context))


@each
@torch.no_grad()
def test_samples_are_as_independent_as_the_case_says(case):
    fn, z0, context = flat(case)
    z = torch.randn(z0.shape, dtype=z0.dtype)
    moved = z.clone()
    moved[0] += 1.0
    same = torch.equal(fn(z, *context)[1:], fn(moved, *context)[1:])
    assert same is not case.couples
