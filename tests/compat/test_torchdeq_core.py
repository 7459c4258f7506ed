"""get_deq in every mode: its contract on replacement and original, gradients, and what the replacement does better."""

import argparse
import copy
import pickle

import pytest
import torch
from torch import nn

import pydeq.compat
from pydeq import ConvergenceWarning

TIGHT = {"f_max_iter": 80, "f_tol": 1e-12, "b_max_iter": 80, "b_tol": 1e-12}


class Pair:
    """A map of two states (3, 4) and (3, 2, 2), coupled; the first is given x."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        W = torch.randn(8, 8, generator=generator, dtype=torch.float64)
        self.W = (0.7 * W / torch.linalg.matrix_norm(W, 2)).requires_grad_()
        self.x = torch.randn(3, 8, generator=generator, dtype=torch.float64)
        self.z0 = (torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 2, 2, dtype=torch.float64))

    def __call__(self, a, b):
        z = torch.tanh(torch.cat([a, b.flatten(1)], 1) @ self.W.T + self.x)
        return z[:, :4], z[:, 4:].view(3, 2, 2)


def implicit_gradient(f, weights):
    """d/dW of sum(weights * z*), by unrolling."""
    z = f.z0
    for _ in range(150):
        z = f(z)
    return torch.autograd.grad((weights * z).sum(), f.W)[0]


def loss_of(states):
    """A loss in which every entry of every state has its own weight."""
    parts = [part for state in states for part in (state if isinstance(state, list | tuple) else [state])]
    return sum(
        (torch.linspace(-1, 2, part.numel(), dtype=part.dtype).view_as(part) * part).sum() * (i + 1)
        for i, part in enumerate(parts)
    )


SOLVERS = ("anderson", "broyden", "fixed_point_iter")
# options -> states returned in training
MODES = [
    ({}, 1),
    ({"tau": 0.6}, 1),
    ({"grad": 3, "tau": 0.8}, 1),
    ({"grad": 5, "sup_gap": 2}, 2),
    ({"grad": 5, "sup_loc": [1, 4]}, 3),
    ({"ift": True}, 1),
    ({"hook_ift": True}, 1),
    ({"ift": True, "b_solver": "anderson"}, 1),
    ({"ift": True, "b_solver": "broyden", "b_stop_mode": "rel"}, 1),
    ({"n_states": 3}, 3),
    ({"n_states": 2, "grad": [1, 2]}, 2),
    ({"n_states": 2, "ift": True}, 2),
    ({"indexing": [4, 11]}, 3),
    ({"indexing": [4], "grad": [2, 1], "tau": 0.9}, 2),
    ({"indexing": [7], "ift": True}, 2),
    ({"f_stop_mode": "rel"}, 1),
]


def run(module, options, f, f_max_iter=12, **more):
    deq = module.get_deq(**{"f_max_iter": f_max_iter, "f_tol": 1e-12, **options, **more})
    states, info = deq(f, f.z0)
    f.W.grad = None
    loss_of(states).backward()
    return states, info, f.W.grad.clone()


@pytest.mark.parametrize(("options", "count"), MODES)
@pytest.mark.parametrize("core", ["sliced", "indexing"])
def test_training_returns_states_with_gradients(td, tanh, options, count, core):
    f = tanh(rho=0.5, shape=(2, 3))
    # the original forgets states when it stops early
    options = {**TIGHT, "f_tol": 0.0, "f_max_iter": 40, **options}
    states, info, gradient = run(td, {"core": core, "f_solver": "anderson", **options}, f)
    assert isinstance(states, list)
    assert len(states) == count
    assert all(state.shape == f.z0.shape and state.requires_grad for state in states)
    assert (info["sradius"] == -1).all()
    solution = f.solution()
    torch.testing.assert_close(states[-1].detach(), solution, rtol=0, atol=1e-3 if len(states) > 1 else 1e-9)
    if count == 1:
        weights = torch.linspace(-1, 2, solution.numel(), dtype=solution.dtype).view_as(solution)
        if options.get("ift") or options.get("hook_ift"):
            expected = implicit_gradient(f, weights)
        else:
            z, tau = solution, options.get("tau", 1.0)
            for _ in range(options.get("grad", 1)):
                z = tau * f(z) + (1 - tau) * z
            expected = torch.autograd.grad((weights * z).sum(), f.W)[0]
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("options", "count"), MODES)
@pytest.mark.parametrize("core", ["sliced", "indexing"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_legacy_reproduces_the_original(original, new, tanh, options, count, core, solver):
    f = tanh(rho=0.6)
    options = {"core": core, "f_solver": solver, "b_tol": 1e-10, "b_max_iter": 60, **options}
    theirs = run(original, options, f, f_tol=1e-5)
    with pydeq.compat.legacy():
        ours = run(new, options, f, f_tol=1e-5)
    assert len(ours[0]) == len(theirs[0])
    for mine, yours in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-7, atol=1e-9)
    for key in theirs[1]:
        torch.testing.assert_close(ours[1][key], theirs[1][key], rtol=1e-5, atol=1e-9)
    # Where the adjoint is linearized differs: at f(z) there, at z here, like the rest of the gradient.
    implicit = options.get("ift") or options.get("hook_ift")
    torch.testing.assert_close(
        ours[2], theirs[2], rtol=0, atol=1e-3 * theirs[2].abs().max().item() if implicit else 1e-9
    )


@pytest.mark.parametrize("mode", [{}, {"grad": 2, "tau": 0.5}, {"ift": True}, {"n_states": 2}])
@pytest.mark.parametrize("core", ["sliced", "indexing"])
@pytest.mark.parametrize("solver", [*SOLVERS, "simple_fixed_point_iter"])
def test_tuples_of_states(td, mode, core, solver):
    if td is not pydeq.compat.torchdeq and solver == "simple_fixed_point_iter" and "ift" in mode:
        pytest.skip("the original cannot")
    f = Pair()
    options = {**TIGHT, "core": core, "f_solver": solver, **mode, "f_tol": 0.0}
    states, _, gradient = run(td, options, f)
    assert len(states) == mode.get("n_states", 1)
    for state in states:
        assert [part.shape for part in state] == [part.shape for part in f.z0]
    a, b = states[-1]
    with torch.no_grad():
        for part, image in zip((a, b), f(a, b), strict=True):
            torch.testing.assert_close(part, image, rtol=0, atol=1e-8)
    assert gradient.abs().max() > 0
    if "ift" in mode:
        z = f.z0
        for _ in range(150):
            z = f(*z)
        torch.testing.assert_close(gradient, torch.autograd.grad(loss_of([z]), f.W)[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solver", [*SOLVERS, "simple_fixed_point_iter"])
@pytest.mark.parametrize("core", ["sliced", "indexing"])
def test_evaluation(td, tanh, solver, core):
    f = tanh(rho=0.5)
    deq = td.get_deq(core=core, f_solver=solver, f_max_iter=10, eval_factor=3.5, ift=True, n_states=2).eval()
    f.calls = 0
    states, info = deq(f, f.z0)
    assert len(states) == 1
    assert not states[0].requires_grad or solver == "simple_fixed_point_iter"
    assert info["sradius"].tolist() == [0.0]
    assert f.calls <= 36
    assert info["abs_lowest"].max() < 1e-3
    f.calls = 0
    deq(f, f.z0, solver_kwargs={"f_max_iter": 3})
    assert f.calls <= 4
    assert td.get_deq(f_max_iter=10, eval_factor=3.5).eval_f_max_iter == 35
    assert td.get_deq(f_max_iter=10, eval_f_max_iter=7, eval_factor=3.0).eval_f_max_iter == 7


def test_spectral_radius_in_evaluation(td):
    A = torch.diag(torch.tensor([0.8, 0.3, -0.1]))
    _, info = td.get_deq(f_max_iter=60).eval()(lambda z: z @ A, torch.ones(2, 3), sradius_mode=True)
    torch.testing.assert_close(info["sradius"], torch.full((2,), 0.8), rtol=1e-3, atol=0)
    _, info = td.get_deq().eval()(
        lambda a, b: (0.5 * b, 0.5 * a), (torch.ones(2, 1), torch.ones(2, 1)), sradius_mode=True
    )
    assert info["sradius"].shape == (2,)


def test_solver_kwargs_override_the_steps_of_one_call(td, tanh):
    f = tanh()
    deq = td.get_deq(f_solver="anderson", f_max_iter=30, f_tol=0.0)
    deq(f, f.z0, solver_kwargs={"f_max_iter": 5, "m": 2})
    assert f.calls == 6  # and one for the gradient
    deq(f, f.z0)
    assert f.calls == 6 + 31


def test_backward_writer_sees_the_backward_solve(td, tanh):
    f = tanh()
    seen = []
    (z,), _ = td.get_deq(ift=True, f_max_iter=60, b_max_iter=25, b_tol=1e-9)(f, f.z0, backward_writer=seen.append)
    assert seen == []
    z.sum().backward()
    assert len(seen) == 1
    assert (seen[0]["abs_lowest"] < 1e-3).all()
    assert seen[0]["abs_trace"].shape == (3, 26)


def test_options_come_from_namespaces_mappings_and_keywords(td):
    parser = argparse.ArgumentParser()
    td.add_deq_args(parser)
    args = parser.parse_args(
        ["--f_solver", "broyden", "--core", "indexing", "--f_max_iter", "7", "--grad", "2", "--ift"]
    )
    for config in (args, vars(args), td.utils.config.DEQConfig(args)):
        deq = td.get_deq(config, f_tol=0.5)
        assert type(deq).__name__ == "DEQIndexing"
        assert (deq.f_max_iter, deq.f_tol, deq.b_tol) == (7, 0.5, 1e-6)
        assert deq.f_solver is td.get_solver("broyden")
    with pytest.raises(AssertionError):
        td.get_deq(core="nothing")
    with pytest.raises(AssertionError):
        td.get_deq(f_solver="nothing")
    with pytest.raises(ValueError):
        td.get_deq(n_states=3, grad=[1, 2])
    with pytest.raises(AssertionError):
        td.get_deq(grad=0)


def test_defaults(td):
    deq = td.get_deq()
    assert type(deq).__name__ == "DEQSliced"
    assert deq.f_solver is deq.b_solver is td.get_solver("fixed_point_iter")
    assert (deq.f_max_iter, deq.b_max_iter, deq.f_tol, deq.b_tol) == (40, 40, 1e-3, 1e-6)
    assert (deq.f_stop_mode, deq.b_stop_mode, deq.eval_f_max_iter) == ("abs", "abs", 40)
    assert deq.indexing == [40]


def test_sampled_steps(td):
    for options, sliced, indexed in (
        ({"n_states": 4}, [10] * 4, [10, 20, 30, 40]),
        ({"n_states": 3}, [13] * 3, [14, 27, 40]),
        ({"indexing": [5, 15]}, [5, 10, 25], [5, 15, 40]),
        ({"n_states": 2, "indexing": [5]}, [20, 20], [20, 40]),
    ):
        assert td.get_deq(core="sliced", **options).indexing == sliced
        assert td.get_deq(core="indexing", **options).indexing == indexed


def test_names_of_the_state(td):
    for core, name in (("sliced", "z_star"), ("indexing", "z_init")):
        (z,), _ = td.get_deq(core=core)(lambda z: 0.5 * z, **{name: torch.ones(1, 2)})
        assert z.shape == (1, 2)


def test_cores_of_ones_own(td):
    class Core(td.core.DEQBase):
        def forward(self, func, z_init, **kwargs):
            z, _, info = self.f_solver(func, z_init, max_iter=self.f_max_iter, tol=self.f_tol)
            return [z], info

    td.register_deq("own", Core)
    try:
        deq = td.get_deq(core="own", f_solver="anderson", f_max_iter=20, anything=1)
        (z,), _ = deq(lambda z: 0.5 * z + 1, torch.zeros(2, 3))
        torch.testing.assert_close(z, torch.full((2, 3), 2.0), rtol=0, atol=1e-2)
    finally:
        del td.core._core["own"]


# What the replacement does better


def test_namespaces_are_left_alone(new):
    args = argparse.Namespace(f_solver="anderson")
    new.get_deq(args, f_max_iter=3)
    new.apply_norm(nn.Linear(2, 2), args=args, norm_clip=True)
    assert vars(args) == {"f_solver": "anderson"}


def test_backward_solver_options(new, tanh):
    f, seen = tanh(rho=0.95), []
    options = {"ift": True, "b_solver": "broyden", "b_tol": 1e-10, "b_solver_kwargs": {"max_iter": 7}}
    new.get_deq(**options)(f, f.z0, backward_writer=seen.append)[0][0].sum().backward()
    assert seen[0]["abs_trace"].shape[1] == 8
    f.calls = 0
    new.get_deq(
        f_solver="anderson", f_tol=0.0, f_solver_kwargs={"max_iter": 9} | {"m": 1}
    )  # max_iter belongs to f_max_iter
    z = new.get_deq(f_solver="anderson", f_max_iter=9, f_tol=0.0, f_solver_kwargs={"m": 1})(f, f.z0)[0][0]
    plain = new.get_deq(f_max_iter=9, f_tol=0.0)(f, f.z0)[0][0]
    torch.testing.assert_close(z, plain)


def test_unknown_options_are_named(new):
    with pytest.warns(UserWarning, match="no option 'f_maxiter': did you mean 'f_max_iter'"):
        new.get_deq(f_maxiter=3)


@pytest.mark.parametrize("core", ["sliced", "indexing"])
def test_an_early_stop_keeps_all_states_and_the_implicit_gradient(new, tanh, core):
    f = tanh(rho=0.3)
    f.W.grad = None
    states, _ = new.get_deq(core=core, n_states=3, ift=True, f_solver="anderson", f_tol=1e-11, b_tol=1e-11)(f, f.z0)
    assert len(states) == 3
    weights = torch.linspace(-1, 2, f.z0.numel(), dtype=f.z0.dtype).view_as(f.z0)
    (weights * states[-1]).sum().backward()
    torch.testing.assert_close(f.W.grad, implicit_gradient(f, weights), rtol=1e-6, atol=1e-8)


def test_fewer_steps_than_states_keep_the_implicit_gradient(new, tanh):
    f = tanh(rho=0.3)
    deq = new.get_deq(core="indexing", n_states=3, grad=1, ift=True, f_max_iter=40)
    states, _ = deq(f, f.z0, solver_kwargs={"f_max_iter": 2})
    assert len(states) == 2
    assert "AdjointSolve" in type(states[-1].grad_fn.next_functions[0][0]).__name__  # behind a copy


def test_second_derivatives_are_exact(new):
    a = torch.tensor([0.5, 0.3], dtype=torch.float64, requires_grad=True)

    def f(z):  # z* = 1 / (1 - a)
        return a * z + 1

    (z,), _ = new.get_deq(ift=True, f_max_iter=100, f_tol=1e-13, b_max_iter=100, b_tol=1e-13)(
        f, torch.zeros(1, 2, dtype=torch.float64)
    )
    (first,) = torch.autograd.grad(z.sum(), a, create_graph=True)
    torch.testing.assert_close(first, (1 - a) ** -2)
    (second,) = torch.autograd.grad(first.sum(), a)
    torch.testing.assert_close(second, 2 * (1 - a) ** -3)


def test_two_forwards_share_one_backward(new, tanh):
    f = tanh(rho=0.5)
    deq = new.get_deq(hook_ift=True, f_max_iter=60, f_tol=1e-12, b_max_iter=60, b_tol=1e-12)
    (one,), _ = deq(f, f.z0)
    (two,), _ = deq(f, f.z0)
    (one.sum() + 2 * two.sum()).backward()
    torch.testing.assert_close(f.W.grad, implicit_gradient(f, torch.full_like(f.z0, 3.0)), rtol=1e-6, atol=1e-8)


def test_backward_follows_the_mode_of_its_forward(new, tanh):
    f = tanh(rho=0.9)
    deq = new.get_deq(ift=True, b_solver="anderson", b_max_iter=12, b_tol=0.0)

    def residuals(legacy):
        seen = []
        with pydeq.compat.legacy(legacy):
            (z,), _ = deq(f, f.z0, backward_writer=seen.append)
        z.sum().backward()
        return seen[0]["abs_trace"]

    def expected(legacy, start):
        with pydeq.compat.legacy(legacy):
            z = new.get_solver("fixed_point_iter")(f, f.z0, max_iter=40)[0].requires_grad_()
            y = f(z)
            return new.get_solver("anderson")(
                lambda u: torch.autograd.grad(y, z, u, retain_graph=True)[0] + 1, start, max_iter=12, tol=0.0
            )[2]["abs_trace"]

    torch.testing.assert_close(residuals(True), expected(True, torch.zeros_like(f.z0)))
    torch.testing.assert_close(residuals(False), expected(False, torch.ones_like(f.z0)))
    assert not torch.allclose(residuals(True), residuals(False), atol=1e-6)
    deq = new.get_deq(ift=True, b_solver="anderson", b_max_iter=12, b_tol=0.0, legacy=True)
    assert torch.equal(residuals(False), residuals(True))


def test_autocast(new):
    torch.manual_seed(0)
    linear = nn.Linear(8, 8)
    with torch.no_grad():
        linear.weight.mul_(0.5)

    def gradient(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (z,), _ = new.get_deq(ift=True, f_solver="anderson", f_stop_mode="rel", f_tol=1e-2)(
                lambda z: torch.tanh(linear(z)), torch.ones(4, 8)
            )
        assert z.dtype == torch.float32
        linear.zero_grad()
        z.square().sum().backward()
        return linear.weight.grad.clone()

    gradient(False)
    assert gradient(True).isfinite().all()


def test_without_gradients_nothing_is_attached(new, tanh):
    f = tanh()
    deq = new.get_deq(ift=True)
    with torch.no_grad():
        (z,), _ = deq(f, f.z0)
    assert not z.requires_grad


def test_a_nonfinite_adjoint_gives_nan_gradients(new):
    a = torch.tensor(0.5, requires_grad=True)
    (z,), _ = new.get_deq(ift=True)(lambda z: a * z + 1, torch.zeros(2, 1))
    (torch.tensor([[torch.inf], [1.0]]) * z).sum().backward()
    assert a.grad.isnan()


def test_modules_are_copied_and_pickled(new, tanh):
    f = tanh()
    deq = new.get_deq(core="indexing", ift=True, n_states=2, f_solver="anderson")
    deq(f, f.z0)[0][-1].sum().backward()
    for again in (copy.deepcopy(deq), pickle.loads(pickle.dumps(deq))):
        assert again(f, f.z0)[0][-1].equal(deq(f, f.z0)[0][-1])


def test_custom_backward_solvers_begin_at_zero(new, tanh):
    starts = []

    def solver(func, x0, max_iter=0, tol=0.0, stop_mode="abs", **kwargs):
        starts.append(x0)
        z = x0
        for _ in range(200):
            z = func(z)
        return z, [], new.SolverStat()

    new.register_solver("own", solver)
    try:
        f = tanh(rho=0.5)
        (z,), _ = new.get_deq(ift=True, b_solver="own", f_max_iter=60, f_tol=1e-12)(f, f.z0)
        z.sum().backward()
        assert (starts[0] == 0).all()
        torch.testing.assert_close(f.W.grad, implicit_gradient(f, torch.ones_like(f.z0)), rtol=1e-6, atol=1e-8)
    finally:
        del new.solver._solvers["own"]


def test_a_backward_solver_may_report_nothing(td, tanh):
    def solver(func, x0, **kwargs):
        for _ in range(200):
            x0 = func(x0)
        return x0, [], {}

    td.register_solver("silent", solver)
    try:
        f = tanh(rho=0.5)
        (z,), _ = td.get_deq(ift=True, b_solver="silent", f_max_iter=60, f_tol=1e-12)(f, f.z0)
        z.sum().backward()
        torch.testing.assert_close(f.W.grad, implicit_gradient(f, torch.ones_like(f.z0)), rtol=1e-6, atol=1e-8)
    finally:
        del td.solver._solvers["silent"]


@pytest.mark.filterwarnings("ignore:func modifies its argument in place")
@pytest.mark.parametrize("options", [{"grad": 3}, {"ift": True}, {"core": "indexing", "n_states": 3, "grad": 2}])
def test_a_cell_may_modify_its_argument(new, options):
    """With states that were not reached before the solve was done, and the evaluations for gradients."""
    torch.manual_seed(0)
    W = (0.2 * torch.randn(6, 6, dtype=torch.float64)).requires_grad_()
    z0 = torch.randn(4, 6, dtype=torch.float64)
    deq = new.get_deq(f_solver="anderson", f_tol=1e-10, b_solver="anderson", b_tol=1e-10, **options)

    def gradient(rectified):
        states, _ = deq(lambda z: torch.tanh(rectified(z) @ W.T) + 1, z0)
        return [*states, torch.autograd.grad(sum(z.sum() for z in states), W)[0]]

    for inplace, pure in zip(gradient(torch.relu_), gradient(torch.relu), strict=True):
        torch.testing.assert_close(inplace, pure, rtol=0, atol=1e-9)


@pytest.mark.parametrize("core", ["DEQSliced", "DEQIndexing"])
@pytest.mark.parametrize("extra", [False, True])
def test_subclasses_may_replace_the_solve(td, tanh, core, extra):
    """With the signature of the original's method, and what that returns; and with one of its own."""
    base = getattr(td.core, core)
    calls = []

    def solved(self, deq_func, z_init, steps, options):
        calls.append(steps)
        with torch.no_grad():
            z, states, info = self.f_solver(deq_func, x0=z_init, max_iter=steps, **options)
        return (z, info) if core == "DEQSliced" else (z, states or [z], info)

    class Plain(base):
        if extra:

            def _solve_fixed_point(self, deq_func, z_init, f_max_iter=40, solver_kwargs=None, **kw):
                return solved(self, deq_func, z_init, f_max_iter, {"tol": 1e-9})

        elif core == "DEQSliced":

            def _solve_fixed_point(self, deq_func, z_init, f_max_iter, solver_kwargs):
                return solved(self, deq_func, z_init, f_max_iter, {"tol": 1e-9})

        else:

            def _solve_fixed_point(self, deq_func, z_init, f_max_iter=None, indexing=None, solver_kwargs=None):
                return solved(self, deq_func, z_init, f_max_iter, {"tol": 1e-9, "indexing": indexing})

    class Wrapped(base):
        def _solve_fixed_point(self, *args, **kwargs):
            found = super()._solve_fixed_point(*args, **kwargs)
            calls.append(len(found))
            return found

    f = tanh(rho=0.5)
    for kind in (Plain, Wrapped):
        deq = kind(f_max_iter=60, f_tol=1e-9, ift=True)
        for training in (True, False):
            deq.train(training)
            calls.clear()
            (z,), info = deq(f, f.z0)
            torch.testing.assert_close(z, f.solution(), rtol=0, atol=1e-8)
            assert calls == [60 if kind is Plain else 2 if core == "DEQSliced" else 3]
            assert info["abs_lowest"].max() < 1e-9


