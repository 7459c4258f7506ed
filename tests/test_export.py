"""Layers as programs: export_mode, torch.export and ONNX give the numbers of a solve with as many evaluations."""

import copy
import io
import itertools
import pickle
import subprocess
import sys
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import pydeq
from pydeq import Anderson, Broyden, Picard, Status
from pydeq.compat.torchdeq import get_deq
from pydeq.models import (
    ClassificationConfig,
    ConvDEQConfig,
    DEQTransformerConfig,
    IGNNConfig,
    ImplicitMLPConfig,
    MDEQConfig,
    SolverConfig,
    build,
)
from pydeq.ops.anderson_step import mixing_coefficients as by_cholesky
from pydeq.solve.exported import mixing_coefficients
from pydeq.testing import linear_map, softsign_map, tanh_map

SOLVERS = [
    Picard(),
    Picard(damping=0.6),
    Anderson(),
    Anderson(memory=1),
    Anderson(memory=3, damping=0.7),
    Broyden(),
    Broyden(memory=2),
    Broyden(memory=3, line_search=True),
]
by_solver = pytest.mark.parametrize("solver", SOLVERS, ids=repr)

BATCH = torch.export.Dim("batch")


class Cell(nn.Module):
    def __init__(self, dim=4, scale=0.8, dtype=torch.float32):
        super().__init__()
        self.linear = nn.Linear(dim, dim, dtype=dtype)
        nn.init.orthogonal_(self.linear.weight, scale)

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


class Model(nn.Module):
    """An encoder, a DEQ and a decoder."""

    def __init__(self, dtype=torch.float32, **options):
        super().__init__()
        self.encoder = nn.Linear(3, 4, dtype=dtype)
        self.deq = pydeq.DEQ(Cell(dtype=dtype), **options)
        self.decoder = nn.Linear(4, 2, dtype=dtype)

    def forward(self, x):
        x = self.encoder(x)
        z, solution = self.deq(torch.zeros_like(x), x, return_solution=True)
        return self.decoder(z), solution.converged


def inputs(batch, dtype=torch.float32):
    """Samples of very different sizes, so that they stop at different times."""
    x = torch.randn(batch, 3, generator=torch.Generator().manual_seed(batch), dtype=dtype)
    return x * torch.logspace(-2, 0.5, batch, dtype=dtype)[:, None]


