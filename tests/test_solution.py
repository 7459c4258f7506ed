"""What a solve returns: that its parts agree with each other, and what it says of itself."""

import re

import pytest
import torch

import pydeq
from pydeq import Status
from pydeq.solution import relative
from pydeq.testing import assert_close, linear_map, softsign_map, tanh_map


def mixed(dtype=torch.float32):
    """Samples that converge soon, late and not at all, diverge, and lose themselves in NaN: a map and z0."""
    rate = torch.tensor([0.1, 0.9, 0.9999, 30.0, torch.nan, 0.0], dtype=dtype)[:, None]
    return lambda z: rate * z.roll(1, 1) + 1.0, torch.linspace(-1, 1, 18, dtype=dtype).reshape(6, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("freeze", [True, False])
def test_image_is_fn_of_value_to_the_last_bit(solver, dtype, freeze):
    problem = softsign_map([0.1, 0.5, 0.9, 0.99, 1.5], 7, dtype=dtype)
    for max_steps in (1, 2, 3, 4, 7, 12, 13, 30):
        solution = problem.solve(solver=solver, max_steps=max_steps, freeze=freeze, rtol=1e-4)
        assert torch.equal(solution.image, problem.fn(solution.value, *problem.context))
        compute = torch.promote_types(dtype, torch.float32)
        exact = (solution.image.to(compute) - solution.value.to(compute)).double().norm(dim=1)
        assert solution.residual.dtype == solution.relative_residual.dtype == compute
        assert_close(solution.residual, exact, size=7, dtype=compute)
        ratio = exact / solution.image.double().norm(dim=1)
        assert_close(solution.relative_residual, ratio, size=7, dtype=compute)


def test_types_and_shapes(solver):
    fn, z0 = mixed()
    solution = pydeq.fixed_point(fn, z0, solver=solver, trace=True)
    assert solution.status.dtype == torch.int8
    assert solution.converged.dtype == torch.bool
    assert solution.sample_nfe.dtype == torch.int64
    assert isinstance(solution.nfe, int)
    for name in ("status", "converged", "sample_nfe", "residual", "relative_residual"):
        assert getattr(solution, name).shape == (6,), name
    assert torch.equal(solution.converged, solution.status == Status.CONVERGED)
    assert solution.trace.shape == (solution.nfe, 6)
    assert solution.backward is None
    assert pydeq.fixed_point(fn, z0, solver=solver).trace is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_trace_has_a_row_per_evaluation_until_a_sample_stops(solver, dtype):
    fn, z0 = mixed(dtype)
    iterates = []

    def watched(z):
        iterates.append(z.clone())
        return fn(z)

    solution = pydeq.fixed_point(watched, z0, solver=solver, trace=True, max_steps=20)
    compute = torch.promote_types(dtype, torch.float32)
    assert solution.trace.dtype == compute
    assert len(iterates) == solution.nfe == len(solution.trace)
    for k, (z, row) in enumerate(zip(iterates, solution.trace, strict=True)):
        running = solution.sample_nfe > k
        assert torch.equal(row.isnan(), ~running)
        z, image = z.to(compute), fn(z).to(compute)
        expected = relative((image - z).double().norm(dim=1), image.double().norm(dim=1))
        assert_close(row[running], expected[running], size=3, dtype=compute)
    assert torch.equal(iterates[0], z0)
    finite = solution.trace[:, :4]
    best = torch.where(finite.isnan(), torch.inf, finite).amin(0)
    assert (best <= solution.relative_residual[:4]).all()


def test_trace_sees_where_a_value_came_from(solver):
    """The residual of the value is one of the trace's, the one of the last evaluation where a sample has converged."""
    problem = softsign_map([0.2, 0.6, 0.9], 5, dtype=torch.float64)
    solution = problem.solve(solver=solver, trace=True, rtol=1e-6, max_steps=200)
    assert solution.converged.all()
    last = solution.trace[solution.sample_nfe - 1, torch.arange(3)]
    assert torch.equal(last, solution.relative_residual)


def test_relative_residual_of_zeros():
    zero, one, inf, nan = (torch.tensor(x, dtype=torch.float64) for x in (0.0, 1.0, torch.inf, torch.nan))
    assert relative(zero, zero) == 0.0
    assert relative(one, zero) == torch.inf
    assert relative(inf, inf) == torch.inf
    assert relative(inf, nan) == torch.inf
    assert relative(zero, one) == 0.0


def test_relative_residual_where_the_image_is_zero(solver):
    """r/0 is inf and 0/0 is 0, and an image of zero is no reason for a false end."""
    solution = pydeq.fixed_point(torch.zeros_like, torch.tensor([[0.0, 0.0], [1.0, 2.0]]), solver=solver, max_steps=1)
    assert solution.relative_residual.tolist() == [0.0, torch.inf]
    assert solution.status.tolist() == [Status.CONVERGED, Status.MAX_STEPS]
    solution = pydeq.fixed_point(torch.zeros_like, torch.tensor([[0.0, 0.0], [1.0, 2.0]]), solver=solver, trace=True)
    assert solution.status.tolist() == [Status.CONVERGED, Status.CONVERGED]
    assert solution.trace[:, 1].tolist() == [torch.inf, 0.0]


def test_statuses_are_names(solver):
    fn, z0 = mixed()
    solution = pydeq.fixed_point(fn, z0, solver=solver, max_steps=8, rtol=1e-5)
    assert solution.statuses == [Status(int(code)).name for code in solution.status]
    assert solution.statuses[4] == "NONFINITE"


def test_repr_counts_and_advises(solver):
    fn, z0 = mixed()
    solution = pydeq.fixed_point(fn, z0, solver=solver, max_steps=8, rtol=1e-5)
    text = repr(solution)
    counts = {status: int((solution.status == status).sum()) for status in Status}
    assert counts[Status.NONFINITE] >= 1
    assert f"Solution({counts[Status.CONVERGED]} of 6 samples converged, nfe={solution.nfe}, " in text
    assert re.search(r"relative residual median [\d.e-]+, max inf", text)
    for status in (Status.MAX_STEPS, Status.DIVERGED, Status.NONFINITE):
        assert (f"{counts[status]} {status.name}: " in text) == (counts[status] > 0)
    assert "STALLED" not in text
    if counts[Status.MAX_STEPS]:
        assert "increase max_steps" in text
    assert text.count("pydeq.nn.spectral_norm") <= 1


def test_repr_of_a_solution_without_trouble(solver):
    solution = pydeq.fixed_point(lambda z: 0.5 * z, torch.zeros(2, 3), solver=solver)
    assert repr(solution) == "Solution(2 of 2 samples converged, nfe=1, relative residual median 0, max 0)"
    assert solution.advice() == ""


def test_repr_names_atol_where_the_solution_is_zero(solver):
    """0.5 z from 1: no residual is a small part of an image that vanishes."""
    solution = pydeq.fixed_point(lambda z: 0.5 * z, torch.ones(2, 3), solver=pydeq.Picard())
    assert solution.status.tolist() == [Status.MAX_STEPS] * 2
    assert "2 with a solution of 0" in repr(solution)
    assert "set atol" in repr(solution)
    solved = pydeq.fixed_point(lambda z: 0.5 * z, torch.ones(2, 3), solver=solver, atol=1e-4)
    assert solved.converged.all()
    assert "atol" not in repr(solved)


def test_repr_of_a_lost_solution_names_damping_and_picard():
    solution = pydeq.fixed_point(lambda z: z.log(), torch.full((1, 2), -1.0))
    assert "pydeq.Picard(damping=0.5)" in repr(solution)


def test_repr_of_a_stalled_solution():
    problem = linear_map(0.9, 30)
    solution = problem.solve(rtol=1e-9, max_steps=300)
    assert "4 STALLED: rounding is the limit: loosen rtol or use a wider dtype" in repr(solution)


def test_throw_raises_with_the_solution(solver):
    fn, z0 = mixed()
    quiet = pydeq.fixed_point(fn, z0, solver=solver)
    with pytest.raises(pydeq.ConvergenceError, match=re.escape(repr(quiet))) as caught:
        pydeq.fixed_point(fn, z0, solver=solver, throw=True)
    assert isinstance(caught.value, RuntimeError)
    assert torch.equal(caught.value.solution.status, quiet.status)
    assert torch.equal(caught.value.solution.image[:4], quiet.image[:4])


def test_throw_is_quiet_where_all_converged(solver):
    assert pydeq.fixed_point(lambda z: 0.5 * z + 1.0, torch.zeros(2), solver=solver, throw=True).converged.all()


def test_tensors_of_a_solution_are_new(solver):
    """Neither fn's buffer nor z0 nor a later solve writes to them."""
    buffer = torch.zeros(3, 4)

    def fn(z):
        return torch.add(0.5 * z, 1.0, out=buffer)

    z0 = torch.zeros(3, 4)
    first = pydeq.fixed_point(fn, z0, solver=solver)
    value, image = first.value.clone(), first.image.clone()
    buffer.fill_(-1.0)
    z0.fill_(-1.0)
    pydeq.fixed_point(fn, torch.ones(3, 4), solver=solver)
    assert torch.equal(first.value, value)
    assert torch.equal(first.image, image)


@pytest.mark.parametrize(
    "adjoint",
    [
        pydeq.Implicit(),
        pydeq.Shine(),
        pydeq.JacobianFree(),
        pydeq.Phantom(2, 0.5),
        pydeq.Phantom(2, form="neumann"),
        pydeq.Unrolled(),
        pydeq.Reversible(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("parts", [False, True])
def test_the_residual_of_the_image_is_known_where_fn_was_evaluated_there(adjoint, parts):
    solver = pydeq.Broyden() if isinstance(adjoint, pydeq.Shine) else pydeq.Anderson()
    x = torch.randn(4, 6).requires_grad_()

    def fn(z, x):
        return {"a": torch.tanh(0.9 * z["a"].roll(1, 1) + x)} if parts else torch.tanh(0.9 * z.roll(1, 1) + x)

    z0 = {"a": torch.zeros(4, 6)} if parts else torch.zeros(4, 6)
    z, solution = pydeq.DEQ(fn, solver=solver, adjoint=adjoint)(z0, x, return_solution=True)
    if isinstance(adjoint, pydeq.Unrolled | pydeq.Reversible):
        assert solution.image_residual is None
        return
    (z["a"] if parts else z).detach().zero_()  # the output is the user's
    image = solution.image["a"] if parts else solution.image
    next = fn(solution.image, x)
    next = next["a"] if parts else next
    exact = (next - image).double().norm(dim=1)
    assert_close(solution.image_residual, exact, size=6, dtype=torch.float32)
    assert f"of the image max {(exact / next.double().norm(dim=1)).max():.2g}" in repr(solution)


@pytest.mark.filterwarnings("ignore:the forward solve of a pydeq.DEQ")
def test_the_residual_of_the_image_shows_what_an_expansive_map_makes_of_a_small_one(solver):
    """The value meets the tolerance; its image, which a call without gradients returns, is far off."""
    z0 = torch.zeros(1, 2, dtype=torch.float64)
    gain = torch.tensor([-700.0, 0.5], dtype=torch.float64)

    def fn(z):
        return gain * z + 1.0

    solution = pydeq.DEQ(fn, solver=solver, max_steps=30)(z0, return_solution=True)[1]
    if solver == pydeq.Picard():
        return  # diverges
    assert solution.converged.all()
    exact = (fn(solution.image) - solution.image).norm(dim=1)
    torch.testing.assert_close(solution.image_residual, exact)
    # The map is affine: residuals grow by its gain from one state to the next.
    torch.testing.assert_close(exact, (gain * (solution.image - solution.value)).norm(dim=1), rtol=1e-5, atol=1e-12)


def test_the_residual_of_the_image_is_not_known_without_an_evaluation_there():
    z0, x = torch.zeros(2, 3), torch.randn(2, 3)

    def fn(z, x):
        return torch.tanh(0.5 * z + x)

    assert pydeq.fixed_point(fn, z0, x).image_residual is None
    with torch.no_grad():
        assert pydeq.DEQ(fn)(z0, x, return_solution=True)[1].image_residual is None
    of = torch.func.grad(lambda x: pydeq.DEQ(fn)(z0, x).sum())
    assert of(x).isfinite().all()


def test_a_solution_of_an_empty_batch_is_printed():
    solution = pydeq.fixed_point(torch.cos, torch.zeros(0, 3))
    assert solution.advice() == ""
    assert repr(solution) == f"Solution(0 of 0 samples converged, nfe={solution.nfe})"


def test_advice_names_solver_damping_memory_and_norm():
    wanders = pydeq.fixed_point(lambda z: 1.0 - z, torch.zeros(2, 3), solver=pydeq.Picard(), max_steps=40)
    text = wanders.advice()
    assert text.startswith("2 MAX_STEPS: the residual of 2 has not fallen for half of the evaluations")
    assert "increase max_steps" not in text
    for name in (
        "pydeq.Broyden()",
        "line_search=True",
        "pydeq.Anderson(memory=20)",
        "pydeq.nn.spectral_norm",
        "pydeq.diagnose",
    ):
        assert text.count(name) == 1
    assert all(len(line) < 250 for line in text.splitlines())
    falls = pydeq.fixed_point(lambda z: 0.99 * z + 1.0, torch.zeros(2, 3), solver=pydeq.Picard(), max_steps=40)
    assert falls.advice().startswith(
        "2 MAX_STEPS: increase max_steps, try pydeq.Broyden(), or make fn more contractive"
    )
    assert "has not fallen" not in falls.advice()
    grows = pydeq.fixed_point(lambda z: 2.0 * z + 1.0, torch.zeros(2, 3), solver=pydeq.Picard())
    assert "a smaller damping (pydeq.Anderson(damping=0.5))" in grows.advice()


def test_a_plot_of_the_residuals(tmp_path):
    pytest.importorskip("matplotlib")
    problem = tanh_map(0.9, 20)
    solution = problem.solve(trace=True)
    figure = solution.plot(tmp_path / "residuals.png")
    assert (tmp_path / "residuals.png").read_bytes().startswith(b"\x89PNG")
    lines = figure.axes[0].lines
    assert len(lines) == 4
    drawn = torch.tensor(lines[1].get_ydata())
    expected = solution.trace[:, 1].double()
    torch.testing.assert_close(drawn, expected[expected.isfinite()])
    with pytest.raises(ValueError, match="solve with trace=True"):
        problem.solve().plot()
