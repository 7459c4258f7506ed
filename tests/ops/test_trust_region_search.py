"""The kernel of the trust-region search against its reference: single steps, and whole solves."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import pydeq
from pydeq.ops.constants import (
    RUNNING,
    TRUST_ENTRIES,
    TRUST_PATIENCE,
    TRUST_TRIALS,
    Counter,
    Progress,
    Scalar,
    Status,
    TrustFlag,
    TrustStage,
)
from pydeq.ops.trust_region_search import Evaluated, TrustRegionSearch
from pydeq.testing import softsign_map

pytestmark = pytest.mark.kernels
BATCH = 64


def searches(entries, dtype, generator):
    """A search in the middle of a solve: samples in every state that it may be in; and which matrices are singular."""
    search = TrustRegionSearch(torch.from_numpy(generator.standard_normal((BATCH, entries))), dtype)
    assert search._kernel is not None
    rounded = torch.from_numpy(generator.standard_normal((3, BATCH, entries))).to(dtype).double().numpy()
    search.base[:], search.image[:] = rounded[0], rounded[1]
    search.residual[:] = search.image - search.base
    search.size[:] = np.linalg.norm(search.residual, axis=1)
    system = generator.standard_normal((BATCH, entries, entries))
    kind = generator.integers(0, 6, BATCH)
    system[kind == 1] *= 1e-3
    system[kind == 2, :, 0] = system[kind == 2, :, -1]  # singular, from two entries on
    system[kind == 3] = 0.0
    system[kind == 4, 0, 0] = np.inf
    system[kind == 5] *= 10.0 ** (-200.0 * generator.integers(0, 2, (BATCH, 1, entries)))[kind == 5]
    search.system[:] = system
    search.radius[:] = search.size * 10.0 ** generator.uniform(-3, 3, BATCH)
    search.reached[:] = search.radius * generator.uniform(0.1, 1.1, BATCH)
    search.promised[:] = generator.uniform(0.0, 1.0, BATCH)
    search.mark[:] = np.where(generator.random(BATCH) < 0.2, np.inf, search.size * generator.uniform(0.5, 3.0, BATCH))
    search.rejected[:] = np.where(generator.random(BATCH) < 0.3, TRUST_TRIALS, generator.integers(0, 5, BATCH))
    search.idle[:] = generator.integers(0, 2 * TRUST_PATIENCE, BATCH)
    for name in (TrustFlag.EXACT, TrustFlag.SEARCHING, TrustFlag.UPDATED, TrustFlag.CAREFUL):
        search.flags[name] = generator.random(BATCH) < 0.6
    # The first sample accepts a trial, and updates a matrix from which no trial point comes.
    search.system[0, 0, 0], search.promised[0] = np.inf, 0.0
    search.flags[TrustFlag.SEARCHING, 0], search.flags[TrustFlag.CAREFUL, 0] = True, False
    return search, (kind == 2) | (kind == 3) | (kind == 5)  # an update of zero is of rank 1


def evaluated(search, generator, freeze, left):
    """A step's arguments: new points, some of which are better than the accepted ones, and some far worse."""
    entries = search.base.shape[1]
    z = search.base + generator.standard_normal((BATCH, entries))
    factor = 10.0 ** generator.uniform(-2, 1, (BATCH, 1))
    f = z + factor * search.size[:, None] * generator.standard_normal((BATCH, entries)) / entries**0.5
    f[generator.random(BATCH) < 0.05] = np.nan
    f[0] = z[0] + 1e-3 * search.residual[0]
    points = torch.from_numpy(np.stack([z, f, *generator.standard_normal((2, BATCH, entries))]))
    points = points.to(search.dtype).double()
    scalars = torch.zeros(BATCH, len(Scalar), dtype=torch.float64)
    found = (points[1] - points[0]).norm(dim=1)
    scalars[:, Scalar.RESIDUAL] = torch.where(found.isnan(), torch.inf, found)
    counters = torch.zeros(BATCH, len(Counter), dtype=torch.int32)
    statuses = [RUNNING] * 8 + [int(Status.DIVERGED), int(Status.CONVERGED)]
    counters[:, Counter.STATUS] = torch.from_numpy(generator.choice(statuses, BATCH)).int()
    counters[0, Counter.STATUS] = RUNNING
    counters[:, Counter.TRIED] = torch.from_numpy(generator.integers(0, 3, BATCH)).int()
    counters[:, Counter.SINCE_BEST] = torch.from_numpy(generator.integers(0, 2, BATCH)).int()
    progress = torch.zeros(len(Progress), dtype=torch.int64)
    return Evaluated(*(x.contiguous() for x in points), scalars, counters, progress, left, freeze)


