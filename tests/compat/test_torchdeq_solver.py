"""The solvers' contract, on replacement and original; then what the replacement does better; then legacy mode."""

import functools
import inspect
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pydeq
import pydeq.compat
import pydeq.compat.torchdeq as torchdeq
from pydeq.compat.processes import broyden_process
from tests.compat.conftest import Tanh

SOLVERS = ("anderson", "broyden", "fixed_point_iter")
# calls of f and columns of the traces for max_iter = 30
COUNTS = {"anderson": (30, 29), "broyden": (31, 31), "fixed_point_iter": (30, 31)}
STATISTICS = ("abs_lowest", "rel_lowest", "abs_trace", "rel_trace", "nstep", "sradius")

each_solver = pytest.mark.parametrize("name", SOLVERS)
each_mode = pytest.mark.parametrize("stop_mode", ["abs", "rel"])


def rounding(dtype):
    return 1e3 * torch.finfo(dtype).eps


# The contract


@pytest.mark.parametrize("name", [*SOLVERS, "simple_fixed_point_iter"])
def test_signature(td, new, name):
    assert list(inspect.signature(td.solver.get_solver(name)).parameters) == list(
        inspect.signature(new.get_solver(name)).parameters
    )
    parameters = inspect.signature(td.solver.get_solver(name)).parameters
    defaults = {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}
    common = [("max_iter", 50), ("tol", 1e-3), ("stop_mode", "abs"), ("indexing", None)]
    expected = {
        "anderson": [*common, ("m", 6), ("lam", 1e-4), ("tau", 1.0), ("return_final", False)],
        "broyden": [*common, ("LBFGS_thres", None), ("ls", False), ("return_final", False)],
        "fixed_point_iter": [*common, ("tau", 1.0), ("return_final", False)],
        "simple_fixed_point_iter": [("max_iter", 50), ("tau", 1.0), ("indexing", None)],
    }[name]
    assert list(defaults.items()) == expected


@each_solver
@each_mode
def test_counts_without_convergence(td, tanh, name, stop_mode):
    f = tanh(rho=0.99)
    z, states, info = td.get_solver(name)(f, f.z0, max_iter=30, tol=0.0, stop_mode=stop_mode)
    calls, columns = COUNTS[name]
    assert f.calls == calls
    assert states == []
    assert type(info).__name__ == "SolverStat"
    assert isinstance(info, dict)
    for key in ("abs_trace", "rel_trace"):
        assert info[key].shape == (3, columns)
        assert (info[key][:, 0] == 1e8).all()
        assert (info[key][:, 1:] < 1e8).all()
    assert z.shape == f.z0.shape


@each_solver
@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_describe_what_is_returned(td, tanh, name, stop_mode, dtype):
    f = tanh(rho=0.6, dtype=dtype)
    tol = 1e-4
    z, _, info = td.get_solver(name)(f, f.z0, 60, tol, stop_mode)
    lowest = info[f"{stop_mode}_lowest"]
    assert set(info) == set(STATISTICS)
    assert (lowest < tol).all()
    assert info["abs_trace"].dtype == info["abs_lowest"].dtype == dtype
    assert info["nstep"].dtype == torch.float32
    assert info["nstep"].shape == lowest.shape == (3,)
    assert (info["sradius"] == -1).all()
    assert z.dtype == dtype
    assert not z.requires_grad
    # after the stop the traces hold the lowest residual
    trace = info[f"{stop_mode}_trace"]
    assert torch.equal(trace[:, -1], lowest)
    assert torch.equal(trace[:, 1:].amin(1), lowest)
    first = {"anderson": 2, "broyden": 0, "fixed_point_iter": 0}[name]
    column = (info["nstep"] - first).long()
    assert torch.equal(trace.gather(1, column[:, None])[:, 0], lowest)
    # the state: x for Broyden, else f(x), whose residual is about a factor of the contraction lower
    if name == "broyden":
        torch.testing.assert_close(f.residual(z), info["abs_lowest"], rtol=0, atol=rounding(dtype))
    else:
        assert (f.residual(z) <= 0.61 * info["abs_lowest"] + rounding(dtype)).all()


@each_solver
@pytest.mark.parametrize("shape", [(), (5,), (5, 1), (2, 3, 4)])
def test_shapes(td, name, shape):
    # every element of a 0-d or 1-d state is a sample
    x0 = torch.full(shape, 0.3)
    z, _, info = td.get_solver(name)(lambda z: 0.5 * torch.cos(z), x0, tol=1e-6, max_iter=40)
    assert z.shape == (x0.shape or (1,))
    torch.testing.assert_close(z, 0.5 * torch.cos(z), rtol=0, atol=1e-5)
    assert len(info["nstep"]) == (shape[0] if shape else 1)


