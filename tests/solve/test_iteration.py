"""The solver loop: the arguments and number of calls of fn, the freezing of samples, what a sample may depend on."""

import gc
import weakref
from itertools import cycle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import pydeq
from pydeq import Status
from pydeq.testing import CallCounter, assert_close, assert_identical, softsign_map, tanh_map

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
RHOS = [0.0, 0.3, 0.6, 0.9, 0.99, 1.5]

seeds = st.integers(0, 1000)
dtypes = st.sampled_from(DTYPES)
rhos = st.lists(st.sampled_from(RHOS), min_size=1, max_size=6)
dims = st.sampled_from([1, 2, 7, 31, 32, 33, 70])


def options(solver, **more):
    return {"solver": solver, "rtol": 1e-4, "max_steps": 20, **more}


# What is called, and how often


class Operations(TorchDispatchMode):
    """The names of pydeq's operations that were dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pydeq":
            self.names.append(func._schema.name.removeprefix("pydeq::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "adjoint"])
def test_an_iteration_is_one_dispatched_operation(solver, backward):
    """A reference that is called past the dispatcher would be right, and slow: the kernels are behind the operation."""
    problem = softsign_map([0.1, 0.5, 0.9], 9)
    name = f"{type(solver).__name__.lower()}_step"
    with Operations() as operations:
        if backward:
            adjoint = pydeq.Implicit(solver=solver, rtol=1e-3)
            deq = pydeq.DEQ(problem.fn, solver=solver, adjoint=adjoint, rtol=1e-3)
            x, *others = problem.context
            z, solution = deq(problem.z0, x.clone().requires_grad_(), *others, return_solution=True)
            z.square().sum().backward()
            calls = solution.nfe + solution.backward.nfe
        else:
            calls = problem.solve(solver=solver, rtol=1e-3).nfe
    # Samples stop at different evaluations: one more operation looks back at those that stopped early.
    looks = operations.names.count("picard_step") - (calls if name == "picard_step" else 0)
    assert looks == 1 + backward
    assert len(operations.names) == calls + looks
    assert set(operations.names) == {name, "picard_step"}


def test_what_stops_at_once_is_not_looked_back_at(solver):
    problem = softsign_map([0.7] * 3, 9)
    problem = problem.rows([0, 0, 0])
    with Operations() as operations:
        calls = problem.solve(solver=solver, rtol=1e-3).nfe
    assert len(operations.names) == calls


@pytest.mark.parametrize("max_steps", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("compact", [False, True])
def test_nfe_is_what_an_independent_counter_counts(solver, max_steps, compact):
    problem = softsign_map(RHOS, 9)
    counter = CallCounter(problem.fn)
    more = {"compact": True, "batched_context": (True, True)} if compact else {}
    solution = pydeq.fixed_point(
        counter, problem.z0, *problem.context, solver=solver, max_steps=max_steps, rtol=1e-6, **more
    )
    assert solution.nfe == counter.calls <= max_steps
    assert int(solution.sample_nfe.max()) == counter.calls
    assert (solution.sample_nfe >= 1).all()


def test_max_steps_1_evaluates_z0(solver):
    problem = softsign_map(0.9, 9)
    counter = CallCounter(problem.fn)
    z0 = problem.z0 + 0.3
    solution = pydeq.fixed_point(counter, z0, *problem.context, solver=solver, max_steps=1)
    assert counter.calls == solution.nfe == 1
    assert torch.equal(solution.value, z0)
    assert torch.equal(solution.image, problem.fn(z0, *problem.context))
    assert (solution.status == Status.MAX_STEPS).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fixed_point_costs_one_call(solver, dtype):
    problem = softsign_map([0.5, 0.9], 9, dtype=dtype)
    z0 = torch.zeros(2, 9, dtype=dtype)
    counter = CallCounter(lambda z: z * 0.5)  # its fixed point is exactly zero
    solution = pydeq.fixed_point(counter, z0, solver=solver, rtol=0.0)
    assert (counter.calls, solution.nfe) == (1, 1)
    assert solution.converged.all()
    assert torch.equal(solution.residual, torch.zeros_like(solution.residual))
    warm = problem.solve(solver=solver, rtol=1e-2, max_steps=200)
    assert warm.converged.all()
    counter = CallCounter(problem.fn)
    again = pydeq.fixed_point(counter, warm.image, *problem.context, solver=solver, rtol=2e-2)
    assert (counter.calls, again.nfe) == (1, 1)
    assert torch.equal(again.value, warm.image)


def test_a_warm_start_saves_calls(solver):
    problem = softsign_map(0.9, 9, dtype=torch.float64)
    cold = problem.solve(solver=solver, rtol=1e-8, max_steps=300)
    near = cold.value + 1e-5
    warm = pydeq.fixed_point(problem.fn, near, *problem.context, solver=solver, rtol=1e-8, max_steps=300)
    assert warm.converged.all()
    assert warm.nfe < cold.nfe


def test_the_first_call_sees_z0_and_later_ones_a_contiguous_state(solver):
    z0 = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).T
    seen = []

    def fn(z):
        seen.append((z.clone(), z.is_contiguous(), z.requires_grad))
        return 0.5 * z + 1.0

    pydeq.fixed_point(fn, z0.requires_grad_(), solver=solver)
    assert torch.equal(seen[0][0], z0)
    assert all(contiguous and not requires_grad for _, contiguous, requires_grad in seen)


# What fn may return


@pytest.mark.parametrize("shape", [(4, 3, 3), (4, 3)], ids=str)
def test_fn_may_return_views_and_its_own_buffer(solver, shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    buffer = torch.empty(shape)
    wide = torch.empty(*shape, 2)

    def plain(z):
        return 0.7 * z.transpose(1, -1).cos() + x

    def into_buffer(z):
        buffer.copy_(plain(z))
        return buffer

    def strided(z):
        wide[..., 0] = plain(z)
        return wide[..., 0]

    def transposed(z):
        return plain(z).transpose(1, -1).contiguous().transpose(1, -1)

    expected = pydeq.fixed_point(plain, torch.zeros(shape), solver=solver, rtol=1e-5)
    for fn in (into_buffer, strided, transposed):
        assert_identical(pydeq.fixed_point(fn, torch.zeros(shape), solver=solver, rtol=1e-5), expected)


@pytest.mark.parametrize("fn", [lambda z: z, lambda z: z[:], lambda z: z.view(-1).view(z.shape)], ids=range(3))
def test_the_identity_converges_at_once(solver, fn):
    z0 = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    solution = pydeq.fixed_point(fn, z0, solver=solver)
    assert solution.nfe == 1
    assert solution.converged.all()
    assert torch.equal(solution.value, z0)
    assert torch.equal(solution.image, z0)
    assert torch.equal(solution.relative_residual, torch.zeros(3))


def test_a_view_of_z_that_is_not_z(solver):
    """The step reads images that share memory with the iterates it writes."""
    z0 = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    for max_steps in (1, 2, 3, 6):
        ran = {"solver": solver, "max_steps": max_steps, "freeze": False}
        view = pydeq.fixed_point(lambda z: z.mT, z0, **ran)
        assert_identical(view, pydeq.fixed_point(lambda z: z.mT.clone(), z0, **ran))


@pytest.mark.parametrize(
    "change", [lambda z: z.mul_(0.5), lambda z: z[:, 0].zero_(), lambda z: z.add_(0)], ids=range(3)
)
def test_fn_must_not_modify_z(solver, change):
    def fn(z):
        change(z)
        return z

    with pytest.raises(ValueError, match=r"fn must not modify z in place: work on a copy, z.clone\(\)"):
        pydeq.fixed_point(fn, torch.ones(3, 5), solver=solver)
    with pytest.raises(ValueError, match="fn must not modify z in place"):
        pydeq.fixed_point(lambda z: (fn(z[0]), z[1]), (torch.ones(3, 5), torch.ones(3, 2)), solver=solver)


def test_an_fn_that_raises_leaves_nothing_behind(solver):
    problem = softsign_map(RHOS, 9)
    expected = problem.solve(**options(solver))

    def fails(z, *context):
        counter(z)
        if counter.calls == 3:
            raise KeyError("from fn")
        return problem.fn(z, *context)

    for _ in range(2):
        counter = CallCounter(lambda z: z)
        with pytest.raises(KeyError, match="from fn"):
            pydeq.fixed_point(fails, problem.z0, *problem.context, **options(solver))
        assert torch.is_grad_enabled()
        assert_identical(problem.solve(**options(solver)), expected)


def test_a_solve_may_run_inside_a_solve(solver):
    inner = softsign_map(0.5, 9)
    shift = inner.solve(solver=solver).image

    def outer(z):
        return 0.5 * z + inner.solve(solver=solver).image

    assert_identical(
        pydeq.fixed_point(outer, inner.z0, solver=solver),
        pydeq.fixed_point(lambda z: 0.5 * z + shift, inner.z0, solver=solver),
    )


def test_no_buffer_outlives_its_solve(solver):
    seen = []

    def fn(z):
        seen.append(weakref.ref(z))
        return 0.5 * z + 1.0

    pydeq.fixed_point(fn, torch.zeros(3, 5), solver=solver)
    gc.collect()
    assert all(reference() is None for reference in seen)


# Per-sample stopping


def test_easy_samples_stop_early(solver):
    problem = softsign_map([0.1, 0.5, 0.9, 0.98], 9, dtype=torch.float64)
    iterates = []

    def fn(z, *context):
        iterates.append(z.clone())
        return problem.fn(z, *context)

    solution = pydeq.fixed_point(fn, problem.z0, *problem.context, solver=solver, rtol=1e-6, max_steps=300)
    assert solution.converged.all()
    nfe = solution.sample_nfe.tolist()
    assert nfe == sorted(nfe)
    assert nfe[0] < nfe[-1] == solution.nfe
    for b in range(4):
        alone = problem.rows([b]).solve(solver=solver, rtol=1e-6, max_steps=300)
        assert alone.nfe == nfe[b]
        for later in iterates[nfe[b] :]:
            assert torch.equal(later[b], solution.value[b])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_without_freezing_all_go_on_until_the_worst_is_done(solver, dtype):
    problem = softsign_map([0.1, 0.5, 0.9, 0.95], 9, dtype=dtype)
    frozen = problem.solve(solver=solver, rtol=1e-5, max_steps=100)
    moving = problem.solve(solver=solver, rtol=1e-5, max_steps=100, freeze=False, trace=True)
    assert frozen.converged.all()
    assert moving.converged.all()
    assert moving.nfe == frozen.nfe
    assert (moving.sample_nfe == moving.nfe).all()
    assert not moving.trace.isnan().any()
    assert (moving.residual <= frozen.residual).all()
    assert float(moving.residual[0]) < 0.1 * float(frozen.residual[0])


def test_without_freezing_or_stalling_a_solve_runs_to_its_end(solver):
    x = cycle([1.0, -1.0])  # there is no fixed point to come upon
    solution = pydeq.fixed_point(
        lambda z: 0.5 * z + next(x), torch.zeros(3, 4), solver=solver, rtol=0.0, max_steps=60, freeze=False, stall=False
    )
    assert (solution.sample_nfe == 60).all()
    assert solution.nfe == 60
    assert (solution.status == Status.MAX_STEPS).all()


# What a sample may depend on


@given(rhos=rhos, dim=dims, dtype=dtypes, seed=seeds, freeze=st.booleans(), data=st.data())
def test_a_sample_does_not_depend_on_its_batch(solver, rhos, dim, dtype, seed, freeze, data):
    problem = softsign_map(rhos, dim, dtype=dtype, seed=seed)
    rows = data.draw(st.lists(st.integers(0, len(rhos) - 1), min_size=1, max_size=8))
    ran = options(solver, freeze=freeze, rtol=1e-3)
    whole, some = problem.solve(**ran), problem.rows(rows).solve(**ran)
    if freeze or some.nfe == whole.nfe:  # else each batch runs as long as its own worst sample
        assert_identical(some, whole, rows)


@given(rhos=rhos, dim=dims, dtype=dtypes, seed=seeds, data=st.data())
def test_permuting_samples_permutes_the_solution(solver, rhos, dim, dtype, seed, data):
    problem = softsign_map(rhos, dim, dtype=dtype, seed=seed)
    order = data.draw(st.permutations(range(len(rhos))))
    one, other = problem.solve(**options(solver)), problem.rows(order).solve(**options(solver))
    assert one.nfe == other.nfe
    assert_identical(other, one, order)


@given(
    dim=dims,
    dtype=dtypes,
    seed=seeds,
    step=st.integers(0, 8),
    bad=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    once=st.booleans(),
    data=st.data(),
)
def test_nan_and_inf_stay_in_their_sample(solver, dim, dtype, seed, step, bad, once, data):
    problem = softsign_map([0.5, 0.9, 0.97], dim, dtype=dtype, seed=seed)
    row, column = data.draw(st.integers(0, 2)), data.draw(st.integers(0, dim - 1))
    calls = CallCounter(problem.fn)

    def fn(z, *context):
        image = calls(z, *context)
        if calls.calls == step + 1 or (calls.calls > step and not once):
            image[row, column] = bad
        return image

    ran = options(solver, rtol=1e-6)
    spoiled = pydeq.fixed_point(fn, problem.z0, *problem.context, **ran)
    others = [b for b in range(3) if b != row]
    for b in others:
        alone = problem.rows([b]).solve(**ran)
        assert torch.equal(spoiled.value[b], alone.value[0])
        assert torch.equal(spoiled.image[b], alone.image[0])
        assert torch.equal(spoiled.residual[b], alone.residual[0])
        assert spoiled.sample_nfe[b] == alone.sample_nfe[0]
    assert spoiled.value.isfinite().all()
    assert spoiled.image[others].isfinite().all()
    if step > 0:
        assert spoiled.image[row].isfinite().all()
        assert spoiled.residual[row].isfinite()


@given(dtype=dtypes, seed=seeds)
def test_runs_repeat_bit_for_bit(solver, dtype, seed):
    problem = tanh_map(0.9, 40, dtype=dtype, seed=seed)
    one, other = problem.solve(**options(solver)), problem.solve(**options(solver))
    assert one.nfe == other.nfe
    assert_identical(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 40000), (3, 20000), (33, 700)], ids=str)
def test_thread_counts_change_nothing(solver, threads, shape, dtype):
    batch, dim = shape
    problem = softsign_map([RHOS[b % len(RHOS)] for b in range(batch)], dim, dtype=dtype)
    ran = options(solver, max_steps=6, rtol=1e-6)
    threads(1)
    one = problem.solve(**ran)
    threads(2)
    two = problem.solve(**ran)
    assert_identical(two, one)
    rows = [batch - 1]
    assert_identical(problem.rows(rows).solve(**ran), one, rows)


@given(
    power=st.integers(-20, 40), rhos=rhos, dim=dims, dtype=st.sampled_from([torch.float64, torch.float32]), seed=seeds
)
def test_a_power_of_two_scales_the_iterates_exactly(solver, power, rhos, dim, dtype, seed):
    """The iterates of c f(z / c) are c times those of f: nothing in a solver knows a unit.

    That is while float32 holds the squares of residuals, here down to 1e-8, which are summed in float64 otherwise.
    """
    problem, scale = softsign_map(rhos, dim, dtype=dtype, seed=seed), 2.0**power

    def fn(z, *context):
        return scale * problem.fn(z / scale, *context)

    one = problem.solve(**options(solver))
    other = pydeq.fixed_point(fn, scale * problem.z0, *problem.context, **options(solver))
    assert torch.equal(other.status, one.status)
    assert torch.equal(other.sample_nfe, one.sample_nfe)
    for name in ("value", "image", "residual"):
        assert torch.equal(getattr(other, name), scale * getattr(one, name)), name
    assert torch.equal(other.relative_residual, one.relative_residual)


@given(scale=st.floats(1e-6, 1e6), seed=seeds)
def test_any_scale_scales_the_iterates_closely(solver, scale, seed):
    problem = softsign_map(0.8, 12, dtype=torch.float64, seed=seed)

    def fn(z, *context):
        return scale * problem.fn(z / scale, *context)

    ran = options(solver, max_steps=6, rtol=0.0, stall=False)
    one = problem.solve(**ran)
    other = pydeq.fixed_point(fn, scale * problem.z0, *problem.context, **ran)
    assert_close(other.image / scale, one.image, size=12, condition=1e6)  # a ridge of 1e-6 conditions Anderson's system