def assert_same(kernel, reference, at, expected, singular):
    assert torch.equal(at.counters, expected.counters)
    assert torch.equal(at.progress, expected.progress)
    assert (kernel.flags == reference.flags).all(), np.argwhere(kernel.flags != reference.flags)
    assert (kernel.counts == reference.counts).all()
    np.testing.assert_array_equal(kernel.vectors, reference.vectors)
    # Along a null vector, a step may have any length up to the radius: it promises the same.
    aimed = singular & kernel.flags[TrustFlag.SEARCHING]
    for search, points in ((kernel, at.next), (reference, expected.next)):
        assert (search.reached[aimed] <= (1.1 + 1e-6) * search.radius[aimed]).all()
        search.reached[singular], points[torch.from_numpy(singular)] = 0.0, 0.0
    np.testing.assert_allclose(kernel.numbers, reference.numbers, rtol=1e-6, atol=1e-9)
    finite = np.isfinite(reference.system).all(axis=(1, 2))
    for mine, other in zip(kernel.system[finite], reference.system[finite], strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-9, atol=1e-12 * np.abs(other).max())
    assert (np.isfinite(kernel.system).all(axis=(1, 2)) == finite).all()
    scale = np.abs(kernel.base).max() + 1.0
    rounding = 1e-6 if kernel.dtype == torch.float32 else 0.0
    np.testing.assert_allclose(at.next.numpy(), expected.next.numpy(), rtol=1e-5 + rounding, atol=1e-8 * scale)


@given(
    entries=st.integers(1, TRUST_ENTRIES),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    freeze=st.booleans(),
    left=st.sampled_from([1, TRUST_PATIENCE + 1]),
)
def test_a_step_is_that_of_the_reference(entries, seed, dtype, freeze, left):
    generator = np.random.default_rng(seed)
    kernel, singular = searches(entries, dtype, generator)
    reference = copy.copy(kernel)
    for name in ("vectors", "system", "numbers", "counts", "flags"):
        setattr(reference, name, getattr(kernel, name).copy())
    reference.begin, reference.base, reference.image, reference.residual = reference.vectors
    reference.size, reference.radius, reference.reached, reference.promised, reference.mark = reference.numbers
    reference.rejected, reference.idle = reference.counts
    reference._kernel = None
    at = evaluated(kernel, generator, freeze, left)
    expected = copy.deepcopy(at)
    stage = TrustStage.FIRST
    stages = []
    while stage != TrustStage.DONE:
        stages.append(stage)
        stage, other = kernel.advance(at, stage), reference.advance(expected, stage)
        assert stage == other
        if stage != TrustStage.DONE:
            jacobian = torch.from_numpy(generator.standard_normal((BATCH, entries, entries)))
            jacobian[generator.random(BATCH) < 0.1] = torch.nan
            kernel.renew(jacobian)
            reference.renew(jacobian)
    assert stages == [TrustStage.FIRST, TrustStage.AGAIN, TrustStage.AFTER_UPDATES]  # some samples need each
    assert_same(kernel, reference, at, expected, singular)


@given(
    rate=st.floats(0.1, 3.0),
    dim=st.integers(1, TRUST_ENTRIES),
    batch=st.integers(1, 4),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    mode=st.sampled_from(["vjp", "difference"]),
)
def test_solves_are_those_of_the_reference(rate, dim, batch, seed, dtype, mode):
    problem = softsign_map(rate, dim, batch=batch, seed=seed, dtype=dtype)
    rtol = 1e-9 if dtype == torch.float64 else 1e-4
    options = {"solver": pydeq.TrustRegion(mode), "rtol": rtol, "max_steps": 60, "trace": True}
    found = problem.solve(**options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pydeq.ops.kernels.trust_region_search", lambda: None)
        expected = problem.solve(**options)
    assume(expected.converged.all())
    assert found.converged.all()
    assert found.nfe <= expected.nfe + 2
    torch.testing.assert_close(found.value, expected.value, rtol=100 * rtol, atol=100 * rtol)
    assert found.trace is not None
    assert expected.trace is not None
    rows = min(3, len(found.trace), len(expected.trace))
    close = {"rtol": 1e-3, "atol": 1e-6 if dtype == torch.float32 else 1e-9}
    torch.testing.assert_close(found.trace[:rows].nan_to_num(), expected.trace[:rows].nan_to_num(), **close)


@pytest.mark.parametrize(
    ("entries", "dtype"),
    [(TRUST_ENTRIES + 1, torch.float64), (2, torch.bfloat16), (2, torch.float16), (0, torch.float64)],
)
def test_other_states_take_the_reference(entries, dtype):
    assert TrustRegionSearch(torch.zeros(2, entries, dtype=torch.float64), dtype)._kernel is None
