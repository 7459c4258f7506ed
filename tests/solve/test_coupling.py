"""Samples that depend on each other: CONVERGED holds for all of them at one and the same evaluation."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pydeq
from pydeq import Status
from pydeq.solve import iteration
from pydeq.testing import CallCounter, assert_close, assert_identical, softsign_map

ADJOINT_SOLVERS = (pydeq.Anderson(), pydeq.Picard(), pydeq.Broyden(), pydeq.GMRES())


@pytest.fixture(autouse=True)
def silent(monkeypatch):
    """The warning is said once per process: as if it had been said."""
    monkeypatch.setattr(iteration, "_warned_of_coupling", True)


def relay(z):
    """Row 1 starts at its fixed point, and is moved by row 0; the solution is (2, 1)."""
    return torch.stack([0.5 * z[0] + 1.0, torch.relu(z[0] - 1.0)])


def coupled_map(batch, dim, rho, seed, dtype=torch.float64, spread=1.0):
    """A contraction that mixes its rows: f(z) = tanh(P z W + x), the rows of x of mixed scales."""
    generator = torch.Generator().manual_seed(seed)
    P = torch.randn(batch, batch, generator=generator, dtype=torch.float64)
    W = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    P, W = P / torch.linalg.matrix_norm(P, 2), W / torch.linalg.matrix_norm(W, 2)
    scale = torch.logspace(0, -spread, batch, dtype=torch.float64)[:, None]
    x = (scale * torch.randn(batch, dim, generator=generator, dtype=torch.float64)).to(dtype)
    P, W = (rho * P).to(dtype), W.to(dtype)
    return lambda z: torch.tanh(P @ z @ W + x)


def check_converged(fn, solution, rtol, atol=0.0):
    """CONVERGED samples met the tolerance at one evaluation; if all did, it is the one of the value."""
    value, image = solution.value.double(), fn(solution.value).double()
    slack = 64 * torch.finfo(solution.value.dtype).eps
    if bool(solution.converged.all()):
        residual = (image - value).norm(dim=1)
        bound = atol + rtol * image.norm(dim=1)
        assert (residual <= bound * (1 + 1e-5) + slack * image.norm(dim=1)).all(), (residual / bound).max()
        assert_close(solution.image.double(), image, dtype=solution.value.dtype, size=value.shape[1], condition=1e2)


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_row_that_starts_solved_is_moved_by_another(solver, dtype, freeze):
    fn = CallCounter(relay)
    z0 = torch.zeros(2, 1, dtype=dtype)
    solution = pydeq.fixed_point(fn, z0, solver=solver, freeze=freeze, trace=True)
    assert solution.converged.all()
    assert solution.nfe == fn.calls == len(solution.trace)
    rtol = 1e-3 if torch.finfo(dtype).bits >= 32 else 1e-2
    torch.testing.assert_close(solution.value.double(), torch.tensor([[2.0], [1.0]]).double(), rtol=0, atol=4 * rtol)
    assert torch.equal(relay(solution.value), solution.image)
    residual = (solution.image.double() - solution.value.double()).abs()[:, 0]
    torch.testing.assert_close(solution.residual.double(), residual, rtol=1e-6, atol=0)


def test_an_exhausted_solve_says_which_rows_moved():
    """A row that was done, and is moved before the last evaluation, ends as MAX_STEPS with its true residual."""
    for max_steps in range(3, 9):
        solution = pydeq.fixed_point(relay, torch.zeros(2, 1), solver=pydeq.Picard(), max_steps=max_steps)
        assert solution.status.tolist() == [Status.MAX_STEPS] * 2
        residual = (relay(solution.value) - solution.value).abs()[:, 0]
        assert torch.equal(solution.residual, residual)
        assert torch.equal(solution.image, relay(solution.value))


@given(
    batch=st.integers(2, 6),
    dim=st.integers(1, 5),
    rho=st.floats(0.1, 0.95),
    spread=st.floats(0.0, 6.0),
    rtol=st.sampled_from([1e-2, 1e-4, 1e-6]),
    max_steps=st.sampled_from([3, 8, 30, 200]),
    freeze=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_converged_holds_for_all_rows_at_one_evaluation(
    solver, batch, dim, rho, spread, rtol, max_steps, freeze, dtype, seed
):
    fn = coupled_map(batch, dim, rho, seed, dtype, spread)
    seen = []

    def recorded(z):
        seen.append((z.clone(), fn(z)))
        return seen[-1][1]

    iteration._warned_of_coupling = True
    z0 = torch.zeros(batch, dim, dtype=dtype)
    solution = pydeq.fixed_point(recorded, z0, solver=solver, rtol=rtol, max_steps=max_steps, freeze=freeze)
    assert solution.nfe == len(seen) <= max_steps
    check_converged(fn, solution, rtol)
    # Also where other samples have not converged: at the last evaluation.
    z, f = seen[-1]
    rows = solution.converged
    assert torch.equal(solution.value[rows], z[rows])
    residual, size = (f - z).double().norm(dim=1), f.double().norm(dim=1)
    assert (residual[rows] <= rtol * size[rows] * (1 + 1e-5)).all()
    assert_close(solution.residual[rows], residual[rows].to(solution.residual.dtype), size=dim, condition=1e2)


@given(
    batch=st.integers(2, 5),
    rho=st.floats(0.05, 0.95),
    scale=st.floats(-6.0, 0.0),
    max_steps=st.sampled_from([3, 5, 8, 12, 30, 100]),
    seed=st.integers(0, 1000),
)
def test_converged_holds_for_all_parts_at_one_evaluation(solver, batch, rho, scale, max_steps, seed):
    """norm="parts": of two parts, the second 10**scale times as large, and moved by the first one of every row."""
    first = coupled_map(batch, 3, rho, seed, spread=4.0)
    second = coupled_map(batch, 3, rho, seed + 1)

    def fn(z):
        return first(z[0]), 10.0**scale * torch.tanh(second(z[1] / 10.0**scale) + 0.5 * z[0] - 0.3 * z[0].mean())

    seen = []

    def recorded(z):
        seen.append((tuple(part.clone() for part in z), fn(z)))
        return seen[-1][1]

    iteration._warned_of_coupling = True
    z0 = (torch.zeros(batch, 3, dtype=torch.float64),) * 2
    solution = pydeq.fixed_point(recorded, z0, solver=solver, rtol=1e-4, max_steps=max_steps, norm="parts")
    assert solution.nfe == len(seen) <= max_steps
    rows = solution.converged
    for value, z, f in zip(solution.value, *seen[-1], strict=True):
        torch.testing.assert_close(value[rows], z[rows], rtol=1e-12, atol=0)
        assert ((f - z).norm(dim=1) <= 1e-4 * f.norm(dim=1) * (1 + 1e-5))[rows].all()


@pytest.mark.parametrize("rtol", [1e-3, 1e-6])
def test_picard_solves_what_is_coupled(rtol):
    """Every row of a contraction converges, and to the solution of the whole."""
    for seed in range(5):
        fn = coupled_map(8, 5, 0.8, seed, spread=4.0)
        solution = pydeq.fixed_point(fn, torch.zeros(8, 5, dtype=torch.float64), solver=pydeq.Picard(), rtol=rtol)
        assert solution.converged.all()
        check_converged(fn, solution, rtol)


@given(rhos=st.lists(st.floats(0.0, 0.95), min_size=2, max_size=6), seed=st.integers(0, 100))
def test_independent_samples_keep_their_bits_and_counts(solver, rhos, seed):
    """Each as in a solve of its own, which is never looked back at, and nothing is said."""
    problem = softsign_map(rhos, 6, seed=seed)
    ran = {"solver": solver, "rtol": 1e-5, "max_steps": 30}
    iteration._warned_of_coupling = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        together = problem.solve(**ran)
    assert together.nfe == int(together.sample_nfe.max())
    for b in range(len(rhos)):
        assert_identical(problem.rows([b]).solve(**ran), together, [b])


def test_states_at_the_end_are_the_image():
    """Also where the last evaluation showed that the image of a sample that was done has moved."""
    moved = 0
    for seed in range(20):
        fn = coupled_map(3, 4, 0.7, seed, spread=2.0)
        z0 = torch.zeros(3, 4, dtype=torch.float64)
        for max_steps in range(2, 12):
            solution = pydeq.fixed_point(
                fn, z0, solver=pydeq.Picard(), rtol=1e-2, max_steps=max_steps, states_at=[1, max_steps]
            )
            moved += int((solution.sample_nfe < solution.nfe).sum())
            assert torch.equal(solution.states[1], solution.image)
    assert moved


def test_it_is_said_once(monkeypatch):
    monkeypatch.setattr(iteration, "_warned_of_coupling", False)
    with pytest.warns(pydeq.CouplingWarning, match=r"1 of 2 .* solve for z\[None\]"):
        pydeq.fixed_point(relay, torch.zeros(2, 1))
    pydeq.fixed_point(relay, torch.zeros(2, 1))
    monkeypatch.setattr(iteration, "_warned_of_coupling", False)
    with pytest.warns(pydeq.CouplingWarning):
        pydeq.fixed_point(relay, torch.zeros(2, 1), solver=pydeq.Picard(), max_steps=3)


def test_one_coupled_system_is_one_sample():
    solution = pydeq.fixed_point(lambda z: relay(z[0])[None], torch.zeros(1, 2, 1), rtol=1e-6)
    torch.testing.assert_close(solution.value[0], torch.tensor([[2.0], [1.0]]), rtol=0, atol=1e-5)


# Gradients


def graph(nodes=40, hidden=6, seed=0):
    """A random graph's normalized adjacency and features that reach most nodes only through other nodes."""
    generator = torch.Generator().manual_seed(seed)
    A = (torch.rand(nodes, nodes, generator=generator) < 3.0 / nodes).double()
    A = (A + A.T).clamp(max=1) + torch.eye(nodes, dtype=torch.float64)
    scale = A.sum(1).rsqrt()
    x = torch.randn(nodes, hidden, generator=generator, dtype=torch.float64)
    x[nodes // 4 :] = 0.0
    W = torch.randn(hidden, hidden, generator=generator, dtype=torch.float64)
    return scale[:, None] * A * scale, 0.7 * W / torch.linalg.matrix_norm(W, 2), x


def exact(fn, z0, *inputs):
    """Value, and gradients of sum(z^3), by plain iteration in float64 and a linear solve."""
    z = z0.detach()
    for _ in range(2000):
        z = fn(z, *inputs).detach()
    J = torch.autograd.functional.jacobian(lambda z: fn(z, *inputs), z).reshape(z.numel(), z.numel())
    u = torch.linalg.solve((torch.eye(z.numel(), dtype=z.dtype) - J).T, 3.0 * z.flatten().square()).view_as(z)
    return z, torch.autograd.grad(fn(z, *inputs), inputs, u)


def graph_cell():
    A, W, x = graph()
    return (lambda z, W, x: torch.relu(A @ z @ W + x)), torch.zeros_like(x), (W, x)


def vector_cell():
    """A plain vector: its entries become samples."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(30, 30, generator=generator, dtype=torch.float64)
    x = torch.randn(30, generator=generator, dtype=torch.float64)
    return (lambda z, W, x: torch.tanh(W @ z + x)), torch.zeros_like(x), (0.8 * W / torch.linalg.matrix_norm(W, 2), x)


def batch_norm_cell():
    """Batch normalization in training mode couples the samples through its statistics."""
    generator = torch.Generator().manual_seed(0)
    W = 0.2 * torch.randn(5, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(12, 5, generator=generator, dtype=torch.float64)

    def fn(z, W, x):
        return 0.5 * torch.nn.functional.batch_norm(torch.tanh(z @ W + x), None, None, training=True)

    return fn, torch.zeros_like(x), (W, x)


@pytest.mark.parametrize("cell", [graph_cell, vector_cell, batch_norm_cell])
@pytest.mark.parametrize("adjoint_solver", ADJOINT_SOLVERS, ids=lambda solver: type(solver).__name__)
def test_gradients_of_coupled_rows(cell, adjoint_solver):
    """A solve that says it has converged is right; the adjoints of Picard and Anderson converge."""
    fn, z0, inputs = cell()
    inputs = tuple(entry.clone().requires_grad_() for entry in inputs)
    z, gradients = exact(fn, z0, *inputs)
    adjoint = pydeq.Implicit(solver=adjoint_solver, rtol=1e-9, max_steps=300)
    deq = pydeq.DEQ(fn, solver=pydeq.Anderson(), adjoint=adjoint, rtol=1e-9, max_steps=300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pydeq.ConvergenceWarning)
        output, solution = deq(z0, *inputs, return_solution=True)
        found = torch.autograd.grad(output.pow(3).sum(), inputs)
    assert solution.converged.all()
    torch.testing.assert_close(output.detach(), z, rtol=1e-6, atol=1e-7)
    if isinstance(adjoint_solver, pydeq.Picard | pydeq.Anderson):
        assert solution.backward.converged.all()
    if solution.backward.converged.all():
        for one, other in zip(found, gradients, strict=True):
            assert (one - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("solver", [pydeq.Picard(), pydeq.Anderson()], ids=lambda solver: type(solver).__name__)
def test_unrolled_iterations_wake_too(solver):
    fn, z0, inputs = graph_cell()
    inputs = tuple(entry.clone().requires_grad_() for entry in inputs)
    z, gradients = exact(fn, z0, *inputs)
    deq = pydeq.DEQ(fn, solver=solver, adjoint=pydeq.Unrolled(), rtol=1e-9, max_steps=300)
    output, solution = deq(z0, *inputs, return_solution=True)
    assert solution.converged.all()
    torch.testing.assert_close(output.detach(), z, rtol=1e-6, atol=1e-7)
    if isinstance(solver, pydeq.Picard):  # Anderson's system is nearly singular at such a tolerance
        for one, other in zip(torch.autograd.grad(output.pow(3).sum(), inputs), gradients, strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm()
    relayed, solution = pydeq.DEQ(relay, solver=solver, adjoint=pydeq.Unrolled())(
        torch.zeros(2, 1), return_solution=True
    )
    assert solution.converged.all()
    torch.testing.assert_close(relayed, torch.tensor([[2.0], [1.0]]), rtol=0, atol=4e-3)


@pytest.mark.parametrize("max_steps", [6, 10, 16, 24, 300])
@pytest.mark.parametrize("cell", [graph_cell, vector_cell, batch_norm_cell])
def test_reversible_iterations_wake_too(cell, max_steps):
    """CONVERGED holds at the end, for all where there are steps enough."""
    fn, z0, inputs = cell()
    deq = pydeq.DEQ(fn, adjoint=pydeq.Reversible(), rtol=1e-3, max_steps=max_steps)
    solution = deq(z0, *inputs, return_solution=True)[1]
    rows = solution.converged
    assert rows.all() or max_steps < 300
    value, image = solution.value.view(len(z0), -1), fn(solution.value, *inputs).view(len(z0), -1)
    assert torch.equal(image[rows], solution.image.view(len(z0), -1)[rows])
    residual = (image - value).norm(dim=1)
    assert (residual <= 1e-3 * image.norm(dim=1))[rows].all()
    torch.testing.assert_close(solution.residual[rows], residual[rows], rtol=1e-6, atol=0)


@pytest.mark.parametrize("cell", [vector_cell, batch_norm_cell])
def test_reversible_gradients_of_coupled_rows(cell):
    """Those of the solution, and where it has not converged those of what was computed."""
    fn, z0, inputs = cell()
    inputs = tuple(entry.clone().requires_grad_() for entry in inputs)
    gradients = exact(fn, z0, *inputs)[1]
    deq = pydeq.DEQ(fn, adjoint=pydeq.Reversible(checkpoints=20), rtol=1e-10, max_steps=300)
    output, solution = deq(z0, *inputs, return_solution=True)
    assert solution.converged.all()
    for one, other in zip(torch.autograd.grad(output.pow(3).sum(), inputs), gradients, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()


def test_reversible_gradients_reach_samples_through_those_that_moved():
    """Row 1 is solved at first, stays where it is, and is moved by row 0, whose input has all the gradient."""

    def fn(z, x):
        return torch.stack([0.5 * z[0] + x[0], torch.relu(z[0] - 1.0)])

    for max_steps in (4, 6, 8, 100):
        x = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
        z0 = torch.zeros(2, 1, dtype=torch.float64)
        deq = pydeq.DEQ(fn, adjoint=pydeq.Reversible(), rtol=1e-4, max_steps=max_steps)
        output, solution = deq(z0, x, return_solution=True)
        assert bool(solution.converged.all()) == (max_steps == 100)
        (found,) = torch.autograd.grad(output[1].sum(), x)
        step = 1e-6
        ahead, behind = (deq(z0, torch.full_like(x, 1.0 + h))[1].sum() for h in (step, -step))
        torch.testing.assert_close(float(found), float(ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)
