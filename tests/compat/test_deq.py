"""The replacement of lib.solvers and lib.jacobian, by the published contract."""

import inspect
import math

import pytest
import torch

import pydeq.compat
from pydeq import ConvergenceWarning
from pydeq.compat.deq import anderson, broyden, jac_loss_estimate, power_method

KEYS = {"result", "lowest", "nstep", "prot_break", "abs_trace", "rel_trace", "eps", "threshold"}


@pytest.fixture
def f(tanh):
    return tanh(rho=0.8, shape=(4, 3))  # (B, D, L)


def solve(name, f, threshold, **options):
    if name == "anderson":
        return anderson(f, f.z0, threshold=threshold, **options)
    return broyden(f, f.z0, threshold, **options)


def lengths(name, threshold):
    return threshold - 2 if name == "anderson" else threshold + 1


each = pytest.mark.parametrize("name", ["anderson", "broyden"])
each_mode = pytest.mark.parametrize("stop_mode", ["abs", "rel"])


def test_signatures():
    def defaults(fn):
        return {key: p.default for key, p in inspect.signature(fn).parameters.items() if p.kind != p.KEYWORD_ONLY}

    empty = inspect.Parameter.empty
    assert list(defaults(broyden).items()) == [
        ("f", empty), ("x0", empty), ("threshold", empty), ("eps", 1e-3), ("stop_mode", "rel"), ("ls", False),
        ("name", "unknown"),
    ]  # fmt: skip
    assert list(defaults(anderson).items()) == [
        ("f", empty), ("x0", empty), ("m", 6), ("lam", 1e-4), ("threshold", 50), ("eps", 1e-3), ("stop_mode", "rel"),
        ("beta", 1.0), ("kwargs", empty),
    ]  # fmt: skip
    assert list(defaults(jac_loss_estimate).values())[2:] == [2, True]
    assert defaults(power_method)["n_iters"] == 200


@each
@each_mode
@pytest.mark.parametrize("legacy", [False, True])
def test_without_convergence(name, f, stop_mode, legacy):
    out = solve(name, f, 12, eps=0.0, stop_mode=stop_mode, legacy=legacy)
    assert set(out) == KEYS
    assert f.calls == 12 + (name == "broyden")
    traces = {mode: out[f"{mode}_trace"] for mode in ("abs", "rel")}
    for trace in traces.values():
        assert len(trace) == lengths(name, 12)
        assert all(type(value) is float for value in trace)
    assert type(out["lowest"]) is float
    assert type(out["nstep"]) is int
    assert out["prot_break"] is False
    assert (out["eps"], out["threshold"]) == (0.0, 12)
    assert out["lowest"] == min(traces[stop_mode])
    # the trace begins after x0 (Broyden), or after two evaluations (Anderson); nstep counts evaluations from 0
    assert traces[stop_mode][out["nstep"] - (2 if name == "anderson" else 1)] == out["lowest"]
    # norms are over the whole batch, and the result is x
    result = out["result"]
    assert result.shape == f.z0.shape
    assert not result.requires_grad
    with torch.no_grad():
        image = f(result)
    residual = (image - result).norm().item()
    shift = 1e-5 if name == "anderson" else 1e-9
    expected = residual if stop_mode == "abs" else residual / (image.norm().item() + shift)
    assert out["lowest"] == pytest.approx(expected, rel=1e-9)


@each
@each_mode
def test_stops_at_the_tolerance_and_pads(name, f, stop_mode):
    out = solve(name, f, 60, eps=1e-6, stop_mode=stop_mode)
    assert f.calls < 40
    assert out["lowest"] < 1e-6
    trace = out[f"{stop_mode}_trace"]
    assert len(trace) == lengths(name, 60)
    assert trace[-1] == out["lowest"]
    assert f.calls == out["nstep"] + 1
    torch.testing.assert_close(out["result"], f.solution(), rtol=0, atol=1e-4)


@each
@pytest.mark.parametrize("threshold", [0, 1, 2, 3])
def test_small_thresholds(name, f, threshold):
    out = solve(name, f, threshold)
    assert f.calls == threshold + (name == "broyden")
    assert len(out["abs_trace"]) == max(0, lengths(name, threshold))
    assert out["result"].shape == f.z0.shape


