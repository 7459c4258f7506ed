"""When a sample is done: every status, and the rules behind it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pydeq
from pydeq import Status
from pydeq.ops.constants import (
    CONTRACTION,
    DIVERGENCE,
    RECOVERIES,
    RUNNING,
    STALL_EPSILONS,
    STALL_WINDOW,
    Counter,
    Progress,
    Scalar,
)
from pydeq.ops.termination import Rules, default_rtol
from pydeq.solvers import Solver
from pydeq.testing import assert_close, assert_identical, linear_map, softsign_map, tanh_map

WIDE = (torch.float64, torch.float32)
HALF = (torch.float16, torch.bfloat16)


def scripted(images, z0=0.0, solver=None, max_steps=None, dtype=torch.float64, **rules):
    """The workspace of ``solver`` after steps on given images of one scalar sample, whatever the iterates."""
    max_steps = max_steps or len(images) + 1
    settings = {"rtol": 1e-3, "atol": 0.0, "eps": torch.finfo(dtype).eps, "freeze": True, "stall": True, **rules}
    workspace = (solver or pydeq.Picard()).start(torch.full((1, 1), z0, dtype=dtype), Rules(**settings), max_steps)
    for k, image in enumerate(images):
        workspace.step(torch.full((1, 1), image, dtype=dtype), k)
    return workspace


def status_of(workspace):
    return int(workspace.counters[0, Counter.STATUS])


# CONVERGED


@pytest.mark.parametrize("rtol", [1e-2, 1e-5])
@pytest.mark.parametrize("atol", [0.0, 1e-4])
def test_converged_means_that_the_residual_meets_the_tolerance(solver, rtol, atol):
    problem = tanh_map(0.5, 20, batch=6, dtype=torch.float64)
    solution = problem.solve(solver=solver, rtol=rtol, atol=atol, trace=True)
    assert solution.converged.all()
    bound = atol + rtol * solution.image.norm(dim=1)
    assert (solution.residual <= bound).all()
    for b, nfe in enumerate(solution.sample_nfe.tolist()):  # and no sample went on for longer than it had to
        size = solution.image[b].norm()
        assert (solution.trace[: nfe - 1, b] * size > 0.5 * atol + 0.5 * rtol * size).all()


def test_a_tolerance_is_met_with_equality(solver):
    """A zero cotangent must converge at once, so <= everywhere."""
    zeros = pydeq.fixed_point(lambda z: 0.5 * z, torch.zeros(2, 3), solver=solver, rtol=0.0, atol=0.0)
    assert zeros.converged.all()
    assert status_of(scripted([1.0], z0=0.5, rtol=0.5)) == Status.CONVERGED
    assert status_of(scripted([1.0], z0=0.5, rtol=0.0, atol=0.5)) == Status.CONVERGED
    assert status_of(scripted([1.0], z0=0.5, rtol=0.499)) == RUNNING


def test_after_the_first_evaluation_the_residual_must_have_contracted():
    """A small relative residual says nothing while the iterate runs away."""
    for share, expected in ((CONTRACTION * 0.99, Status.CONVERGED), (CONTRACTION * 1.01, RUNNING)):
        workspace = scripted([1.0, 1.0 + share], rtol=0.8)  # Picard: the second iterate is 1
        assert status_of(workspace) == expected
        assert float(workspace.scalars[0, Scalar.RESIDUAL]) == pytest.approx(share)


@given(
    c=st.floats(1e-3, 1e3),
    start=st.floats(-1e3, 1e3),
    rtol=st.sampled_from([1e-2, 1e-3, 1e-5]),
    dtype=st.sampled_from(WIDE),
    dim=st.integers(1, 40),
    seed=st.integers(0, 100),
)
def test_a_map_without_a_fixed_point_does_not_converge(solver, c, start, rtol, dtype, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    shift = c * torch.randn(3, dim, generator=generator, dtype=torch.float64).to(dtype)
    z0 = start * torch.randn(3, dim, generator=generator, dtype=torch.float64).to(dtype)
    # Where rounding absorbs the shift from the start, every z is a fixed point.
    z0 = torch.where(shift.norm(dim=1, keepdim=True) > 10 * rtol * (z0 + shift).norm(dim=1, keepdim=True), z0, 0.0)
    solution = pydeq.fixed_point(lambda z: z + shift, z0, solver=solver, rtol=rtol, max_steps=120)
    assert not solution.converged.any()


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize(
    "solver",
    [
        pydeq.Picard(),
        pydeq.Picard(damping=0.5),
        pydeq.Anderson(),
        pydeq.Anderson(memory=2),
        pydeq.Anderson(memory=20),
        pydeq.Anderson(damping=0.3),
        pydeq.Broyden(),
        pydeq.Broyden(memory=1),
        pydeq.Broyden(memory=4),
    ],
    ids=str,
)
@pytest.mark.parametrize("stall", [True, False])
def test_nor_does_it_in_a_long_run(solver, dtype, stall):
    shift = torch.tensor([[1.0, 2.0, -3.0], [1e-4, 1e-4, 0.0], [1e6, 1.0, 1.0], [0.1, 0.0, 0.0]], dtype=dtype)
    z0 = torch.tensor([[0.0, 0.0, 0.0], [1e-3, 0.0, 0.0], [1.0, 1.0, 1.0], [0.3, 0.3, 0.3]], dtype=dtype)
    solution = pydeq.fixed_point(
        lambda z: z + shift, z0, solver=solver, rtol=1e-5, max_steps=150, stall=stall, freeze=stall
    )
    assert not solution.converged.any()


def test_an_iterate_that_meets_the_tolerance_is_returned_though_another_was_closer():
    """Images 9, 10, 11.05: the third residual is 1.05 after 1, but relative to its image it is the smallest."""
    images = [9.0, 10.0, 11.05]
    workspace = scripted(images, rtol=0.097)
    assert status_of(workspace) == Status.CONVERGED
    assert workspace.best[:, 0, 0].tolist() == [10.0, 11.05]
    # Without freezing it has converged while it meets the tolerance, and what is kept is of that evaluation.
    for last, status in ((12.5, RUNNING), (12.0, Status.CONVERGED), (12.1, Status.CONVERGED)):
        workspace = scripted([*images, last], rtol=0.097, freeze=False, max_steps=9)
        assert status_of(workspace) == status
        assert float(workspace.scalars[0, Scalar.BEST]) == pytest.approx(last - 11.05)
        if status == Status.CONVERGED:
            assert workspace.best[:, 0, 0].tolist() == [11.05, last]


# MAX_STEPS


def test_max_steps(solver):
    solution = softsign_map([0.2, 0.9], 5, dtype=torch.float64).solve(solver=solver, rtol=1e-14, max_steps=4)
    assert solution.status.tolist() == [Status.MAX_STEPS] * 2
    assert solution.sample_nfe.tolist() == [4, 4]


def test_converged_in_the_last_step_is_converged(solver):
    problem = softsign_map(0.9, 5, dtype=torch.float64)
    needed = problem.solve(solver=solver, rtol=1e-6, max_steps=200).sample_nfe
    for max_steps in range(1, int(needed.max()) + 1):
        solution = problem.solve(solver=solver, rtol=1e-6, max_steps=max_steps)
        assert torch.equal(solution.converged, needed <= max_steps)


def test_the_best_iterate_is_returned_not_the_last():
    """Images 1, 2.1, 3, 3.5, 5: the residuals of Picard's iterates are 1, 1.1, .9, .5, 1.5."""
    workspace = scripted([1.0, 2.1, 3.0, 3.5, 5.0], rtol=1e-3, max_steps=5)
    assert status_of(workspace) == Status.MAX_STEPS
    assert [float(x) for x in workspace.best[:, 0, 0]] == [3.0, 3.5]
    assert float(workspace.scalars[0, Scalar.BEST]) == 0.5