def same_solution(actual, expected, tolerance, statuses=True):
    torch.testing.assert_close(actual.image, expected.image, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(actual.value, expected.value, rtol=tolerance, atol=tolerance)
    if statuses:
        assert actual.status.tolist() == expected.status.tolist()
        assert actual.sample_nfe.tolist() == expected.sample_nfe.tolist()
    torch.testing.assert_close(actual.residual, expected.residual, rtol=1e-2, atol=10 * tolerance)


def both(deq, *arguments, steps, **keywords):
    """The layer's solutions in the export mode, and without it."""
    with torch.no_grad():
        expected = deq.eval()(*arguments, max_steps=steps, return_solution=True, **keywords)[1]
        with pydeq.export_mode(steps):
            z, actual = deq(*arguments, return_solution=True, **keywords)
    assert z is actual.image or torch.equal(z, actual.image)
    assert actual.nfe == steps
    return actual, expected


# The same numbers as in a solve.


@by_solver
@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_gives_the_solve_with_samples_that_stop_at_different_times(solver, steps):
    problem = softsign_map([0.1, 0.5, 0.9, 0.97], 9, dtype=torch.float64)
    deq = pydeq.DEQ(problem.fn, solver=solver, rtol=1e-5)
    actual, expected = both(deq, problem.z0, *problem.context, steps=steps)
    same_solution(actual, expected, 1e-9)
    assert steps < 40 or len(set(actual.sample_nfe.tolist())) > 2


@by_solver
def test_gives_the_solve_where_it_diverges_or_ends_before_its_best(solver):
    for problem, steps in ((linear_map(3.0, 8, dtype=torch.float64), 16), (tanh_map(2.5, 8, dtype=torch.float64), 14)):
        deq = pydeq.DEQ(problem.fn, solver=solver, rtol=1e-9)
        actual, expected = both(deq, problem.z0, *problem.context, steps=steps)
        same_solution(actual, expected, 1e-7)


def test_a_sample_that_stalls_keeps_its_result():
    cell = Cell(dim=64, scale=0.9)
    x = torch.randn(3, 64) * torch.tensor([0.1, 1.0, 10.0])[:, None]
    actual, expected = both(pydeq.DEQ(cell, solver=Picard(), rtol=0.0), torch.zeros_like(x), x, steps=200)
    assert Status.STALLED in actual.status.tolist()
    same_solution(actual, expected, 0.0)


@by_solver
def test_gives_the_solve_of_half_precision(solver):
    problem = softsign_map([0.2, 0.8], 9, dtype=torch.bfloat16)
    actual, expected = both(pydeq.DEQ(problem.fn, solver=solver, rtol=0.0), problem.z0, *problem.context, steps=6)
    assert actual.image.dtype == torch.bfloat16
    same_solution(actual, expected, 0.02, statuses=False)


@by_solver
def test_nan_in_one_sample_leaves_the_others_and_its_best_iterate(solver):
    calls = itertools.count()

    def fn(z, x):
        bad = torch.zeros_like(z)
        if next(calls) % 6 == 3:
            bad[1] = torch.nan
        return 0.5 * torch.cos(z) + x + bad

    x = torch.linspace(0, 1, 6, dtype=torch.float64).view(3, 2)
    with torch.no_grad(), pydeq.export_mode(6):
        z, solution = pydeq.DEQ(fn, solver=solver, rtol=1e-12).eval()(torch.zeros_like(x), x, return_solution=True)
        alone = pydeq.DEQ(lambda z, x: 0.5 * torch.cos(z) + x, solver=solver, rtol=1e-12).eval()(torch.zeros_like(x), x)
    assert torch.equal(z[[0, 2]], alone[[0, 2]])
    assert z.isfinite().all()
    assert solution.sample_nfe[1] in (4, 6)  # a line search may go on from a trial
    torch.testing.assert_close(z[1], 0.5 * torch.cos(solution.value[1]) + x[1])


@pytest.mark.parametrize("size", [1e-200, 1e160])
def test_states_whose_squares_do_not_fit(size):
    generator = torch.Generator().manual_seed(0)
    x = size * torch.randn(3, 6, generator=generator, dtype=torch.float64)
    for solver in (Picard(), Anderson(), Broyden()):
        deq = pydeq.DEQ(lambda z, x: 0.5 * z + x, solver=solver, rtol=1e-6)
        actual, expected = both(deq, torch.zeros_like(x), x, steps=40)
        torch.testing.assert_close(actual.image, 2 * x, rtol=4e-6, atol=0.0)
        assert actual.sample_nfe.tolist() == expected.sample_nfe.tolist()


def test_nan_at_the_start_is_nonfinite():
    deq = pydeq.DEQ(lambda z, x: z * 0.5 + x).eval()
    x = torch.tensor([[1.0], [torch.nan]])
    with pydeq.export_mode(5):
        _, solution = deq(torch.zeros_like(x), x, return_solution=True)
    assert solution.status.tolist() == [Status.CONVERGED, Status.NONFINITE]
    assert solution.residual[1] == torch.inf


@pytest.mark.parametrize("memory", [1, 2, 5])
def test_coefficients_are_those_of_the_operation(memory):
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(6, memory, 20, generator=generator, dtype=torch.float64)
    g[1, -1] = g[1, 0]  # dependent columns
    g[2] *= 1e-30
    g[3, 0] = 0.0
    g[4, -1] = torch.nan
    gram = g @ g.mT
    for count in range(1, memory + 1):
        counts = torch.full((6,), count)
        inside = torch.arange(memory) < count
        seen = torch.where(inside[:, None] & inside, gram, 0.0)
        expected, used = by_cholesky(seen, counts, 1e-6)
        a, most = mixing_coefficients(gram, counts, 1e-6)
        assert most.tolist() == used.tolist()
        torch.testing.assert_close(a, expected, rtol=1e-7, atol=1e-9)


def dense_anderson(f, z, memory, steps):
    """Anderson mixing by a least-squares problem; returns the image of the last iterate."""
    residuals, values = [], []
    for _ in range(steps):
        value = f(z)
        residuals, values = [value - z, *residuals][:memory], [value, *values][:memory]
        differences = np.stack([residuals[0] - other for other in residuals[1:]], 1) if len(residuals) > 1 else None
        if differences is None:
            z = value
        else:
            c = np.linalg.lstsq(differences, residuals[0], rcond=None)[0]
            z = value - np.stack([values[0] - other for other in values[1:]], 1) @ c
    return values[0]


def dense_broyden(f, z, steps):
    """Good Broyden with a dense Jacobian of f(z) - z that starts as -I; returns the image of the last iterate."""
    jacobian = -np.eye(len(z))
    g = f(z) - z
    for _ in range(steps - 1):
        s = -np.linalg.solve(jacobian, g)
        z = z + s
        new = f(z) - z
        jacobian = jacobian + np.outer(new - g - jacobian @ s, s) / (s @ s)
        g = new
    return z + g


@pytest.mark.parametrize("steps", [3, 7])
def test_gives_the_iterates_of_dense_methods(steps):
    """The residuals fall in every step here, so that the best iterate is the last one."""
    cell = Cell(scale=0.4, dtype=torch.float64)
    weight, bias = cell.linear.weight.detach().numpy(), cell.linear.bias.detach().numpy()
    x = inputs(2, torch.float64) @ torch.ones(3, 4, dtype=torch.float64)

    def f(z):
        return np.tanh(weight @ z + bias + x[1].numpy())

    plain = np.zeros(4)
    for _ in range(steps):
        plain = f(plain)
    expected = {
        Picard(): plain,
        Anderson(memory=3, ridge=0.0): dense_anderson(f, np.zeros(4), 3, steps),
        Broyden(): dense_broyden(f, np.zeros(4), steps),
    }
    for solver, z in expected.items():
        with torch.no_grad(), pydeq.export_mode(steps):
            found = pydeq.DEQ(cell, solver=solver, rtol=0.0).eval()(torch.zeros_like(x), x)
        torch.testing.assert_close(found[1], torch.from_numpy(z), rtol=1e-7, atol=1e-9)


# What a layer can ask for.


class State(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


def test_states_context_keywords_aux_trace_and_states_at():
    def fn(z, x, *, shift):
        a, b = z["pair"]
        return {"pair": State(0.5 * torch.tanh(b) + x, 0.3 * a.mean(1, keepdim=True) + shift)}, a + 1

    x, shift = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 1, dtype=torch.float64)
    z0 = {"pair": State(torch.zeros_like(x), torch.zeros_like(shift))}
    deq = pydeq.DEQ(fn, has_aux=True, states_at=[2, 4], rtol=1e-9).eval()
    found = []
    with torch.no_grad():
        for mode in (pydeq.export_mode(6), torch.no_grad()):
            with mode:
                steps = None if isinstance(mode, pydeq.export_mode) else 6
                z, solution = deq(z0, x, shift=shift, return_solution=True, trace=True, max_steps=steps)
            assert isinstance(z["pair"], State)
            found.append((z, solution.value, solution.aux, solution.states, solution.trace))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12, equal_nan=True)