@each_solver
def test_indexing_gives_the_best_states_so_far(td, tanh, name):
    f = tanh(rho=0.95)
    solver = td.get_solver(name)
    z, states, _ = solver(f, f.z0, max_iter=20, tol=0.0, indexing=[5, 12])
    assert len(states) == 2
    for count, state in zip([5, 12], states, strict=True):
        shorter = count - 1 if name == "broyden" else count  # counted in calls of f
        torch.testing.assert_close(state, solver(f, f.z0, max_iter=shorter, tol=0.0)[0], rtol=0, atol=1e-12)
    assert solver(f, f.z0, max_iter=20, tol=0.0, indexing=[99])[1][0].equal(z)
    assert solver(f, f.z0, max_iter=20, tol=0.0, indexing=[])[1] == []


@each_solver
def test_return_final_runs_all_steps(td, tanh, name):
    f = tanh(rho=0.5)
    _, _, info = td.get_solver(name)(f, f.z0, max_iter=9, tol=1.0, return_final=True)
    assert f.calls == 9 + (name == "broyden")
    assert (info["nstep"] == 9).all()
    assert torch.equal(info["abs_lowest"], info["abs_trace"][:, -1])


def test_return_final_returns_the_last_state(td):
    # 2-periodic: the best is never the last
    z, _, info = td.get_solver("fixed_point_iter")(lambda z: -1.1 * z, torch.ones(2, 3), max_iter=4, return_final=True)
    torch.testing.assert_close(z, torch.full((2, 3), 1.1**4))
    torch.testing.assert_close(info["abs_lowest"], torch.full((2,), 2.1 * 1.1**3 * 3**0.5))
    assert info["nstep"].tolist() == [4.0, 4.0]


@each_solver
def test_unknown_keywords_are_ignored(td, tanh, name):
    f = tanh()
    solver = td.get_solver(name)
    assert solver(f, f.z0, whatever=3)[0].equal(solver(f, f.z0)[0])


@pytest.mark.parametrize("tau", [0.3, 1.0, 1.2])
def test_damping(td, tanh, tau):
    f = tanh(rho=0.5)
    with torch.no_grad():
        first = tau * f(f.z0) + (1 - tau) * f.z0
        second = tau * f(first) + (1 - tau) * first
    z = td.get_solver("fixed_point_iter")(f, f.z0, max_iter=2, tau=tau, return_final=True)[0]
    torch.testing.assert_close(z, second, rtol=0, atol=1e-14)
    for name in ("anderson", "fixed_point_iter"):
        z = td.get_solver(name)(f, f.z0, max_iter=200, tol=1e-10, tau=tau)[0]
        torch.testing.assert_close(z, f.solution(), rtol=0, atol=1e-9)


def test_anderson_state_is_the_image_whatever_the_damping(td, tanh):
    f = tanh(rho=0.5)
    z, _, info = td.get_solver("anderson")(f, f.z0, max_iter=6, tol=0.0, tau=0.5)
    with torch.no_grad():
        assert (f.residual(z) < 0.6 * info["abs_lowest"]).all()


def test_simple_iteration_passes_the_damping_on_and_keeps_the_graph(td):
    seen = []
    a = torch.tensor(0.5, requires_grad=True)

    def f(z, tau):
        seen.append(tau)
        return a * z + 1

    z, states, info = td.get_solver("simple_fixed_point_iter")(f, torch.zeros(2, 1), max_iter=3, tau=0.7, indexing=[2])
    assert seen == [0.7] * 3
    assert torch.equal(states[0], torch.full((2, 1), 1.5))
    z.sum().backward()
    assert a.grad == 2 * (1 + 2 * 0.5)  # of 1 + a + a^2
    assert info["abs_trace"].shape == (2, 1)
    assert (info["nstep"] == 3).all()
    with pytest.raises(TypeError):
        td.get_solver("simple_fixed_point_iter")(lambda z: z, torch.zeros(2, 1))


def test_registry(td):
    with pytest.raises(AssertionError):
        td.get_solver("newton")

    def newton(func, x0, **kwargs):
        return x0, [], td.solver.stat.SolverStat()

    td.register_solver("newton", newton)
    try:
        assert td.get_solver("newton") is newton
    finally:
        del td.solver._solvers["newton"]