@pytest.mark.parametrize("dtype", WIDE + HALF, ids=str)
@pytest.mark.parametrize("freeze", [True, False])
def test_the_best_of_all_iterates_is_returned(solver, dtype, freeze):
    """Where the residual rises and falls, whichever evaluation is the last."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20, 7, 5, generator=generator, dtype=torch.float64).to(dtype)
    for max_steps in range(1, 20):
        seen = []

        def fn(z, seen=seen):
            image = 0.3 * z + noise[len(seen)]
            seen.append((z.clone(), image))
            return image

        solution = pydeq.fixed_point(
            fn, noise[0], solver=solver, rtol=1e-9, max_steps=max_steps, freeze=freeze, stall=False
        )
        z, image = (torch.stack(part) for part in zip(*seen, strict=True))
        compute = torch.promote_types(dtype, torch.float32)
        residuals = (image.to(compute) - z.to(compute)).double().norm(dim=2)
        best = residuals.argmin(0)
        assert torch.equal(solution.value, z[best, torch.arange(7)])
        assert torch.equal(solution.image, image[best, torch.arange(7)])


# STALLED


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-9), (torch.float64, 1e-18), (torch.bfloat16, 1e-5)])
def test_rounding_stalls(solver, dtype, rtol):
    problem = tanh_map(0.9, 64, dtype=dtype)
    solution = problem.solve(solver=solver, rtol=rtol, max_steps=800)
    settled = solution.relative_residual == 0.0  # a lucky rounding is a fixed point
    assert ((solution.status == Status.STALLED) | settled).all()
    assert (solution.relative_residual <= STALL_EPSILONS * torch.finfo(dtype).eps).all()
    assert solution.nfe < 800
    on = problem.solve(solver=solver, rtol=rtol, max_steps=200, stall=False)
    assert ((on.status == Status.MAX_STEPS) | (on.relative_residual == 0.0)).all()
    assert (on.residual <= solution.residual).all()


def test_stalled_needs_a_window_without_progress_and_a_residual_that_rounding_explains():
    eps = 1e-6
    for level, expected in ((0.9 * STALL_EPSILONS * eps, Status.STALLED), (1.1 * STALL_EPSILONS * eps, RUNNING)):
        # Picard's iterates are the images before: residuals 1, level, then forever 1.5 times level.
        images = [1.0, 1.0 + level]
        while len(images) < STALL_WINDOW + 1:
            images.append(images[-1] + 1.5 * level)
        assert status_of(scripted(images, rtol=0.0, eps=eps)) == RUNNING
        images.append(images[-1] + 1.5 * level)
        assert status_of(scripted(images, rtol=0.0, eps=eps)) == expected
        assert status_of(scripted(images, rtol=0.0, eps=eps, stall=False)) == RUNNING


def test_slow_progress_does_not_stall(solver):
    """Ten evaluations without progress do not stall a sample whose residual is still large."""
    problem = linear_map(0.999, 40, dtype=torch.float64)
    solution = problem.solve(solver=solver, rtol=1e-10, max_steps=60)
    assert not (solution.status == Status.STALLED).any()


# DIVERGED


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_growth_diverges(dtype):
    fn, z0 = (lambda z: 3.0 * z + 1.0), torch.ones(2, 3, dtype=dtype)
    solution = pydeq.fixed_point(fn, z0, solver=pydeq.Picard(), max_steps=100)
    assert (solution.status == Status.DIVERGED).all()
    assert solution.nfe == 14  # the first power of 3 beyond 1e6
    assert torch.equal(solution.value, z0)
    assert torch.equal(solution.image, fn(z0))
    for solver in (pydeq.Anderson(), pydeq.Broyden()):  # an affine map is no trouble to them
        assert pydeq.fixed_point(fn, z0, solver=solver).converged.all()


def test_diverged_is_measured_against_the_first_residual():
    assert status_of(scripted([1.0, 1.0 + 0.99 * DIVERGENCE])) == RUNNING
    assert status_of(scripted([1.0, 1.0 + 1.01 * DIVERGENCE])) == Status.DIVERGED
    assert status_of(scripted([1.0, 1.0 + 1e-4, 1e4], rtol=0.0)) == RUNNING  # however far from the best one


def test_divergence_stops_a_sample_without_freezing_too():
    rate = torch.tensor([[3.0], [0.9]])
    solution = pydeq.fixed_point(
        lambda z: rate * z + 1.0, torch.ones(2, 3), solver=pydeq.Picard(), max_steps=60, freeze=False
    )
    assert solution.status.tolist() == [Status.DIVERGED, Status.CONVERGED]
    assert solution.sample_nfe[0] == 14


# NONFINITE


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", WIDE + HALF, ids=str)
def test_where_the_first_evaluation_is_not_finite_z0_is_returned(solver, bad, dtype):
    z0 = torch.tensor([[1.0, 2.0], [1.0, 2.0]], dtype=dtype)

    def fn(z):
        image = 0.5 * z + 1.0
        image[0, 1] = bad
        return image

    for max_steps in (1, 50):
        solution = pydeq.fixed_point(fn, z0, solver=solver, max_steps=max_steps)
        assert solution.status[0] == Status.NONFINITE
        assert solution.sample_nfe[0] == 1
        assert torch.equal(solution.value[0], z0[0])
        assert solution.residual[0] == solution.relative_residual[0] == torch.inf
    assert solution.converged.tolist() == [False, True]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("solver", [pydeq.Anderson(), pydeq.Broyden()], ids=str)
def test_a_retry_is_a_plain_step_from_the_best_iterate(solver, bad):
    problem = softsign_map(0.9, 6, batch=1, dtype=torch.float64)
    seen = []

    def fn(z, *context):
        image = problem.fn(z, *context)
        seen.append((z.clone(), image.clone()))
        return torch.full_like(image, bad) if len(seen) == 5 else image

    solution = pydeq.fixed_point(fn, problem.z0, *problem.context, solver=solver, rtol=1e-10, max_steps=200)
    assert solution.converged.all()
    residuals = [float((image - z).norm()) for z, image in seen[:4]]
    best = residuals.index(min(residuals))
    assert torch.equal(seen[5][0], seen[best][1])
    assert solution.sample_nfe.tolist() == [len(seen)]


@pytest.mark.parametrize("dtype", WIDE + HALF, ids=str)
def test_a_plain_step_that_failed_is_halved(solver, dtype):
    """The first step of every solver is a plain one: repeating it would only call fn on the same iterate."""
    images = [1.0]
    for n in range(RECOVERIES):
        images.append(torch.nan)
        workspace = scripted(images, solver=solver, max_steps=20, dtype=dtype)
        assert status_of(workspace) == RUNNING
        assert float(workspace.z[len(images) % 2]) == 0.5 ** (n + 1)
    assert status_of(scripted([*images, torch.nan], solver=solver, dtype=dtype)) == Status.NONFINITE


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_a_step_out_of_a_domain_is_taken_back(solver, dtype):
    """scipy#5460: from 1.001 an accelerated step leaves the domain, n > 1, and plain iteration converges."""

    def fn(n):
        return torch.log(3.0 / n) / torch.log(3.7477525683 * n / (n - 1.0)) + 1.0

    start = torch.tensor([[1.001], [1.2], [1.001]], dtype=dtype)
    rtol = 64 * torch.finfo(dtype).eps
    solution = pydeq.fixed_point(fn, start, solver=solver, rtol=rtol)
    assert solution.converged.all()
    expected = pydeq.fixed_point(fn, start.double(), solver=pydeq.Picard(), rtol=1e-14, max_steps=200).value
    assert_close(solution.value, expected.to(dtype), condition=1e3)
    for b in range(3):
        assert_identical(pydeq.fixed_point(fn, start[[b]], solver=solver, rtol=rtol), solution, [b])