@pytest.mark.parametrize("b_solver", ["anderson", "broyden", "fixed_point_iter"])
@pytest.mark.parametrize("b_stop_mode", ["abs", "rel"])
def test_a_backward_solve_that_does_not_converge_warns_once(new, tanh, b_solver, b_stop_mode):
    f = tanh(rho=0.99, shape=(24,))
    options = {"ift": True, "f_solver": "anderson", "f_max_iter": 80, "f_tol": 1e-10, "b_solver": b_solver}
    deq = new.get_deq(b_stop_mode=b_stop_mode, b_max_iter=3, **options)
    with pytest.warns(ConvergenceWarning, match=r"backward solve by .* left \d of 3 samples.*b_max_iter"):
        deq(f, f.z0)[0][-1].sum().backward()
    deq(f, f.z0)[0][-1].sum().backward()  # warnings are errors
    pydeq.compat.warning._said.clear()
    new.get_deq(b_stop_mode=b_stop_mode, b_max_iter=200, **options)(f, f.z0)[0][-1].sum().backward()


def test_a_backward_tolerance_that_is_large_next_to_the_gradient_warns(new, tanh):
    """As b_tol is by default where the loss is a mean over many terms."""
    f = tanh(rho=0.95, shape=(24,))
    deq = new.get_deq(ift=True, f_solver="anderson", f_max_iter=80, f_tol=1e-10, b_solver="anderson")
    deq(f, f.z0)[0][-1].sum().backward()  # no warning
    with pytest.warns(ConvergenceWarning, match=r"left a residual of .* times the gradient.*b_stop_mode='rel'"):
        (1e-7 * deq(f, f.z0)[0][-1]).sum().backward()
    deq = new.get_deq(ift=True, f_solver="anderson", b_solver="anderson", b_stop_mode="rel", b_tol=1e-4)
    (1e-7 * deq(f, f.z0)[0][-1]).sum().backward()
    (0 * deq(f, f.z0)[0][-1]).sum().backward()


