"""A report says what was measured, and following it makes layers converge."""

import copy
import re
import warnings
from dataclasses import dataclass

import pytest
import torch
from cells import CELLS, Map
from failing_cells import FAILING, symmetric, vectors
from torch import nn
from torch.utils._pytree import tree_leaves

import pydeq
from pydeq.diagnosis import Report
from pydeq.diagnosis.subject import Subject
from pydeq.diagnosis.trials import try_forward

pytestmark = pytest.mark.filterwarnings(
    "ignore:the samples of a batch depend on each other", "ignore:the cell draws random numbers"
)


def runs(layer, z0, context):
    """Run a layer forward and backward, and say whether all samples converge in both."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        z, solution = layer(z0, *context, return_solution=True)
        sum(part.square().sum() for part in tree_leaves(z)).backward()
    return bool(solution.converged.all() and solution.backward.converged.all()), solution


FOLLOWED: dict[str, bool] = {}


@pytest.mark.parametrize("case", FAILING, ids=str)
def test_following_the_report(case):
    cell, z0, context = case.build(torch.float32)
    assert not runs(pydeq.DEQ(copy.deepcopy(cell)), z0, context)[0]  # it fails by default
    report = pydeq.diagnose(pydeq.DEQ(cell), z0, *context)
    assert not report.converges
    layer = report.recommended
    if layer is None:
        layer = next((change.layer for change in report.changes if change.layer is not None), None)
        assert layer is None or layer.cell is not cell
    else:
        assert layer.cell is cell
    converged, solution = (False, None) if layer is None else runs(layer, z0, context)
    FOLLOWED[case.name] = converged
    if not converged:
        assert "dropout" not in case.name
        return
    if "dropout" in case.name:  # another mask in each call
        assert layer.freeze_rng
        return
    with torch.no_grad():
        value = tree_leaves(solution.value)
        image = tree_leaves(layer.cell(solution.value, *context))
        flat, after = (torch.cat([part.flatten(1) for part in parts], 1).double() for parts in (value, image))
        allowed = (layer.rtol or 1e-3) * after.norm(dim=1) + layer.atol
        assert ((after - flat).norm(dim=1) <= 1.01 * allowed + 1e-6).all()


def test_most_of_the_failing_cells_converge_then():
    """The tests above have filled the list, if they ran."""
    if len(FOLLOWED) == len(FAILING):
        assert len(FAILING) >= 20
        assert sum(FOLLOWED.values()) >= 17, FOLLOWED


def linear_cell(low, high, width=12, batch=3, dtype=torch.float64):
    """z -> A z + x with the eigenvalues of A spread evenly over an interval."""
    z0, context = vectors(width, batch)
    cell = Map(lambda m, z, x: m.linear(z) + x, linear=symmetric(width, low, high)).to(dtype)
    return cell, z0.to(dtype), tuple(x.to(dtype) for x in context)


def test_what_is_measured_of_a_linear_cell():
    cell, z0, context = linear_cell(-1.5, 0.7)
    report = pydeq.diagnose(cell, z0, *context)
    assert isinstance(report, Report)
    contraction = report.contraction
    torch.testing.assert_close(contraction.radius, torch.full((3,), 1.5, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(contraction.norm, torch.full((3,), 1.5, dtype=torch.float64), rtol=1e-3, atol=0)
    spread = torch.linspace(-1.5, 0.7, 12, dtype=torch.float64)
    expected = spread.abs().sort(descending=True).values[:6]
    torch.testing.assert_close(contraction.eigenvalues.abs(), expected.expand(3, 6), rtol=1e-5, atol=1e-7)
    assert (contraction.error < 1e-8).all()
    converged = {trial.solver: trial.all_converged for trial in report.trials}
    assert converged[pydeq.Broyden()]
    assert converged[pydeq.Picard(damping=0.5)]  # its eigenvalues are between -0.25 and 0.85
    assert not converged[pydeq.Picard()]
    assert report.at_fixed_point
    assert report.reachable < 1e-14
    matrix = cell.linear.weight.detach()
    exact = torch.linalg.solve(torch.eye(12, dtype=torch.float64) - matrix, (context[0] + cell.linear.bias).T).T
    z, _ = report.recommended(z0, *context, return_solution=True)
    assert ((z - exact).norm(dim=1) <= 1e-2 * exact.norm(dim=1)).all()
    assert report.gradient_error < 0.05
    assert not report.habits.draws
    assert not report.habits.coupled
    assert "unstable" in repr(report)


def test_the_errors_of_backward_solves():
    cell, z0, context = linear_cell(-0.9, 0.9)
    report = pydeq.diagnose(pydeq.DEQ(cell, adjoint=pydeq.Implicit(max_steps=2)), z0, *context)
    v = torch.randn(z0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(12, dtype=torch.float64) - cell.linear.weight.detach().T, v.T).T
    own, *others = report.backward
    found = own.solution.image
    assert own.error == pytest.approx(float((found - exact).norm() / exact.norm()), rel=1e-6)
    assert own.error > 0.05
    assert all(trial.error < 0.01 for trial in others if trial.all_converged)
    assert not report.converges
    assert report.recommended.adjoint != pydeq.Implicit(max_steps=2)


def test_products_count_when_solvers_are_compared():
    cell, z0, context = linear_cell(-1.5, 0.7)
    report = pydeq.diagnose(pydeq.DEQ(cell, solver=pydeq.NewtonKrylov(), max_steps=2), z0, *context)
    trials = {trial.solver: trial for trial in report.trials}
    newton, broyden = trials[pydeq.NewtonKrylov()], trials[pydeq.Broyden()]
    assert newton.all_converged
    assert newton.solution.nfe < broyden.solution.nfe < newton.cost
    assert newton.cost == newton.solution.nfe + newton.solution.products
    cheapest = min(trial.cost for trial in report.trials if trial.all_converged and trial is not newton)
    assert 0.6 * newton.cost < cheapest < newton.cost  # the layer's own solver is preferred
    assert report.recommended.solver == newton.solver
    assert f"{newton.solution.products} of 1000 products" in repr(report)
    assert all(not isinstance(trial.solver, pydeq.NewtonKrylov) for trial in report.backward)  # it is linear


def test_newton_krylov_is_tried_only_if_nothing_else_converges():
    cell, z0, context = linear_cell(-1.5, 0.7)
    report = pydeq.diagnose(cell, z0, *context)
    assert all(trial.solver != pydeq.NewtonKrylov() for trial in report.trials)
    z0, context = vectors(32)
    cell = Map(lambda m, z, x: m.linear(z) + x, linear=symmetric(32, -3.0, 0.9))
    report = pydeq.diagnose(pydeq.DEQ(cell, max_steps=10), z0, *context, max_steps=10)
    assert report.trials[-1].solver == report.recommended.solver == pydeq.NewtonKrylov()
    assert [trial for trial in report.trials if trial.all_converged] == report.trials[-1:]
    assert runs(report.recommended, z0, context)[0]


def test_the_cost_is_bounded_if_nothing_converges():
    calls, torn = 0, torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
    torn = (torn - torn.T).requires_grad_()

    def cell(z):  # it turns the sphere by a right angle in each point, so that it has no fixed point
        nonlocal calls
        calls += 1
        return nn.functional.normalize(z @ torn, dim=1)

    z0 = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    report = pydeq.diagnose(cell, z0, max_steps=40)
    (newton,) = (trial for trial in report.trials if trial.solver == pydeq.NewtonKrylov())
    assert not any(trial.all_converged for trial in report.trials)
    assert newton.solution.products == newton.max_products == 200
    assert newton.solution.nfe < 40
    assert newton.ends == "2 MAX_STEPS"
    assert "200 of 200 products" in repr(report)
    assert max(trial.max_steps for trial in report.trials) == 50  # 1000 evaluations would not help
    assert calls < 1000


def test_a_limit_of_products_changes_nothing_before_it_is_reached():
    case = FAILING[0]
    cell, z0, context = case.build(torch.float32)
    subject = Subject(lambda z: cell(z, *context), z0)
    expected = pydeq.fixed_point(cell, z0, *context, solver=pydeq.NewtonKrylov(), max_steps=200)
    found = try_forward(subject, pydeq.NewtonKrylov(), 1e-3, 200, 10_000).solution
    assert (found.nfe, found.products) == (expected.nfe, expected.products)
    assert torch.equal(found.value, expected.value)
    limited = try_forward(subject, pydeq.NewtonKrylov(), 1e-3, 200, 45)
    assert limited.solution.products == limited.max_products == 45
    assert limited.solution.nfe < expected.nfe


@pytest.mark.parametrize(("radius", "helps"), [(0.99, True), (0.999, False), (1.001, False)])
def test_more_evaluations_are_tried_where_the_residual_falls_fast_enough(radius, helps):
    subject = Subject(lambda z: 10 + radius * (z - 10).roll(1, 1), 10 + torch.eye(3, 4))
    trial = try_forward(subject, pydeq.Picard(), 1e-3, 50)
    assert not trial.all_converged
    assert trial.hopeful(1000) == helps
    assert try_forward(subject, pydeq.Picard(), 1e-3, 1000).all_converged == helps


class NormedResidual(nn.Module):
    """A residual cell with GroupNorm, which hides the scale of the weights; they are initialized too large."""

    def __init__(self, channels=8, groups=4, std=0.5):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.GroupNorm(groups, channels) for _ in range(3))
        for convolution in self.convolutions:
            nn.init.normal_(convolution.weight, std=std)

    def forward(self, z, x):
        y = self.norms[0](self.convolutions[0](z).relu())
        return self.norms[2]((z + self.norms[1](x + self.convolutions[1](y))).relu())


def test_norms_that_hide_the_scale_need_a_small_bound():
    torch.manual_seed(0)
    cell, x = NormedResidual(), torch.randn(3, 8, 6, 6)
    z0 = torch.zeros_like(x)

    report = pydeq.diagnose(cell, z0, x, max_steps=50)
    assert report.recommended is None
    for change, pattern, values in (
        (report.changes[0], r"bound=([\d.]+)\)", (0.9, 0.5, 0.3, 0.1)),
        (report.changes[1], r"mul_\(([\d.]+)\)", (0.5, 0.1, 0.03, 0.01)),
    ):
        chosen = values.index(float(re.search(pattern, change.code)[1]))
        assert chosen > 0
        assert runs(change.layer, z0, (x,))[0]


def test_changes_that_do_not_help_are_not_advised():
    class Hidden(nn.Module):  # it expands, whatever its weights are
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, z, x):
            return -1.2 * nn.functional.normalize(z, dim=1).roll(1, 1) * z.norm(dim=1, keepdim=True).exp() + x

    z0, context = vectors(8)
    report = pydeq.diagnose(Hidden(), z0 + 1.0, *context, max_steps=20)
    assert all(change.layer is report.recommended for change in report.changes)
    assert report.unhelpful[:2] == [
        "a spectral norm of at most 0.9, 0.5, 0.3, 0.1",
        "weights times 0.5, 0.1, 0.03, 0.01",
    ]
    text = " ".join(repr(report).split())
    assert "Tried on the cell, without success: a spectral norm of at most 0.9, 0.5, 0.3, 0.1;" in text
    assert ("see docs/guides/not-converging.md" in text) == (report.recommended is None)


def test_the_recommended_change_is_marked():
    cell, z0, context = linear_cell(-1.5, 0.95)
    report = pydeq.diagnose(pydeq.DEQ(cell, solver=pydeq.Picard()), z0, *context)
    marked = [change for change in report.changes if change.layer is report.recommended]
    assert len(marked) == repr(report).count("(report.recommended)") == 1
    number = report.changes.index(marked[0]) + 1
    assert f"\n{number}. (report.recommended) " in repr(report)
    assert report.own_gradient_error is None  # the layer does not converge
    assert "of the recommended layer, compared" in repr(report)


def test_whose_gradient_is_off():
    cell, z0, context = CELLS[0].build()
    report = pydeq.diagnose(cell, z0, *context)
    assert report.own_gradient_error == report.gradient_error
    assert f"relative error {report.gradient_error:.1g} of the layer as it is, compared" in repr(report)


def test_a_layer_that_converges_needs_no_change():
    cell, z0, context = CELLS[0].build()
    deq = pydeq.DEQ(cell)
    report = pydeq.diagnose(deq, z0, *context)
    assert report.converges
    assert report.recommended is deq
    assert not report.changes
    assert repr(report).endswith("Nothing has to change.")


def test_what_is_measured_changes_nothing():
    case = next(case for case in FAILING if "BatchNorm" in case.name)
    cell, z0, context = case.build(torch.float32)
    deq = pydeq.DEQ(cell)
    before, random = copy.deepcopy(deq.state_dict()), torch.get_rng_state()
    report = pydeq.diagnose(deq, z0, *context, max_steps=10)
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in deq.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in deq.parameters())
    assert not z0.any()
    assert cell.training
    assert report.habits.coupled
    assert report.habits.batch_norms == ["norms.0", "norms.1"]
    assert "norms.0.running_mean" in report.habits.buffers


def test_random_numbers():
    modules = {"linear": nn.Linear(8, 8), "dropout": nn.Dropout(0.3)}
    cell = Map(lambda m, z, x: m.dropout(torch.tanh(m.linear(z) + x)), **modules)
    z0, context = vectors(8)
    report = pydeq.diagnose(cell, z0, *context)
    assert report.habits.draws
    assert report.habits.random == ["dropout"]
    assert report.recommended.freeze_rng
    assert "freeze_rng=True" in report.changes[0].code
    frozen = pydeq.diagnose(pydeq.DEQ(cell, freeze_rng=True), z0, *context)
    assert frozen.converges


def test_state_from_call_to_call():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, z):
            self.calls += 1
            return 0.1 * z + self.calls

    cell = Counting()
    report = pydeq.diagnose(cell, torch.zeros(2, 3))
    assert report.habits.draws
    assert not report.habits.replays
    assert report.habits.buffers == ["calls"]
    assert report.recommended is None
    assert float(cell.calls) == 0
    assert "keeps state from call to call" in repr(report)


def test_torchs_spectral_norm_is_named():
    linear = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
    z0, context = vectors(6)
    report = pydeq.diagnose(Map(lambda m, z, x: 0.9 * torch.tanh(m.linear(z)) + x, linear=linear), z0, *context)
    assert any("pydeq.nn.spectral_norm" in note for note in report.notes)


class Plain(pydeq.CustomSolver):
    def propose(self, z, f, state):
        return f

    def __repr__(self):
        return "Plain()"


@dataclass(frozen=True)
class Mixed(pydeq.CustomSolver):
    share: float = 0.5

    def propose(self, z, f, state):
        return self.share * f + (1.0 - self.share) * z


@pytest.mark.parametrize("solver", [Plain(), Mixed(0.9)])
def test_solvers_of_the_users_own(solver):
    cell, z0, context = linear_cell(0.2, 0.6)
    report = pydeq.diagnose(pydeq.DEQ(cell, solver=solver, max_steps=3), z0, *context)
    own = [trial for trial in report.trials if trial.solver == solver]
    assert own[0].all_converged
    assert f"{solver!r}, the layer's" in repr(report)
    assert "pydeq.Mixed" not in repr(report)
    assert "pydeq.Plain" not in repr(report)


def test_inference_mode_changes_no_report():
    cell, z0, context = linear_cell(-1.5, 0.7)
    expected = repr(pydeq.diagnose(cell, z0, *context))
    with torch.inference_mode():
        made_here = [x.clone() for x in (z0, *context)]
        assert repr(pydeq.diagnose(cell, *made_here)) == expected


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_an_empty_state_is_refused(shape):
    with pytest.raises(ValueError, match="z0 must have at least one sample and one entry"):
        pydeq.diagnose(lambda z: 0.5 * z, torch.zeros(shape))


def test_values_that_are_not_finite_are_named():
    x = torch.ones(3, 2)
    x[1, 0] = torch.nan
    report = pydeq.diagnose(lambda z, x: 0.5 * z + x, torch.zeros(3, 2), x)
    assert report.notes[0] == "the cell's image of z0 has NaN or Inf in 1 of 3 samples: no setting helps them"
    assert report.recommended is None
    report = pydeq.diagnose(lambda z: 0.5 * z, x)
    assert report.notes[0] == "z0 has NaN or Inf in 1 of 3 samples: no setting helps them"
    assert report.notes[0] in repr(report)


def test_a_state_that_is_modified():
    def cell(z, x):
        return z.mul_(0.5).add(x)

    with pytest.raises(ValueError, match="must not modify z in place"):
        pydeq.diagnose(cell, torch.zeros(2, 3), torch.ones(2, 3))


def test_a_tolerance_below_what_the_dtype_reaches():
    cell, z0, context = linear_cell(-0.9, 0.9, dtype=torch.float32)
    report = pydeq.diagnose(pydeq.DEQ(cell, rtol=1e-9), z0, *context)
    assert not report.given.all_converged
    assert report.recommended is not None
    assert 1e-9 < report.recommended.rtol < 1e-4
    assert "is below what torch.float32 reaches" in report.changes[0].reason


def test_parts_of_a_state():
    case = next(case for case in FAILING if "different scale" in case.name)
    cell, z0, context = case.build(torch.float32)
    report = pydeq.diagnose(cell, z0, *context, max_steps=10)
    (first, _), (second, _) = report.parts.values()
    assert second > 10 * first


def test_a_function_without_parameters():
    report = pydeq.diagnose(lambda z, x: 3.0 * torch.cos(z) + x, torch.zeros(4, 1), torch.linspace(0, 1, 4)[:, None])
    assert report.recommended is not None
    assert report.gradient_error is None


def test_keywords_and_states_of_any_type():
    def cell(z, x, *, gain):
        return {"a": gain * torch.tanh(z["b"]) + x, "b": torch.sin(z["a"])}

    z0 = {"a": torch.zeros(3, 5), "b": torch.zeros(3, 5)}
    x = torch.randn(3, 5)
    report = pydeq.diagnose(cell, z0, x, gain=0.5)
    assert report.converges
    with pytest.raises(TypeError, match="gaim"):
        pydeq.diagnose(cell, z0, x, gaim=0.5)


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"deq_or_fn must be a pydeq\.DEQ or a function, got int"):
        pydeq.diagnose(3, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="max_steps must be at least 1"):
        pydeq.diagnose(torch.cos, torch.zeros(2, 2), max_steps=0)
    with pytest.raises(ValueError, match="fn must return the shape of z0"):
        pydeq.diagnose(lambda z: z[:, :1], torch.zeros(2, 2))


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    cell, z0, context = linear_cell(-1.2, 0.7)
    report = pydeq.diagnose(cell, z0, *context)
    figure = report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    left, right = figure.axes
    assert left.get_yscale() == "log"
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert "the layer: Anderson()" in labels
    assert len(right.collections[0].get_offsets()) == report.contraction.eigenvalues.numel()


@pytest.mark.parametrize(
    "adjoint", [pydeq.Phantom(steps=2), pydeq.JacobianFree(), pydeq.Unrolled(), pydeq.Shine()], ids=str
)
def test_other_adjoints(adjoint):
    cell, z0, context = linear_cell(-1.2, 0.7)
    solver = pydeq.Anderson() if isinstance(adjoint, pydeq.Unrolled) else pydeq.Broyden()
    report = pydeq.diagnose(pydeq.DEQ(cell, solver=solver, adjoint=adjoint, max_steps=3), z0, *context)
    assert not report.converges
    assert report.recommended.adjoint == adjoint
    _, solution = report.recommended(z0, *context, return_solution=True)
    assert solution.converged.all()


@pytest.mark.parametrize("case", CELLS, ids=str)
def test_every_cell_can_be_diagnosed(case):
    """These cells converge: nothing has to change, the gradient is right, and coupling is found where there is some."""
    cell, z0, context = case.build()
    report = pydeq.diagnose(pydeq.DEQ(cell, has_aux=case.has_aux, max_steps=100), z0, *context)
    assert report.converges
    assert report.habits.coupled == case.couples
    assert not report.habits.draws
    assert report.gradient_error is None or report.gradient_error < 0.05
    assert "samples converge with the layer's settings" in repr(report)