def test_a_retry_counts_until_there_is_a_new_best():
    """Residuals 1, .5, NaN, then 2 after the retry: each accident that follows counts, however finite it is between."""
    images = [1.0, 1.5, torch.nan]
    for n in range(RECOVERIES):
        images += [10.0 ** (n + 1), torch.nan]
        assert status_of(scripted(images, solver=pydeq.Anderson(), max_steps=30)) == RUNNING
    assert status_of(scripted([*images, 1e5, torch.nan], solver=pydeq.Anderson(), max_steps=30)) == Status.NONFINITE


def test_samples_that_are_lost_stay_at_their_value(solver):
    """fn goes on being called on the whole batch: it must not be fed what a lost sample had come to."""
    rate = torch.tensor([[0.9], [0.9], [0.5]], dtype=torch.float64)
    seen = []

    def fn(z):
        seen.append(z.clone())
        image = rate * z.roll(1, 1) + torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
        image[0] = image[0] + 1e3 ** len(seen)
        image[1] = image[1] + (-1.0) ** len(seen)  # goes on for ever
        if len(seen) > 3:
            image[2, 1] = torch.nan
        return image

    solution = pydeq.fixed_point(fn, torch.zeros(3, 3, dtype=torch.float64), solver=solver, rtol=1e-10, max_steps=15)
    assert solution.status.tolist() == [Status.DIVERGED, Status.MAX_STEPS, Status.NONFINITE]
    for b in (0, 2):
        nfe = int(solution.sample_nfe[b])
        assert nfe + 2 < len(seen)
        assert not torch.equal(seen[nfe - 1][b], solution.value[b])
        assert all(torch.equal(z[b], solution.value[b]) for z in seen[nfe:])


