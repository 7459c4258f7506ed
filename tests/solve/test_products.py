"""What a solve keeps for products with the Jacobian: nothing, unless its solver takes them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import pydeq
from pydeq.solve.solve import solve_keeping_workspace


@pytest.mark.parametrize("solver", [pydeq.Picard(), pydeq.Anderson(), pydeq.Broyden(), pydeq.Broyden(line_search=True)])
def test_a_kept_workspace_does_not_keep_the_map(solver):
    class Map:
        def __call__(self, z):
            return 0.5 * z + 1.0

    fn = Map()
    watched = weakref.ref(fn)
    kept = solve_keeping_workspace(fn, torch.zeros(2, 3), (), solver=solver)
    del fn
    gc.collect()
    assert kept is not None
    assert watched() is None