def test_solver_stat(td):
    SolverStat = td.solver.stat.SolverStat
    empty = SolverStat(other=3)
    assert empty["other"] == 3
    for key in STATISTICS:
        assert empty[key].tolist() == ([[-1.0]] if "trace" in key else [-1.0])
    lowest = {"abs": torch.tensor([1.0, 2.0]), "rel": torch.tensor([0.1, 0.2])}
    traces = {key: [torch.full((2,), 1e8), value] for key, value in lowest.items()}
    steps = {"abs": torch.tensor([3.0, 4.0]), "rel": torch.tensor([5.0, 6.0])}
    info = SolverStat.from_solver_info("rel", lowest, traces, steps)
    assert info["nstep"].tolist() == [5.0, 6.0]
    assert info["abs_trace"].tolist() == [[1e8, 1.0], [1e8, 2.0]]
    z, fz = torch.zeros(2, 4, 1), torch.full((2, 4, 1), 2.0)
    for state, image in ((z, fz), ([z, z[:, :1]], [fz, fz[:, :1]])):
        info = td.solver_stat_from_final_step(state, image, 7)
        size = 4 if state is z else 5
        torch.testing.assert_close(info["abs_lowest"], torch.full((2,), 2.0 * size**0.5))
        torch.testing.assert_close(info["rel_lowest"], torch.ones(2))
        assert info["nstep"].tolist() == [7.0, 7.0]
        assert info["rel_trace"].shape == (2, 1)


# What the replacement does better


@given(
    seed=st.integers(0, 1000),
    rho=st.sampled_from([0.3, 0.8, 0.95]),
    max_iter=st.integers(1, 25),
    name=st.sampled_from(SOLVERS),
    stop_mode=st.sampled_from(["abs", "rel"]),
    indexing=st.lists(st.integers(1, 25), max_size=4),
    tol=st.sampled_from([0.0, 1e-6, 1e-2]),
)
def test_any_call_keeps_its_promises(seed, rho, max_iter, name, stop_mode, indexing, tol):
    f = Tanh(rho=rho, seed=seed)
    wanted = {i for i in indexing if i <= max_iter}
    z, states, info = torchdeq.get_solver(name)(
        f, f.z0, max_iter=max_iter, tol=tol, stop_mode=stop_mode, indexing=indexing
    )
    calls, lowest = f.calls, info[f"{stop_mode}_lowest"]
    assert calls == max_iter + (name == "broyden") or (lowest < tol).all()
    assert calls <= max_iter + (name == "broyden")
    assert info["abs_trace"].shape[1] == max(1, max_iter - 1 + 2 * (name != "anderson"))
    assert len(states) == (max(1, len(wanted)) if indexing else 0)
    if indexing and (max_iter in wanted or not wanted):
        assert states[-1].equal(z)
    if name == "broyden" and stop_mode == "abs":
        torch.testing.assert_close(f.residual(z), lowest, rtol=1e-9, atol=1e-13)
        residuals = [f.residual(state) for state in [*states, z]]
        for earlier, later in itertools.pairwise(residuals):
            assert (later <= earlier + 1e-13).all()


@given(
    seed=st.integers(0, 1000),
    rho=st.sampled_from([0.5, 0.9, 0.97]),
    calls=st.integers(3, 30),
    name=st.sampled_from(SOLVERS),
)
def test_never_worse_than_the_original_at_the_same_count(seed, rho, calls, name):
    from tests.compat.conftest import import_original

    pytest.importorskip("torchdeq")
    f = Tanh(rho=rho, seed=seed)
    options = {"max_iter": calls, "tol": 0.0}
    ours = torchdeq.get_solver(name)(f, f.z0, **options)[2]["abs_lowest"]
    theirs = import_original().get_solver(name)(f, f.z0, **options)[2]["abs_lowest"]
    gain = ours.clamp(min=1e-13).log() - theirs.clamp(min=1e-13).log()
    # Another ridge may be the luckier one for a sample, by a little.
    assert gain.max() <= {"anderson": 0.3, "broyden": 0.01, "fixed_point_iter": 1e-12}[name]
    assert gain.mean() <= {"anderson": 0.1, "broyden": 0.01, "fixed_point_iter": 1e-12}[name]


def test_ridge_is_relative(new):
    # a small map: an absolute ridge averages uniformly
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(20, 20, generator=generator, dtype=torch.float64)
    A = 0.5 * (A + A.T) / torch.linalg.matrix_norm(0.5 * (A + A.T), 2) * 0.9
    x = 1e-3 * torch.randn(2, 20, generator=generator, dtype=torch.float64)
    options = {"max_iter": 30, "tol": 0.0}

    def f(z):
        return z @ A + x

    small = new.get_solver("anderson")(f, torch.zeros_like(x), **options)[2]["abs_lowest"]
    plain = new.get_solver("fixed_point_iter")(f, torch.zeros_like(x), **options)[2]["abs_lowest"]
    assert (small < 0.1 * plain).all()