def chain(z, x):
    """Parts of very different sizes. The later ones are zero in the first images, and then grow slowly."""
    a, b, c = z
    return 0.5 * torch.tanh(a) + x, 0.8 * b + 1e-4 * a.mean(1, keepdim=True), 0.95 * c + 1e-3 * torch.tanh(b)


def chain_start(x):
    return torch.zeros_like(x), torch.zeros_like(x[:, :1]), torch.zeros_like(x[:, :1])


@by_solver
@pytest.mark.parametrize("atol", [0.0, 1e-6])
def test_parts_give_the_solve_of_each_sample(solver, atol):
    x = inputs(3, torch.float64) @ torch.ones(3, 4, dtype=torch.float64)
    deq = pydeq.DEQ(chain, solver=solver, norm="parts", rtol=1e-4, atol=atol)
    for steps in (1, 9, 30):
        with torch.no_grad(), pydeq.export_mode(steps):
            image, actual = deq.eval()(chain_start(x), x, return_solution=True, trace=True)
        for i, row in enumerate(x.split(1)):
            with torch.no_grad():
                expected = deq(chain_start(row), row, max_steps=steps, return_solution=True, trace=True)[1]
            torch.testing.assert_close(tuple(part[i : i + 1] for part in image), expected.image, rtol=1e-9, atol=1e-14)
            for name in ("status", "sample_nfe", "relative_residual"):
                torch.testing.assert_close(
                    getattr(actual, name)[i : i + 1], getattr(expected, name), rtol=1e-6, atol=1e-9
                )
            seen = actual.trace[: len(expected.trace), i : i + 1]
            torch.testing.assert_close(seen, expected.trace, rtol=1e-6, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("solver", [Picard(), Anderson(memory=3), Broyden()], ids=repr)
def test_a_small_part_meets_its_tolerance(solver):
    def fn(z, x):
        a, b = z
        return 0.5 * a + x, 0.9 * b + 1e-3 * a.mean(1, keepdim=True)

    x = torch.linspace(1, 2, 12, dtype=torch.float64).view(3, 4)
    deq = pydeq.DEQ(fn, solver=solver, norm="parts", rtol=1e-5).eval()
    with torch.no_grad(), pydeq.export_mode(150):
        (a, b), solution = deq((torch.zeros_like(x), torch.zeros_like(x[:, :1])), x, return_solution=True)
    assert solution.converged.all()
    assert solution.relative_residual.max() <= 1e-5
    torch.testing.assert_close(a, 2 * x, rtol=2e-5, atol=0.0)  # a contraction by 1/2
    torch.testing.assert_close(b, 2e-2 * x.mean(1, keepdim=True), rtol=2e-4, atol=0.0)  # by 9/10


@by_solver
@pytest.mark.parametrize("norm", ["all", "parts"])
def test_results_are_detached(solver, norm):
    def fn(z, x):
        a, b = (linear(part) for part in z)
        return (torch.tanh(a + x), 0.1 * torch.tanh(b + x)), a.sum(1)

    linear = Cell().linear
    x = torch.randn(3, 4, requires_grad=True)
    deq = pydeq.DEQ(fn, solver=solver, norm=norm, has_aux=True, states_at=[2]).eval()
    found = []
    for mode in (torch.enable_grad(), torch.no_grad()):
        with mode, pydeq.export_mode(6):
            z, solution = deq((x * 0, x * 0), x, return_solution=True)
        found.append([*z, *solution.value, solution.aux, *solution.states[0], solution.residual])
    assert not any(part.requires_grad for part in found[0])
    torch.testing.assert_close(*found, rtol=0.0, atol=0.0)


def test_the_number_of_evaluations_is_the_modes_the_calls_or_the_layers():
    problem = tanh_map(0.9, 5)
    deq = pydeq.DEQ(problem.fn, rtol=0.0, eval_max_steps=3).eval()

    def nfe(**options):
        return deq(problem.z0, *problem.context, return_solution=True, **options)[1].nfe

    with pydeq.export_mode():
        assert (nfe(), nfe(max_steps=4)) == (3, 4)
        with pydeq.export_mode(steps=5):
            assert (nfe(), nfe(max_steps=4)) == (5, 5)
        assert nfe() == 3
    assert pydeq.export_mode(steps=2)(nfe)() == 2
    assert nfe(max_steps=6) == 6


# What cannot be exported says so.


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "3"])
def test_a_wrong_number_of_steps_is_refused(steps):
    with pytest.raises((TypeError, ValueError), match="steps must be"):
        pydeq.export_mode(steps)


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"eval_max_steps": None}, {}, r"fixed number of evaluations, and this one has none: give the layer eval_max"),
        ({"solver": pydeq.NewtonKrylov()}, {}, r"NewtonKrylov cannot be exported.*deq\.solver = pydeq\.Broyden"),
        ({"solver": pydeq.TrustRegion()}, {}, r"TrustRegion cannot be exported.*deq\.solver = pydeq\.Broyden"),
        ({"solver": pydeq.GMRES()}, {}, "GMRES cannot be exported"),
        ({"adjoint": pydeq.Reversible()}, {}, r"has its own iteration: deq\.adjoint = pydeq\.Implicit\(\) finds"),
        ({}, {"freeze": False}, r"freeze=False runs until the whole batch is done: export with freeze=True"),
        ({}, {"penalty": pydeq.JacobianPenalty(0.5), "return_solution": True}, "penalty is for training"),
    ],
)
def test_what_cannot_be_exported_is_refused(options, call, message):
    deq = pydeq.DEQ(Cell(), **{"eval_max_steps": 3, **options}).eval()
    z0 = torch.zeros(2, 4)
    with pydeq.export_mode(), pytest.raises((RuntimeError, TypeError), match=message):
        deq(z0, z0, **call)