def test_a_retry_that_fails_ends_at_the_best_iterate(solver):
    problem = softsign_map(0.9, 6, batch=2, dtype=torch.float64)
    calls = []

    def fn(z, *context):
        image = problem.fn(z, *context)
        calls.append((z.clone(), image.clone()))
        if len(calls) > 4:
            image[0] = torch.nan
        return image

    solution = pydeq.fixed_point(fn, problem.z0, *problem.context, solver=solver, rtol=1e-10, max_steps=200)
    assert solution.status.tolist() == [Status.NONFINITE, Status.CONVERGED]
    # Picard's last step was a plain one from the best iterate.
    assert solution.sample_nfe[0] == 5 + RECOVERIES + (not isinstance(solver, pydeq.Picard))
    residuals = torch.stack([(image - z).norm(dim=1)[0] for z, image in calls[:4]])
    z, image = calls[int(residuals.argmin())]
    assert torch.equal(solution.value[0], z[0])
    assert torch.equal(solution.image[0], image[0])
    assert_close(solution.residual[:1], residuals.min()[None], size=6)


def test_a_second_accident_after_progress_is_tried_again(solver):
    """Only accidents in a row end a sample: after a new best iterate there is something new to try."""
    problem = softsign_map(0.95, 8, batch=1, dtype=torch.float64)
    calls = []

    def fn(z, *context):
        calls.append(None)
        image = problem.fn(z, *context)
        return torch.full_like(image, torch.nan) if len(calls) in (4, 12) else image

    solution = pydeq.fixed_point(fn, problem.z0, *problem.context, solver=solver, rtol=1e-10, max_steps=400)
    assert solution.converged.all()