@each_solver
@pytest.mark.parametrize("max_iter", [0, 1, 2])
def test_few_steps(new, tanh, name, max_iter):
    f = tanh()
    z, _, info = new.get_solver(name)(f, f.z0, max_iter=max_iter, indexing=[1])
    assert f.calls == max_iter + (name == "broyden")
    assert info["abs_trace"].shape == (3, max(1, max_iter - 1 + 2 * (name != "anderson")))
    if max_iter:
        with torch.no_grad():
            image = f(f.z0) if max_iter == 1 else f(f(f.z0))
        if name != "broyden":
            torch.testing.assert_close(z, image)


@each_solver
def test_a_solution_to_begin_with_costs_one_call(new, tanh, name):
    f = tanh()
    z0, f.calls = f.solution(), 0
    z, states, info = new.get_solver(name)(f, z0, max_iter=20, tol=1e-6, indexing=[4, 20])
    assert f.calls == 1
    assert (info["nstep"] == (0 if name == "broyden" else 1)).all()
    assert (info["abs_lowest"] < 1e-6).all()
    assert len(states) == 2
    torch.testing.assert_close(z, z0)


def test_anderson_of_one_column_is_plain_iteration(new, tanh):
    f = tanh()
    one = new.get_solver("anderson")(f, f.z0, max_iter=8, tol=0.0, m=1)[0]
    torch.testing.assert_close(one, new.get_solver("fixed_point_iter")(f, f.z0, max_iter=8, tol=0.0)[0])


@each_solver
@each_mode
def test_nan_stays_in_its_sample(new, tanh, name, stop_mode):
    f = tanh()
    bad = torch.tensor([False, True, False])

    def spoilt(z):
        return torch.where(bad[:, None], torch.nan, f(z))

    solver = new.get_solver(name)
    z, states, info = solver(spoilt, f.z0, stop_mode=stop_mode, tol=1e-6, indexing=[50])
    expected = solver(f, f.z0, stop_mode=stop_mode, tol=1e-6)[0]
    torch.testing.assert_close(z[~bad], expected[~bad])
    assert z.isfinite().all()
    assert torch.equal(z[bad], f.z0[bad])
    assert info["abs_lowest"][bad].isinf().all()
    assert states[-1].equal(z)


@each_solver
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_states(new, tanh, name, dtype):
    f = tanh(dtype=dtype)
    for legacy in (False, True):
        z, _, info = new.get_solver(name)(f, f.z0, stop_mode="rel", tol=1e-2, legacy=legacy)
        assert z.dtype == dtype
        assert info["rel_trace"].dtype == torch.float32
        assert (info["rel_lowest"] < 1e-2).all()


def test_residual_is_not_scaled_by_the_damping(new, tanh):
    f = tanh(rho=0.9)
    info = new.get_solver("fixed_point_iter")(f, f.z0, max_iter=3, tol=0.0, tau=0.1)[2]
    torch.testing.assert_close(info["abs_trace"][:, 1], f.residual(f.z0))


def test_an_early_stop_fills_the_states_asked_for(new, tanh):
    f = tanh(rho=0.3)
    for name in SOLVERS:
        z, states, _ = new.get_solver(name)(f, f.z0, max_iter=40, tol=1e-4, indexing=[2, 20, 40])
        assert len(states) == 3
        assert states[1].equal(z)
        assert states[2].equal(z)
        assert not states[0].equal(z)


def test_a_singular_sample_concerns_no_other(original, new, tanh):
    f = tanh(dtype=torch.float64)
    # Without a ridge the system of a sample that is done is singular: torchdeq raises for the whole batch.
    f.z0[1] = f.solution()[1]
    with pytest.raises(RuntimeError):
        original.get_solver("anderson")(f, f.z0, max_iter=60, tol=0.0, lam=0.0)
    z, _, info = new.get_solver("anderson")(f, f.z0, max_iter=60, tol=1e-12, lam=0.0)
    assert (info["abs_lowest"] < 1e-12).all()
    torch.testing.assert_close(z, f.solution(), rtol=0, atol=1e-11)


def test_vanishing_denominators_stay_in_their_sample(original, new, tanh):
    f = tanh(rho=0.9)
    drifts = torch.tensor([False, True, False])[:, None]

    def fn(z):  # g = 1 has no root, and no change from which Broyden could learn
        return torch.where(drifts, z + 1, f(z))

    options = {"max_iter": 12, "tol": 0.0}
    _, _, info = new.get_solver("broyden")(fn, f.z0, **options)
    assert torch.equal(info["abs_trace"][::2], new.get_solver("broyden")(f, f.z0, **options)[2]["abs_trace"][::2])
    assert info["abs_trace"].isfinite().all()
    theirs = original.get_solver("broyden")(fn, f.z0, **options)[2]
    assert not theirs["abs_trace"][1].isfinite().all()