@pytest.mark.parametrize("record", [True, False], ids=["export", "eager"])
def test_a_cell_that_changes_its_state_or_its_last_result_is_refused(record):
    class Net(nn.Module):
        def __init__(self, fn):
            super().__init__()
            self.deq = pydeq.DEQ(fn, eval_max_steps=3)
            self.register_buffer("kept", torch.zeros(2, 4))

        def forward(self, x):
            with pydeq.export_mode():
                return self.deq(torch.zeros_like(x), x)

    def buffered(z, x):
        return nets[1].kept.copy_(torch.cos(z) + x)

    nets = [Net(lambda z, x: z.mul_(0.5) + x), Net(buffered)]
    for net, message in zip(
        nets, ["fn must not modify z in place", "fn must return a new tensor in every"], strict=True
    ):
        x = torch.ones(2, 4)
        with pytest.raises(ValueError, match=message), torch.no_grad():
            program(net, x) if record else net.eval()(x)


def test_autocast_decides_the_precision_of_the_cell():
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = both(
            pydeq.DEQ(Cell(), solver=Picard()), torch.zeros(3, 4), inputs(3) @ torch.ones(3, 4), steps=5
        )
    assert actual.image.dtype == torch.float32
    same_solution(actual, expected, 0.0)


def noisy(z, x):
    return 0.5 * torch.cos(z) + x + 0.1 * torch.randn_like(z)