@each
def test_a_solution_to_begin_with_costs_one_call(name, f):
    f.z0 = f.solution()
    f.calls = 0
    out = solve(name, f, 20, eps=1e-6)
    assert f.calls == 1
    assert out["nstep"] == 0
    assert torch.equal(out["result"], f.z0)
    assert out["rel_trace"] == [out["lowest"]] * lengths(name, 20)


def test_protective_break():
    calls, slopes = [], torch.linspace(-0.9, 0.9, 8, dtype=torch.float64)[:, None]

    def f(x):  # moves away for good
        calls.append(x)
        return slopes * x + 1 if len(calls) < 5 else torch.full_like(x, 1e9) * (-1) ** len(calls)

    out = broyden(f, torch.ones(1, 8, 1, dtype=torch.float64), 50, stop_mode="abs", eps=1e-12)
    assert 5 <= len(calls) < 10
    assert out["prot_break"] is True
    assert len(out["abs_trace"]) == 51
    assert math.isfinite(out["lowest"])
    out = broyden(lambda x: x * math.nan, torch.ones(1, 2, 1), 50)
    assert out["prot_break"] is True
    assert torch.equal(out["result"], torch.ones(1, 2, 1))


@each
@each_mode
@pytest.mark.parametrize("threshold", [3, 5, 10, 20])
def test_an_exhausted_threshold_returns_the_iterate_that_was_measured(name, tanh, stop_mode, threshold):
    """Not each sample's best one: ``lowest`` is the residual of ``result``, and that was given to f."""
    f = tanh(shape=(6, 4), batch=5, radius=1.5)
    seen = []

    def counted(z):
        seen.append(z.clone())
        return f(z)

    solve_with = {"anderson": anderson, "broyden": broyden}[name]
    out = solve_with(counted, f.z0, threshold=threshold, eps=0.0, stop_mode=stop_mode)
    result = out["result"]
    assert any(result.equal(z) for z in seen)
    residual = f.residual(result).norm().item()
    with torch.no_grad():
        shift = 1e-5 if name == "anderson" else 1e-9
        expected = residual if stop_mode == "abs" else residual / (f(result).norm().item() + shift)
    assert out["lowest"] == pytest.approx(expected, rel=1e-9)


@each
def test_a_sample_that_is_solved_exactly_does_not_end_the_solve(name, f):
    def first_is_constant(z):
        y = f(z).detach()
        y[0] = 1.0
        return y

    x0 = f.z0.clone()
    x0[0] = 1.0
    out = {"anderson": anderson, "broyden": broyden}[name](first_is_constant, x0, threshold=60, eps=1e-9)
    assert out["prot_break"] is False
    assert out["lowest"] < 1e-9
    torch.testing.assert_close(out["result"][1:], f.solution()[1:], rtol=0, atol=1e-7)


def test_a_sample_that_is_given_up_ends_the_solve(f):
    """A batch's iterate cannot converge with a sample that explodes: that is a protective break."""
    calls = []

    def explodes(z):
        calls.append(z)
        y = 0.5 * z + 1
        y[0] = 1e7 * z[0] + 1e-9
        return y

    out = anderson(explodes, torch.zeros(3, 2, 2, dtype=torch.float64), m=1, threshold=40)
    assert out["prot_break"] is True
    assert len(calls) < 10


@each
def test_a_backward_solve_that_does_not_converge_warns_once(name, f):
    with pytest.warns(ConvergenceWarning, match=rf"the backward solve by {name} left its batch at a residual of"):
        named(name, f, 3)
    named(name, f, 3)  # warnings are errors


@each
def test_a_solve_in_a_hook_is_a_backward_solve(name, f):
    z = f.z0.clone().requires_grad_()
    y = f(z)
    out = y.clone()
    out.register_hook(
        lambda grad: solve_linear(
            name, lambda v: torch.autograd.grad(y, z, v, retain_graph=True)[0] + grad, grad, threshold=4
        )["result"]
    )
    with pytest.warns(ConvergenceWarning, match=f"the backward solve by {name}"):
        out.sum().backward()
    solve(name, f, 3, eps=1e-9)  # no warning
    named(name, f, 60)


def named(name, f, threshold):
    """A solve that says that it is for gradients."""
    return {"anderson": anderson, "broyden": broyden}[name](f, f.z0, threshold=threshold, eps=1e-6, name="backward")


def solve_linear(name, g, grad, threshold):
    return {"anderson": anderson, "broyden": broyden}[name](g, torch.zeros_like(grad), threshold=threshold, eps=1e-9)