def test_broyden_holds_the_vectors_that_it_has_used():
    f = Tanh(rho=0.9, shape=(500,))
    process = broyden_process(f, f.z0, 10_000, False, 10_001, False)
    for steps in range(1, 12):
        process.advance()
        held = {step.untyped_storage().data_ptr(): step.untyped_storage().nbytes() for step in process.workspace.steps}
        assert sum(held.values()) <= (steps + 3) * f.z0.numel() * f.z0.element_size()


def test_limited_broyden_keeps_the_secant_condition(new, tanh):
    f = tanh(rho=0.98)
    info = new.get_solver("broyden")(f, f.z0, max_iter=40, tol=1e-9, LBFGS_thres=3)[2]
    assert (info["abs_lowest"] < 1e-9).all()


def test_line_search_is_per_sample(new):
    # f'(z) < -1 near the start, so that a full step overshoots; the second sample needs no search
    seen = []

    def f(z):
        seen.append(z.clone())
        return torch.stack([z[0] - torch.atan(z[0]) * 3, 0.5 * z[1] + 1])

    x0 = torch.tensor([[4.0], [0.0]], dtype=torch.float64)
    z, _, info = new.get_solver("broyden")(f, x0, max_iter=30, tol=1e-8, ls=True)
    assert (info["abs_lowest"] < 1e-8).all()
    torch.testing.assert_close(z, torch.tensor([[0.0], [2.0]], dtype=torch.float64), rtol=0, atol=1e-7)
    assert len(seen) > int(info["nstep"].max()) + 1  # trial steps cost calls
    assert seen[1][1] == 1.0  # the full step


@pytest.mark.parametrize("slope", [3, 12])
def test_line_search_does_for_a_sample_what_it_does_for_a_batch_of_one(new, slope):
    def f(z):
        return z - slope * torch.atan(z)

    x0 = torch.tensor([[4.0, 1.0], [0.5, -3.0], [20.0, 30.0]], dtype=torch.float64)
    options = {"max_iter": 8, "tol": 0.0, "ls": True}
    together = new.get_solver("broyden")(f, x0, **options)[2]
    for i in range(len(x0)):  # alone, a sample takes the original's steps
        alone = new.get_solver("broyden")(f, x0[i : i + 1], legacy=True, **options)[2]
        torch.testing.assert_close(together["abs_trace"][i], alone["abs_trace"][0], rtol=1e-6, atol=1e-9)


def test_line_search_comes_back_from_where_f_is_not_finite(new):
    def f(z):
        return torch.where(z > 1.5, torch.nan, 0.5 * z + 1 - 0.1 * z**3)

    x0 = torch.tensor([[-1.8, 0.0], [0.0, 0.1]], dtype=torch.float64)
    info = new.get_solver("broyden")(f, x0, max_iter=40, tol=1e-9, ls=True)[2]
    assert (info["abs_lowest"] < 1e-9).all()


@pytest.mark.parametrize("legacy", [False, True])
def test_damped_anderson_begins_with_an_undamped_step(new, tanh, legacy):
    f, seen = tanh(), []

    def watched(z):
        seen.append(z.clone())
        return f(z)

    new.get_solver("anderson")(watched, f.z0, max_iter=4, tol=0.0, tau=0.3, legacy=legacy)
    assert torch.equal(seen[1], f(f.z0))


def slow_problem():
    """A linear map that Broyden's method solves slowly, alone in its batch, and its start."""
    slopes = torch.linspace(-0.99, 0.99, 80, dtype=torch.float64)
    x = torch.randn(1, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return lambda z: slopes * z + x, torch.zeros_like(x)


def test_progress_is_looked_for_over_time_not_over_the_batch(new):
    f, x0 = slow_problem()
    info = new.get_solver("broyden")(f, x0, max_iter=60, tol=0.03)[2]
    assert info["nstep"].item() > 31
    assert info["abs_lowest"].item() < 0.03
    # Where there is none, and the tolerance is near, a solve ends: here rounding keeps the residual from it.
    calls = []

    def noisy(z):
        calls.append(z)
        return 0.5 * z + 1e-3 * (-1) ** len(calls)

    info = new.get_solver("broyden")(noisy, torch.ones(2, 3, dtype=torch.float64), max_iter=500, tol=1e-3)[2]
    assert len(calls) < 500
    assert (info["abs_lowest"] > 1e-3).any()


def test_legacy_stops_where_the_original_does(original, new):
    f, x0 = slow_problem()
    theirs = original.get_solver("broyden")(f, x0, max_iter=60, tol=0.03)[2]
    ours = new.get_solver("broyden")(f, x0, max_iter=60, tol=0.03, legacy=True)[2]
    assert theirs["nstep"].item() < 31
    for key in ("nstep", "abs_trace"):
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=1e-9)