def attend(z, x, rate=0.0):
    heads = z[:, None, None]  # [B, 1, 1, D]
    return 0.5 * nn.functional.scaled_dot_product_attention(heads, heads, heads, dropout_p=rate)[:, 0, 0] + x


@pytest.mark.parametrize("record", [True, False], ids=["export", "eager"])
@pytest.mark.parametrize(
    "cell",
    [noisy, lambda z, x: attend(z, x, 0.5), nn.Dropout(0.5), lambda z, x: nn.functional.rrelu(z, training=True) + x],
    ids=["randn_like", "attention", "Dropout", "rrelu"],
)
def test_random_numbers_that_are_replayed_are_refused(cell, record):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.deq = pydeq.DEQ(cell, freeze_rng=True, eval_max_steps=3)

        def forward(self, x):
            return self.deq(torch.ones_like(x), *([] if isinstance(cell, nn.Module) else [x]))

    net, x = Net().eval(), torch.ones(2, 4)
    if isinstance(cell, nn.Module):
        cell.train()
    with pytest.raises(RuntimeError, match=r"freeze_rng=True replays random numbers, and the cell draws some \(aten"):
        torch.export.export(net, (x,)) if record else pydeq.export_mode()(net)(x)


def test_random_numbers_that_are_not_drawn_are_not_refused():
    x = torch.randn(2, 4)
    for cell in (attend, lambda z, x: nn.functional.rrelu(0.5 * z, training=False) + x):
        deq = pydeq.DEQ(cell, solver=Picard(), freeze_rng=True, rtol=0.0).eval()
        expected = torch.zeros_like(x)
        for _ in range(3):
            expected = cell(expected, x)
        close(pydeq.export_mode(3)(deq)(torch.zeros_like(x), x), expected)


