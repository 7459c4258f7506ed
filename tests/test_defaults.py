"""A default device and a default dtype change nothing: tensors are where their inputs are, in their inputs' dtype."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pydeq
from experiments import data
from experiments.training.synthetic import synthetic_graph, synthetic_images, synthetic_text
from pydeq.compat import torchdeq
from pydeq.compat.deq import anderson, broyden
from pydeq.testing import linear_map, softsign_map, tanh_map

SOLVERS = (pydeq.Picard(damping=0.9), pydeq.Anderson(), pydeq.Anderson(damping=0.8), pydeq.Broyden(), pydeq.GMRES())
ADJOINTS = (
    (pydeq.Anderson(), pydeq.Implicit()),
    (pydeq.Anderson(), pydeq.Implicit(solver=pydeq.GMRES(), warm_start=True)),
    (pydeq.Anderson(), pydeq.Phantom()),
    (pydeq.Anderson(), pydeq.JacobianFree()),
    (pydeq.Broyden(), pydeq.Shine(refine_steps=2)),
    (pydeq.Picard(), pydeq.Unrolled()),
    (pydeq.Anderson(), pydeq.Unrolled(checkpoint=True)),
    (pydeq.Picard(), pydeq.Reversible()),
)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    kind = {"dtype": torch.float32, "device": "cpu", "generator": generator}
    return 0.1 * torch.randn(6, 6, **kind), torch.randn(4, 6, **kind)


def seed() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(1)


def solves() -> list[Tensor]:
    _, x = inputs()
    found = []
    for solver, dtype in itertools.product(SOLVERS, (torch.float32, torch.bfloat16, torch.float64)):
        start = x.to(dtype)
        solution = pydeq.fixed_point(lambda z, x=start: 0.9 * torch.cos(z) + x, start, solver=solver, trace=True)
        repr(solution)
        found += [solution.value, solution.image, solution.residual, solution.relative_residual, solution.trace]
        found.append(solution.status)
    compact = pydeq.fixed_point(
        lambda z, x: 0.5 * z + x, x, x, compact=True, batched_context=(True,), states_at=(1, 3), atol=1e-6
    )
    return [*found, compact.value, *compact.states]


def layers() -> list[Tensor]:
    found = []
    for solver, adjoint in ADJOINTS:
        W, x = (entry.clone().requires_grad_() for entry in inputs())
        deq = pydeq.DEQ(lambda z, x, W=W: torch.tanh(z @ W + x), solver=solver, adjoint=adjoint)
        penalty = pydeq.JacobianPenalty(0.5)
        z, solution = deq(torch.zeros_like(x), x, return_solution=True, penalty=penalty)
        loss = z.square().sum() + solution.penalty
        found += [z.detach(), *torch.autograd.grad(loss, (W, x))]
    W, x = inputs()
    deq = pydeq.DEQ(lambda z, x, W: torch.tanh(z @ W + x))
    found.append(torch.func.grad(lambda W: deq(torch.zeros_like(x), x, W).sum())(W))
    return found


def jacobians() -> list[Tensor]:
    W, x = inputs()
    found = []
    for mode, distribution in itertools.product(("vjp", "jvp"), ("gaussian", "rademacher")):
        options = {"mode": mode, "distribution": distribution, "generator": seed()}
        found.append(pydeq.jacobian_penalty(lambda z: torch.tanh(z @ W), x, probes=2, **options))
        found.append(pydeq.frobenius_norm_squared(lambda z: torch.tanh(z @ W), x, probes=2, **options))
    for method in ("growth", "arnoldi"):
        found.append(pydeq.spectral_radius(lambda z: torch.tanh(z @ W), x, method=method, generator=seed()))
    return found


def drop_in() -> list[Tensor]:
    W, x = inputs()
    found = []
    for name in ("anderson", "broyden", "fixed_point_iter"):
        solver = torchdeq.solver.get_solver(name)
        for options in ({}, {"tau": 0.8} if name != "broyden" else {"ls": True}):
            z, _, info = solver(lambda z: torch.tanh(z @ W + x), torch.zeros_like(x), tol=1e-4, **options)
            found += [z, info["abs_lowest"], info["rel_trace"]]
    deq = torchdeq.get_deq(f_solver="anderson", b_solver="broyden", ift=True)
    weight = W.clone().requires_grad_()
    z, _ = deq(lambda z: torch.tanh(z @ weight + x), torch.zeros_like(x))
    found += [z[-1].detach(), *torch.autograd.grad(z[-1].sum(), weight)]
    for solve in (anderson, broyden):
        found.append(solve(lambda z: torch.tanh(z @ W + x[:, :, None].mT).mT.mT, x[:, None], threshold=12)["result"])
    return found


def loaded() -> list[Tensor]:
    graph = synthetic_graph()
    found = [synthetic_images("train").images, *synthetic_text().values(), graph.edges]
    found += [*data.batches(10, 3, 0, 0), *data.batches(10, 3, 0, 0, shuffle=False)]
    for make in (linear_map, tanh_map, softsign_map):
        problem = make(0.5, 5)
        found += [problem.z0, *problem.context]
    return found


@pytest.fixture
def under(request):
    before = torch.get_default_dtype()
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(before)


@pytest.mark.parametrize("make", [solves, layers, jacobians, drop_in, loaded], ids=lambda make: make.__name__)
def test_defaults_change_nothing(make: Callable[[], list[Tensor]], under):
    torch.manual_seed(0)
    expected = make()
    for device, dtype in ((torch.device("meta"), torch.float32), (None, torch.float64), (None, torch.bfloat16)):
        torch.manual_seed(0)
        torch.set_default_device(device)
        torch.set_default_dtype(dtype)
        actual = make()
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
        for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
            where = f"{number} of {make.__name__}, default device {device}, default dtype {dtype}"
            assert (one.device, one.dtype, one.shape) == (other.device, other.dtype, other.shape), where
            assert torch.equal(one.nan_to_num(-7), other.nan_to_num(-7)), where