@each_solver
def test_bad_input(new, tanh, name):
    f = tanh()
    with pytest.raises(ValueError, match="stop_mode must be 'abs' or 'rel', got 'both'"):
        new.get_solver(name)(f, f.z0, stop_mode="both")
    with pytest.raises(TypeError, match="x0 must be a tensor, got list"):
        new.get_solver(name)(f, [f.z0])
    z, _, info = new.get_solver(name)(lambda z: z, torch.zeros(0, 4))
    assert z.shape == (0, 4)
    assert info["abs_lowest"].shape == (0,)


@each_solver
@pytest.mark.parametrize("indexing", [None, [2, 3]])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_a_function_may_modify_its_argument(new, name, indexing, late, shape):
    """relu(z, inplace=True), returned or read afterwards, at every call or from the third on."""
    torch.manual_seed(0)
    x0 = torch.randn(3, *shape, dtype=torch.float64)
    W = torch.randn(4, 4, dtype=torch.float64) / 6
    calls = 0

    def f(z, inplace=False):
        nonlocal calls
        calls += 1
        rectified = torch.nn.functional.relu(z, inplace=inplace and (not late or calls > 2))
        return (rectified.flatten(1) @ W.T + 1).view_as(z)

    solve = new.get_solver(name)
    expected, states, info = solve(f, x0, tol=1e-10, indexing=indexing)
    calls = 0
    start = x0.clone()
    with pytest.warns(UserWarning, match="func modifies its argument in place"):
        z, modified_states, modified = solve(lambda z: f(z, inplace=True), x0, tol=1e-10, indexing=indexing)
    assert x0.equal(start)
    if not late:
        assert z.equal(expected)
        assert all(a.equal(b) for a, b in zip(modified_states, states, strict=True))
        assert modified["abs_trace"].equal(info["abs_trace"])
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-9)
    solve(lambda z: f(z, inplace=True), x0)  # warnings are errors: it is said once


@each_solver
@pytest.mark.parametrize("keep", ["itself", "a view", "in the image"])
def test_an_argument_that_is_kept_does_not_change(new, tanh, name, keep):
    f = tanh(rho=0.9)
    kept, copies = [], []

    def collect(z):
        copies.append(z.clone())
        if keep != "in the image":
            kept.append(z if keep == "itself" else z.detach()[:, 1:])
        return f(z)

    def identity(z):
        copies.append(z.clone())
        kept.append(z)
        return z

    new.get_solver(name)(identity if keep == "in the image" else collect, f.z0 + 1, tol=1e-12, max_iter=20)
    assert len(kept) == len(copies) >= 1
    for argument, copied in zip(kept, copies, strict=True):
        assert argument.equal(copied if keep != "a view" else copied[:, 1:])
    expected = new.get_solver(name)(f, f.z0 + 1, tol=1e-12, max_iter=20)
    again = new.get_solver(name)(collect if keep != "in the image" else f, f.z0 + 1, tol=1e-12, max_iter=20)
    assert again[0].equal(expected[0])
    assert again[2]["abs_trace"].equal(expected[2]["abs_trace"])


def test_an_argument_that_is_not_kept_is_not_copied(new, tanh):
    f = tanh(rho=0.9, dtype=torch.float32)
    memory = set()

    def watched(z):
        memory.add(z.data_ptr())
        return f(z)

    new.anderson_solver(watched, f.z0, tol=0.0, max_iter=20)
    assert len(memory) == 2


@each_solver
@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
@pytest.mark.parametrize("steps", [4, 10])
def test_the_final_state_is_the_one_that_was_measured(td, tanh, name, stop_mode, steps):
    f = tanh(shape=(6, 4), batch=5, radius=1.5)
    seen, images = [], []

    def counted(z):
        y = f(z)
        seen.append(z.detach().clone())
        images.append(y.detach().clone())
        return y

    z, _, info = td.get_solver(name)(counted, f.z0, max_iter=steps, tol=0.0, stop_mode=stop_mode, return_final=True)
    final = seen[-1] if name == "broyden" else images[-1]
    torch.testing.assert_close(z.detach(), final, rtol=0, atol=1e-12)
    residual = (images[-1] - seen[-1]).flatten(1).norm(dim=1)
    torch.testing.assert_close(info["abs_lowest"].detach(), residual, rtol=1e-9, atol=0)