def test_torch_export_refuses_with_a_sentence():
    model = Model()
    with pytest.raises(RuntimeError, match=r"this one is in training mode: call model\.eval\(\)"):
        torch.export.export(model, (inputs(2),))
    with pytest.raises(RuntimeError, match=r"this one has none: give the layer eval_max_steps"):
        torch.export.export(model.eval(), (inputs(2),))

    class Solve(nn.Module):
        def forward(self, x):
            return pydeq.fixed_point(lambda z: torch.cos(z) + x, torch.zeros_like(x)).image

    class Compat(nn.Module):
        def forward(self, x):
            return get_deq(f_max_iter=5)(lambda z: torch.cos(z) + x, torch.zeros_like(x))[0][-1]

    for net in (Solve(), Compat().eval()):
        with pytest.raises(RuntimeError, match=r"cannot be exported: use pydeq\.DEQ"):
            torch.export.export(net, (inputs(2),))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
def test_torch_jit_trace_is_refused():
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record a solve.*torch\.export\.export"):
        torch.jit.trace(Model(eval_max_steps=3).eval(), (inputs(2),))
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record a solve"):
        torch.jit.trace(lambda x: pydeq.fixed_point(torch.cos, x).image, (inputs(2),))


# Programs of torch.export.


def program(model, *arguments, **options):
    model.eval()
    return torch.export.export(model, arguments, **options)


def close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual, expected, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "solver",
    [Picard(damping=0.6), Anderson(memory=3), Broyden(memory=2), Broyden(line_search=True)],
    ids=repr,
)
def test_programs_take_batches_of_any_size(solver):
    model = Model(torch.float64, solver=solver, eval_max_steps=4, rtol=0.1)
    exported = program(model, inputs(3, torch.float64), dynamic_shapes=({0: BATCH},)).module()
    for batch in (1, 3, 6):
        x = inputs(batch, torch.float64)
        y, converged = exported(x)
        with torch.no_grad():
            close((y, converged), model(x), 1e-12)
    y.sum().backward()
    weights = dict(exported.named_parameters())
    assert {name for name, weight in weights.items() if weight.grad is not None} == {"decoder.weight", "decoder.bias"}
    torch.testing.assert_close(weights["decoder.bias"].grad, torch.full((2,), 6.0, dtype=torch.float64))


def test_programs_scale_the_parts_of_each_sample():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.deq = pydeq.DEQ(chain, solver=Picard(), norm="parts", eval_max_steps=3)

        def forward(self, x):
            z, solution = self.deq(chain_start(x), x, return_solution=True)
            return *z, solution.sample_nfe, solution.relative_residual

    net = Net()
    exported = program(net, torch.randn(3, 4), dynamic_shapes=({0: BATCH},)).module()
    x = inputs(5) @ torch.ones(3, 4)
    with torch.no_grad():
        actual = exported(x)
        for i, row in enumerate(x.split(1)):
            close(tuple(part[i : i + 1] for part in actual), net(row))


