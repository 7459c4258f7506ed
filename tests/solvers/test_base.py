"""What solvers share: a history that a GPU has no room for is refused before the solve, not on the way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pydeq.ops.constants import CUDA_VECTORS
from pydeq.ops.reduction import Reduction
from pydeq.ops.termination import Rules
from pydeq.solvers import base
from pydeq.solvers.base import check_vectors

RULES = Rules(rtol=0.0, atol=0.0, eps=1e-7, freeze=True, stall=True)
GPU = torch.device("cuda")


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(base, "cuda_loaded", lambda: True)


def test_names_the_argument_and_both_ways_out(kernels):
    with pytest.raises(
        ValueError,
        match=r"on a GPU memory must be at most 511, or max_steps at most 513, got memory 700 and max_steps 900",
    ):
        check_vectors(GPU, RULES, 701, 900, memory=700)
    with pytest.raises(
        ValueError,
        match=r"on a GPU restart must be at most 512, or max_steps at most 513, got restart 700 and max_steps 900",
    ):
        check_vectors(GPU, RULES, 700, 900, restart=700)


def test_what_fits_and_what_needs_no_kernel_passes(kernels, monkeypatch):
    check_vectors(GPU, RULES, CUDA_VECTORS, 900, memory=CUDA_VECTORS - 1)
    check_vectors(torch.device("cpu"), RULES, 701, 900, memory=700)
    check_vectors(GPU, replace(RULES, reduction=Reduction()), 701, 900, memory=700)
    monkeypatch.setattr(base, "cuda_loaded", lambda: False)
    check_vectors(GPU, RULES, 701, 900, memory=700)