def test_a_solve_without_progress_near_the_tolerance_ends():
    calls = []

    def noisy(x):
        calls.append(x)
        return 0.5 * x + 1e-3 * (-1) ** len(calls)

    out = broyden(noisy, torch.ones(2, 3, 1, dtype=torch.float64), 500, eps=1e-3, stop_mode="abs")
    assert 31 < len(calls) < 500
    assert out["lowest"] > 1e-3
    assert out["prot_break"] is False


def test_names_and_other_keywords_are_ignored(f):
    assert anderson(f, f.z0, name="forward", anything=1)["result"].equal(anderson(f, f.z0)["result"])
    assert broyden(f, f.z0, 50, name="forward")["result"].equal(broyden(f, f.z0, 50)["result"])
    with pytest.raises(ValueError, match="stop_mode must be 'abs' or 'rel', got 'both'"):
        broyden(f, f.z0, 5, stop_mode="both")


@pytest.mark.parametrize("options", [{}, {"m": 2}, {"lam": 1e-2}, {"beta": 0.6}])
@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
def test_legacy_anderson_takes_the_originals_steps(original, f, options, stop_mode):
    # torchdeq's Anderson takes the same steps, stops by samples and returns f(x)
    ours = anderson(f, f.z0, threshold=15, eps=0.0, stop_mode=stop_mode, legacy=True, **options)
    renamed = {"tau" if key == "beta" else key: value for key, value in options.items()}
    with torch.no_grad():
        theirs = original.get_solver("anderson")(f, f.z0, max_iter=15, tol=0.0, **renamed)[2]
    expected = theirs["abs_trace"][:, 1:].norm(dim=0)
    torch.testing.assert_close(torch.tensor(ours["abs_trace"], dtype=torch.float64), expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("ls", [False, True])
def test_legacy_broyden_takes_the_originals_steps(original, f, ls):
    with pydeq.compat.legacy():
        ours = broyden(f, f.z0, 15, eps=0.0, ls=ls)
    with torch.no_grad():
        theirs = original.get_solver("broyden")(f, f.z0, max_iter=15, tol=0.0, ls=ls)[2]
    expected = theirs["abs_trace"][:, 1:].norm(dim=0)
    actual = torch.tensor(ours["abs_trace"][:-1], dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-11)


@each
def test_line_search_and_legacy_find_the_same_point(name, f):
    for options in ({"legacy": True}, {"ls": True} if name == "broyden" else {"beta": 1.1, "lam": 1e-12}):
        out = solve(name, f, 80, eps=1e-10, **options)
        torch.testing.assert_close(out["result"], f.solution(), rtol=0, atol=1e-8)


def test_jacobian_estimates():
    torch.manual_seed(0)
    A = torch.diag(torch.tensor([0.5, -0.25]))
    z = torch.randn(3, 2, requires_grad=True)
    assert jac_loss_estimate(z @ A, z, vecs=4000).item() == pytest.approx((0.25 + 0.0625) / 2, rel=0.1)
    evector, evalue = power_method(z @ A, z)
    assert evector.shape == (3, 2)
    torch.testing.assert_close(evalue, torch.full((3, 1), 0.5))
    z3 = torch.randn(3, 2, 4, requires_grad=True)
    rotated = 0.9 * torch.stack([z3[:, 1], -z3[:, 0]], 1)
    torch.testing.assert_close(power_method(rotated, z3)[1], torch.full((3, 1), 0.9))


# Measured on locuslab/deq of 2021-10-28, torch 2.13, float64: residuals ||f(x) - x|| of the steps, calls of f, nstep.
# f is waves(rho) for the first six, else bends.
MEASURED = [
    ("anderson", 0.9, {"threshold": 8}, (8, 7),
     [6.64445653e-02, 9.56873049e-03, 6.91984031e-04, 4.42467118e-04, 3.24765462e-04, 2.79671346e-04]),
    ("anderson", 0.9, {"threshold": 8, "m": 2, "beta": 0.5, "lam": 1e-3}, (8, 7),
     [1.98583117e-01, 3.59791946e-02, 1.67938631e-02, 1.26547586e-02, 7.68795933e-03, 5.29228478e-03]),
    ("anderson", 3.0, {"threshold": 8}, (8, 7),
     [3.64412949e-01, 3.78685768e-01, 3.86974564e-02, 8.98042905e-03, 5.13303153e-03, 3.28862256e-03]),
    ("anderson", 3.0, {"threshold": 8, "m": 2, "beta": 0.5, "lam": 1e-3}, (8, 7),
     [6.26496190e-01, 3.22060711e-01, 5.81392727e-02, 6.32428507e-03, 6.97571752e-03, 2.74010775e-03]),
    ("broyden", 0.9, {"threshold": 8}, (9, 8),
     [4.56493299e-01, 9.67973506e-02, 9.84084697e-03, 2.43474132e-03, 2.25921010e-05, 4.89412139e-07, 2.77529714e-08,
      3.86440324e-10, 3.86440324e-10]),
    ("broyden", 3.0, {"threshold": 8, "ls": True}, (9, 8),
     [1.49118237e+00, 8.75219214e-01, 4.01977699e-01, 1.97201556e-01, 1.34749009e-02, 5.17478240e-03, 9.83912724e-04,
      2.15799195e-04, 2.15799195e-04]),
    # The original evaluates a full step that ends a failed search once more: 25 calls.
    ("broyden", None, {"threshold": 6, "ls": True}, (24, 6),
     [2.98265119e+01, 4.89119567e+01, 3.37506737e+01, 3.14865434e+01, 3.01750513e+01, 2.96919622e+01, 2.96919622e+01]),
]  # fmt: skip


def waves(rho):
    """tanh(W z + x) on (2, 3, 2), ||W|| = ``rho``, without random numbers; and its start."""
    W = torch.sin(1.7 * torch.arange(36, dtype=torch.float64) + 0.3).view(6, 6)
    W = rho * W / torch.linalg.matrix_norm(W, 2)
    x = torch.cos(torch.arange(12, dtype=torch.float64)).view(2, 6)
    return lambda z: torch.tanh(z.reshape(2, -1) @ W.T + x).view_as(z), torch.zeros(2, 3, 2, dtype=torch.float64)


def bends():
    x0 = torch.tensor([[[4.0, 1.0], [-0.5, 2.0]], [[0.5, -3.0], [1.0, 0.2]]], dtype=torch.float64)
    return lambda z: z - 12 * torch.atan(z), x0


@pytest.mark.parametrize(("name", "rho", "options", "counts", "trace"), MEASURED)
@each_mode
def test_legacy_reproduces_what_was_measured(name, rho, options, counts, trace, stop_mode):
    f, x0 = bends() if rho is None else waves(rho)
    calls = []

    def counted(z):
        calls.append(z)
        return f(z)

    solve = {"anderson": anderson, "broyden": broyden}[name]
    out = solve(counted, x0, eps=1e-12, stop_mode=stop_mode, legacy=True, **options)
    assert (len(calls), out["nstep"]) == counts
    assert list(out) == ["result", "lowest", "nstep", "prot_break", "abs_trace", "rel_trace", "eps", "threshold"]
    assert out["abs_trace"] == pytest.approx(trace, rel=1e-5)  # rounding has grown to 1e-7 of a residual of 1e-10
    better = solve(f, x0, eps=1e-12, stop_mode=stop_mode, **options)
    if rho is not None:
        assert min(better["abs_trace"]) <= min(trace) * (1 + 1e-5)


@pytest.mark.parametrize(("stop_mode", "growth"), [("abs", 1e6), ("rel", 1e3)])
@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.9, 1.1])
def test_the_protective_break_is_where_the_original_has_it(stop_mode, growth, length, legacy, share):
    """The limit is a multiple of the first residual and of the length of the sequence."""
    calls, first = 0, 0.0
    x0 = torch.zeros(1, 6 // length, length, dtype=torch.float64)
    W = 0.9 * torch.sin(1.7 * torch.arange(36, dtype=torch.float64) + 0.3).view(6, 6)

    def f(z):
        nonlocal calls, first
        calls += 1
        y = torch.tanh((z.reshape(-1, 6) @ W.T / 3 + 1).view_as(z))
        if calls == 2:
            first = (y - z).norm().item() / (y.norm().item() if stop_mode == "rel" else 1.0)
        if calls == 4:
            direction, target = torch.ones_like(z) / 6**0.5, share * first * growth * length
            return z + target * direction if stop_mode == "abs" else direction * z.norm() / target
        return y

    out = broyden(f, x0, 9, eps=1e-15, stop_mode=stop_mode, legacy=legacy)
    assert out["prot_break"] is (share > 1)
    assert calls == (4 if share > 1 else 10)
    assert len(out["abs_trace"]) == 10
    if share > 1:
        assert out["nstep"] == 2