def test_programs_keep_their_state_keywords_and_weights():
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = pydeq.nn.weight_norm(nn.Linear(4, 4))
            self.second = pydeq.nn.spectral_norm(nn.Linear(4, 4), bound=0.5)
            self.drop = nn.Sequential(nn.Dropout(0.5), pydeq.nn.VariationalDropout(0.5))

        def forward(self, z, x, *, mask):
            return {"h": torch.tanh(self.drop(self.linear(z["c"])) * mask + x), "c": self.second(z["h"])}

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.deq = pydeq.DEQ(Cell(), solver=Picard(), eval_max_steps=5, freeze_rng=True)

        def forward(self, x, mask):
            return self.deq({"h": torch.zeros_like(x), "c": torch.zeros_like(x)}, x, mask=mask)

    model = Net()
    x, mask = torch.randn(3, 4), torch.rand(3, 4).round()
    exported = program(model, x, mask, dynamic_shapes=({0: BATCH}, {0: BATCH}))
    with torch.no_grad():
        close(exported.module()(x, mask), model(x, mask))
        close(exported.module()(x[:2], mask[:2]), model(x[:2], mask[:2]))
    targets = [str(node.target) for node in exported.graph.nodes]
    assert sum("norm" in target for target in targets) == 1  # the weights are normalized once
    assert targets.count("aten.dropout.default") in (0, 5)


CONFIGS = {
    "implicit_mlp": ImplicitMLPConfig(inputs=3, hidden=4, outputs=2, solver=SolverConfig(eval_max_steps=3)),
    "conv": ConvDEQConfig(
        image_channels=1, classes=2, channels=4, inner=4, groups=2, solver=SolverConfig("picard", eval_max_steps=3)
    ),
    "mdeq": MDEQConfig(
        channels=(4, 8),
        image_channels=1,
        groups=4,
        expansion=1,
        classification=ClassificationConfig(classes=2, channels=(2, 2), final=4),
        solver=SolverConfig("picard", eval_max_steps=2),
    ),
    "transformer": DEQTransformerConfig(
        vocabulary=11, d_model=4, d_inner=6, heads=2, d_head=2, solver=SolverConfig("picard", eval_max_steps=2)
    ),
    "ignn": IGNNConfig(inputs=3, hidden=4, outputs=2, solver=SolverConfig("picard", eval_max_steps=3)),
}


SHAPES = {
    "implicit_mlp": {"x": {0: BATCH}},
    "transformer": {"tokens": {0: BATCH}},
    "ignn": {"features": None, "edges": {1: torch.export.Dim("edges")}},
}


def arguments_of(name, batch):
    generator = torch.Generator().manual_seed(batch)
    if name == "transformer":
        return (torch.randint(11, (batch, 5), generator=generator),)
    if name == "ignn":
        edges = torch.randint(7, (2, 3 * batch), generator=generator)
        return torch.randn(7, 3, generator=generator), edges
    shape = (3,) if name == "implicit_mlp" else (1, 8, 8)
    return (torch.randn(batch, *shape, generator=generator),)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_packages_models_export(name):
    model = build(CONFIGS[name])
    exported = program(model, *arguments_of(name, 3), dynamic_shapes=SHAPES.get(name, {"images": {0: BATCH}}))
    for batch in (3, 5):
        arguments = arguments_of(name, batch)
        with torch.no_grad():
            expected = model(*arguments)
            actual = exported.module()(*arguments)
        if name == "transformer":
            actual, expected = actual.hidden, expected.hidden
        close(actual, expected, 1e-5)


# ONNX.