def test_a_tolerance_out_of_reach_of_rounding_does_not_warn(new, tanh):
    f = tanh(rho=0.5, dtype=torch.float32)
    deq = new.get_deq(ift=True, f_solver="anderson", b_solver="anderson", b_tol=1e-6)
    (1e6 * deq(f, f.z0)[0][-1]).sum().backward()


# Dynamo looks at the .grad of what comes out of one graph and goes into the next.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_the_compiler_leaves_the_solve_alone(new, tanh):
    f = tanh()
    deq = new.get_deq(ift=True, f_solver="anderson", b_solver="anderson", f_tol=1e-10, b_tol=1e-10)

    def step(W):
        z, _ = deq(lambda z: torch.tanh(z.flatten(1) @ W.T + f.x).view_as(z), 1 * f.z0)
        return z[-1].square().sum()

    def gradient(fn):
        return torch.autograd.grad(fn(f.W), f.W)[0]

    torch._dynamo.reset()
    try:
        # What is before and after the layer, and the map without and with gradients.
        assert torch._dynamo.explain(step)(f.W).graph_count == 4
        torch.testing.assert_close(gradient(torch.compile(step, backend="eager")), gradient(step))
    finally:
        torch._dynamo.reset()


def test_transforms_of_torch_func_are_refused(new, tanh):
    f = tanh()
    deq = new.get_deq(f_solver="anderson")
    with pytest.raises(RuntimeError, match=r"torch\.func transforms.*use pydeq\.DEQ"):
        torch.func.grad(lambda W: deq(lambda z: torch.tanh(z @ W.T + f.x), f.z0)[0][-1].sum())(f.W.detach())