@each_solver
@pytest.mark.parametrize("steps", [3, 6, 11])
def test_the_best_relative_state_is_the_one_that_was_measured(new, tanh, name, steps):
    """When the last step's is the best by its relative residual but not by its absolute one."""
    f = tanh(shape=(6, 4), batch=5, radius=1.5)
    seen = []

    def counted(z):
        y = f(z)
        seen.append((z.clone(), y.detach().clone()))
        return y

    z, _, info = new.get_solver(name)(counted, f.z0, max_iter=steps, tol=0.0, stop_mode="rel")
    relative = torch.stack([(y - z).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1) for z, y in seen])
    lowest, best = relative.min(dim=0)
    torch.testing.assert_close(info["rel_lowest"], lowest, rtol=1e-6, atol=0)
    for sample, step in enumerate(best.tolist()):
        assert z[sample].equal(seen[step][0 if name == "broyden" else 1][sample])


# Legacy mode


OPTIONS = {
    "anderson": ({}, {"m": 3}, {"lam": 1e-2}, {"tau": 0.7}, {"max_iter": 2}),
    "broyden": ({}, {"LBFGS_thres": 4}, {"ls": True}, {"max_iter": 45, "tol": 1e-9}),
    "fixed_point_iter": ({}, {"tau": 0.6}, {"tau": 1.3}),
}


