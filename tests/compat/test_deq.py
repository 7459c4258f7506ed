"""The replacement of lib.solvers and lib.jacobian, by the published contract."""

import inspect
import math

import pytest
import torch

import pydeq.compat
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