def test_a_singular_sample_does_not_disturb_another(solver):
    """Constant residuals make Anderson's system singular and Broyden's denominators vanish."""
    problem = softsign_map(0.9, 6, batch=3, dtype=torch.float64)

    def fn(z, *context):
        image = problem.fn(z, *context)
        image[1] = z[1] + 1.0
        return image

    solution = pydeq.fixed_point(fn, problem.z0, *problem.context, solver=solver, rtol=1e-8, max_steps=200)
    assert not solution.converged[1]
    alone = problem.rows([0, 2]).solve(solver=solver, rtol=1e-8, max_steps=200)
    assert alone.converged.all()
    assert torch.equal(solution.value[[0, 2]], alone.value)
    assert torch.equal(solution.image[[0, 2]], alone.image)


# Scales


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e30),
        (torch.float32, 1e-30),
        (torch.float64, 1e200),
        (torch.float64, 1e-200),
        (torch.float64, 1e290),
        (torch.float64, 1e-290),
        (torch.bfloat16, 1e30),
        (torch.bfloat16, 1e-30),
        (torch.float16, 1e4),
    ],
    ids=str,
)
def test_squares_that_leave_the_range_of_the_dtype(solver, dtype, scale):
    """Residuals are right, and a residual that would underflow to zero converges nobody."""
    problem = softsign_map([0.3, 0.9], 50, dtype=dtype)

    def fn(z, *context):
        return scale * problem.fn(z / scale, *context)

    rtol = 16 * torch.finfo(dtype).eps
    for max_steps in (1, 2, 3, 200):
        solution = pydeq.fixed_point(
            fn, scale * problem.z0, *problem.context, solver=solver, rtol=rtol, max_steps=max_steps
        )
        compute = torch.promote_types(dtype, torch.float32)
        g = (solution.image.to(compute) - solution.value.to(compute)).double() / scale
        image = solution.image.double() / scale
        assert_close(solution.residual.double() / scale, g.norm(dim=1), size=50, dtype=compute)
        assert_close(solution.relative_residual.double(), g.norm(dim=1) / image.norm(dim=1), size=50, dtype=compute)
        if max_steps == 1:
            assert not solution.converged.any()
    assert solution.converged.all()


def test_half_values_near_the_largest(solver):
    """65504 is the largest float16; the squares of these are far beyond."""
    target = torch.full((2, 400), 6e4, dtype=torch.float16)
    solution = pydeq.fixed_point(lambda z: 0.5 * z + 0.5 * target, torch.zeros_like(target), solver=solver)
    assert solution.converged.all()
    assert solution.residual.isfinite().all()
    first = pydeq.fixed_point(lambda z: 0.5 * z + 0.5 * target, torch.zeros_like(target), solver=solver, max_steps=1)
    assert_close(first.residual, torch.full((2,), 3e4 * 20.0), size=400)


# Defaults and bookkeeping


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-3), (torch.float32, 1e-3), (torch.float16, 1e-2), (torch.bfloat16, 1e-2)]
)
def test_default_rtol(solver, dtype, rtol):
    assert default_rtol(dtype) == rtol
    problem = softsign_map(0.9, 40, dtype=dtype)
    assert_identical(problem.solve(solver=solver), problem.solve(solver=solver, rtol=rtol))
    assert problem.solve(solver=solver, max_steps=100).converged.all()


def test_progress_counts_steps_and_running_samples(solver):
    assert isinstance(solver, Solver)
    workspace = solver.start(torch.ones(3, 2), Rules(1e-3, 0.0, 1e-7, True, True), 5)
    images = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    workspace.step(images, 0)
    assert workspace.progress.tolist() == [1, 2, 0]  # the first sample was at its fixed point
    workspace.step(images, 1)
    assert int(workspace.progress[Progress.STEP]) == 2