@pytest.mark.parametrize(("name", "options"), [(name, options) for name in SOLVERS for options in OPTIONS[name]])
@each_mode
@pytest.mark.parametrize("how", [{}, {"indexing": [3, 9, 30]}, {"return_final": True, "max_iter": 20}])
def test_legacy_reproduces_the_original(original, new, tanh, name, options, stop_mode, how):
    f, g = tanh(rho=0.9, shape=(3, 5), batch=4), tanh(rho=0.9, shape=(3, 5), batch=4)
    options = {"max_iter": 30, "tol": 1e-5, "stop_mode": stop_mode} | options | how
    with torch.no_grad():
        theirs = original.get_solver(name)(f, f.z0, **options)
    ours = new.get_solver(name)(g, g.z0, legacy=True, **options)
    with pydeq.compat.legacy():
        assert new.get_solver(name)(g, g.z0, **options)[0].equal(ours[0])
    assert g.calls == 2 * f.calls
    # Rounding grows along the iterates of quasi-Newton methods.
    tolerance = {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(ours[0], theirs[0], **tolerance)
    assert len(ours[1]) == len(theirs[1])
    for mine, yours in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(mine, yours, **tolerance)
    for key in STATISTICS:
        torch.testing.assert_close(ours[2][key], theirs[2][key], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("slope", "far"), [(3, 1), (6, 10), (12, 1), (40, 30)])
def test_legacy_line_search_reproduces_the_original(original, new, slope, far):
    def f(z):
        return z - slope * torch.atan(z)

    x0 = far * torch.tensor([[4.0, 1.0], [0.5, -3.0]], dtype=torch.float64)
    options = {"max_iter": 8, "tol": 1e-10, "ls": True}
    theirs = original.get_solver("broyden")(f, x0, **options)[2]
    ours = new.get_solver("broyden")(f, x0, legacy=True, **options)[2]
    torch.testing.assert_close(ours["abs_trace"], theirs["abs_trace"], rtol=1e-6, atol=1e-9)


def test_legacy_does_not_crash(new, tanh):
    solver = new.get_solver("anderson")
    # One sample begins at its solution: its system is singular. The other one is not concerned.
    x0 = torch.tensor([[2.0, 2.0], [0.0, 1.0]], dtype=torch.float64)
    slopes = torch.tensor([0.5, -0.5], dtype=torch.float64)
    z, _, info = solver(lambda z: 2 + slopes * (z - 2), x0, lam=0.0, tol=1e-9, legacy=True)
    assert info["abs_lowest"][0] == 0
    torch.testing.assert_close(z, torch.full_like(z, 2.0), rtol=0, atol=1e-8)
    f = tanh()
    torch.testing.assert_close(
        solver(f, f.z0, m=1, max_iter=200, tol=1e-10, legacy=True)[0], f.solution(), rtol=0, atol=1e-9
    )
    # a zero denominator: the secant equation of g = 1 has no solution
    info = new.get_solver("broyden")(lambda z: z + 1, torch.zeros(2, 3), max_iter=5, legacy=True)[2]
    assert torch.equal(info["abs_trace"][:, 1:], torch.full((2, 5), 3**0.5))


def test_legacy_context_nests_and_ends(new, tanh):
    f = tanh(rho=0.9)
    solver = new.get_solver("anderson")
    plain = solver(f, f.z0, max_iter=12, tol=0.0)[0]
    with pydeq.compat.legacy():
        inside = solver(f, f.z0, max_iter=12, tol=0.0)[0]
        with pydeq.compat.legacy(False):
            assert solver(f, f.z0, max_iter=12, tol=0.0)[0].equal(plain)
        assert solver(f, f.z0, max_iter=12, tol=0.0, legacy=False)[0].equal(plain)
        assert solver(f, f.z0, max_iter=12, tol=0.0)[0].equal(inside)
    assert solver(f, f.z0, max_iter=12, tol=0.0)[0].equal(plain)
    assert not inside.equal(plain)


# The original's registry


@pytest.mark.parametrize("replace", [True, False])
def test_register_puts_the_solvers_into_the_original(original, new, tanh, replace):
    from torchdeq.solver import _solvers

    before = dict(_solvers)
    try:
        new.register(replace=replace)
        assert original.get_solver("pydeq_anderson") is new.get_solver("anderson")
        assert (original.get_solver("broyden") is new.get_solver("broyden")) == replace
        f = tanh()
        deq = original.get_deq(f_solver="pydeq_anderson", f_tol=1e-8, b_solver="pydeq_broyden", b_tol=1e-8, ift=True)
        (z,), info = deq(f, f.z0)
        z.sum().backward()
        assert f.W.grad is not None
        torch.testing.assert_close(z.detach(), f.solution(), rtol=0, atol=1e-7)
        assert (info["abs_lowest"] < 1e-8).all()
    finally:
        _solvers.clear()
        _solvers.update(before)


def test_register_without_the_original_says_what_to_do(new, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchdeq", None)
    monkeypatch.setitem(__import__("sys").modules, "torchdeq.solver", None)
    with pytest.raises(ModuleNotFoundError, match="pip install torchdeq"):
        new.register()


@each_mode
@each_solver
def test_a_solve_of_coupled_samples_ends_where_all_meet_the_tolerance(name, stop_mode):
    """Sample 1 starts at its fixed point and is moved by sample 0; the solution is (2, 1)."""
    calls = []

    def f(z):
        calls.append((z.clone(), torch.stack([0.5 * z[0] + 1.0, torch.relu(z[0] - 1.0)])))
        return calls[-1][1]

    solver = torchdeq.solver.get_solver(name)
    z, _, info = solver(f, torch.zeros(2, 1), tol=1e-5, max_iter=60, stop_mode=stop_mode)
    torch.testing.assert_close(z, torch.tensor([[2.0], [1.0]]), rtol=0, atol=1e-4)
    assert (info[f"{stop_mode}_lowest"] < 1e-5).all()
    at, image = calls[-1]  # what is returned and reported is of the last step, of all samples
    assert torch.equal(z, at) or torch.equal(z, image)
    torch.testing.assert_close(info["abs_lowest"], (image - at).abs()[:, 0], rtol=1e-6, atol=1e-12)


@each_mode
@each_solver
def test_a_solve_that_mixes_states_of_coupled_samples_says_so_once(name, stop_mode):
    """Sample 1 starts at its fixed point, is moved by sample 0, and comes back as it was at the start."""
    slopes, x0 = torch.linspace(0.1, 0.9, 8), torch.zeros(2, 8)

    def coupled(z):
        return torch.stack([slopes * z[0] + 1.0, torch.relu(z[0] - 1.0)])

    def independent(z):
        return torch.stack([slopes * z[0] + 1.0, torch.relu(z[1] - 1.0)])

    solve = functools.partial(torchdeq.solver.get_solver(name), tol=1e-5, max_iter=3, stop_mode=stop_mode)
    solve(independent, x0)  # says nothing
    with pytest.warns(pydeq.CouplingWarning, match=r"1 of 2 samples .* z0\[None\]") as said:
        z, _, info = solve(coupled, x0)
    assert len(said) == 1
    solve(coupled, x0)  # says nothing: warnings are errors here
    assert info["abs_lowest"][1] == 0
    assert (coupled(z) - z)[1].norm() > 0.1  # what is reported of sample 1 is not of this state


def test_one_coupled_system_as_one_sample_reports_its_residual():
    def f(z):
        return torch.stack([0.9 * z[0] + 1.0, torch.relu(z[0] - 1.0)])

    deq = torchdeq.get_deq(f_solver="broyden", f_tol=1e-5, f_max_iter=3)
    deq.eval()
    z, info = deq(lambda z: f(z[0])[None], torch.zeros(2, 1)[None])
    residual = (f(z[-1][0]) - z[-1][0]).norm()
    torch.testing.assert_close(info["abs_lowest"], residual[None], rtol=1e-5, atol=0)