def onnx_session(model, *arguments, path=None, **options):
    onnxruntime = pytest.importorskip("onnxruntime")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter
        exported = torch.onnx.export(model.eval(), arguments, dynamo=True, verbose=False, **options)
    file = io.BytesIO() if path is None else path
    exported.save(file)
    data = file.getvalue() if path is None else path
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(*arguments):
        names = [entry.name for entry in session.get_inputs()]
        found = session.run(None, {name: x.numpy() for name, x in zip(names, arguments, strict=True)})
        return [torch.from_numpy(part) for part in found]

    return run


@pytest.mark.parametrize(
    ("solver", "dtype"),
    [
        (Anderson(memory=3), torch.float32),
        (Broyden(memory=2), torch.float64),
    ],
    ids=repr,
)
def test_onnx_gives_the_same_numbers(solver, dtype):
    model = Model(dtype, solver=solver, eval_max_steps=4)
    run = onnx_session(model, inputs(3, dtype), dynamic_shapes=({0: BATCH},))
    for batch in (1, 6):
        x = inputs(batch, dtype)
        with torch.no_grad():
            z, converged = model(x)
        found = run(x)
        close(found[0], z, 1e-12 if dtype == torch.float64 else 1e-5)
        assert found[1].tolist() == converged.tolist()


def test_onnx_needs_no_pydeq(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.deq = pydeq.DEQ(self.cell, solver=Picard(damping=0.8), eval_max_steps=3)

        def cell(self, z, x, *, shift):
            return {"a": 0.5 * torch.cos(z["b"]) + x, "b": 0.4 * torch.sin(z["a"]) + shift}

        def forward(self, x, shift):
            return self.deq({"a": torch.zeros_like(x), "b": torch.zeros_like(x)}, x, shift=shift)

    model, (x, shift) = Net(), torch.randn(2, 5, 4)
    onnx_session(model, x[:3], shift[:3], path=str(tmp_path / "model.onnx"), dynamic_shapes=({0: BATCH}, {0: BATCH}))
    np.savez(tmp_path / "inputs.npz", x=x.numpy(), shift=shift.numpy())
    script = """
import sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
given = np.load("inputs.npz")
names = [entry.name for entry in session.get_inputs()]
np.savez("outputs.npz", *session.run(None, {names[0]: given["x"], names[1]: given["shift"]}))
assert "pydeq" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=300)
    found = np.load(tmp_path / "outputs.npz")
    a = b = torch.zeros(5, 4, dtype=torch.float64)  # three evaluations, by hand
    for k in range(3):
        new = 0.5 * torch.cos(b) + x, 0.4 * torch.sin(a) + shift
        image = new
        a, b = (a + 0.8 * (new[0] - a), b + 0.8 * (new[1] - b)) if k < 2 else (a, b)
    close(torch.from_numpy(found["arr_0"]).double(), image[0], 1e-5)
    close(torch.from_numpy(found["arr_1"]).double(), image[1], 1e-5)


# Copies and files.


def test_copies_and_saved_layers_are_the_same_layer():
    model = Model(solver=Broyden(memory=7), adjoint=pydeq.Implicit(warm_start=True), rtol=1e-5, eval_max_steps=9)
    pydeq.nn.weight_norm(model.deq.cell.linear)
    x = inputs(4)
    model(x)[0].sum().backward()
    with torch.no_grad():
        expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for other in copies:
        assert other.deq is not model.deq
        assert (other.deq.solver, other.deq.rtol, other.deq.eval_max_steps) == (Broyden(memory=7), 1e-5, 9)
        with torch.no_grad():
            torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    names = {name for name in model.state_dict() if name.startswith("deq")}
    inside = "deq.cell.linear"
    assert names == {f"{inside}.bias", *(f"{inside}.parametrizations.weight.original{i}" for i in (0, 1))}
    fresh = Model(eval_max_steps=9, rtol=1e-5, solver=Broyden(memory=7))
    pydeq.nn.weight_norm(fresh.deq.cell.linear)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fresh(x), expected, rtol=0, atol=0)
