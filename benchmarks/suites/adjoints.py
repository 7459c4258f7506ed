"""Adjoints on trained cells: the products of backward solvers, and the errors of approximate gradients."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import pydeq
from benchmarks.problems.dense import DenseCell
from benchmarks.problems.trained import trained
from benchmarks.results import number
from benchmarks.suites.base import Context
from benchmarks.timing import Spread, WatchedCell, alternate, spread, threads
from pydeq.adjoints import Adjoint

RTOL, MAX_PRODUCTS = 1e-6, 200
FORWARD_RTOL, FORWARD_STEPS = 1e-4, 60

SOLVERS = {
    "gmres": ("GMRES", pydeq.GMRES(restart=50)),
    "anderson": ("Anderson, memory 6", pydeq.Anderson(memory=6)),
    "broyden": ("Broyden", pydeq.Broyden()),
    "picard": ("Picard", pydeq.Picard()),
}
EXACT = "implicit_gmres_1e-6"
ADJOINTS = {
    "jacobian_free": ("JacobianFree", pydeq.JacobianFree()),
    "phantom_3": ("Phantom, 3 steps", pydeq.Phantom(steps=3)),
    "phantom_5": ("Phantom, 5 steps, damping 0.5", pydeq.Phantom(steps=5, damping=0.5)),
    "neumann_5": ("Phantom, 5 terms of Neumann's series", pydeq.Phantom(steps=5, form="neumann")),
    "shine": ("Shine", pydeq.Shine()),
    "shine_5": ("Shine, refined by 5 products", pydeq.Shine(refine_steps=5)),
    "implicit_anderson_1e-2": ("Implicit, Anderson, rtol 1e-2", pydeq.Implicit(pydeq.Anderson(6), 1e-2, MAX_PRODUCTS)),
    "implicit_gmres_1e-2": ("Implicit, GMRES, rtol 1e-2", pydeq.Implicit(pydeq.GMRES(50), 1e-2, MAX_PRODUCTS)),
    "implicit_gmres_1e-4": ("Implicit, GMRES, rtol 1e-4", pydeq.Implicit(pydeq.GMRES(50), 1e-4, MAX_PRODUCTS)),
    EXACT: ("Implicit, GMRES, rtol 1e-6", pydeq.Implicit(pydeq.GMRES(50), RTOL, MAX_PRODUCTS)),
}


@dataclass(frozen=True)
class Case:
    """A cell at its equilibrium, and a loss of the state.

    Args:
        key: For names of figures.
        title: For readers.
        cell: cell(z, x).
        x: Its input.
        loss: State -> 0-d, of the state's dtype.
    """

    key: str
    title: str
    cell: nn.Module
    x: Tensor
    loss: Callable[[Tensor], Tensor]


def run(context: Context) -> None:
    cases = list(_cases(context))
    context.bar.start(len(cases) * (len(SOLVERS) + len(ADJOINTS)))
    with threads(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", pydeq.ConvergenceWarning)  # the table says it
        _solvers(context, cases)
        _gradients(context, cases)


def _cases(context: Context) -> Iterator[Case]:
    batch = context.profile.adjoints_batch
    for penalized in (False, True):
        found = trained(context.profile.adjoints_epochs, penalized)
        with torch.no_grad():
            x = found.model.inject(found.images[: 2 * batch])
        # Without a fixed point there is no gradient to compare with.
        rows = _solve_exactly(found.cell, x)[1].converged.nonzero()[:batch, 0]

        def loss(z: Tensor, found=found, labels=found.labels[rows]) -> Tensor:
            head = copy.deepcopy(found.model.head).to(z.dtype).requires_grad_(False)
            return functional.cross_entropy(head(functional.adaptive_avg_pool2d(z, 2).flatten(1)), labels)

        yield Case(f"digits_{found.key}", found.title, found.cell, x[rows], loss)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cell, x, target = DenseCell(256, radius=1.2), torch.randn(batch, 256), torch.randn(batch, 256)
    yield Case(
        "dense", f"tanh(Wz + x), ({batch}, 256), untrained", cell, x, lambda z: (z - target.to(z)).square().mean()
    )


def _layer(cell: Callable[[Tensor, Tensor], Tensor], adjoint: Adjoint, rtol: float) -> pydeq.DEQ:
    # By Broyden, whose memory Shine needs, for all alike.
    return pydeq.DEQ(cell, solver=pydeq.Broyden(), adjoint=adjoint, rtol=rtol, max_steps=FORWARD_STEPS)


def _share(own: float, others: float) -> float:
    """own / others, where infinite numbers are those of solvers that did not get there."""
    return math.inf if math.isinf(own) else own / others


def _solvers(context: Context, cases: list[Case]) -> None:
    """Products that each solver needs until the slowest sample's adjoint is done."""
    results, batch, rows = context.results, context.profile.adjoints_batch, []
    for case in cases:
        needed: dict[str, float] = {}
        for key, (title, solver) in SOLVERS.items():
            context.bar.show(f"{case.key}, {key}")
            deq = _layer(case.cell, pydeq.Implicit(solver, RTOL, MAX_PRODUCTS), FORWARD_RTOL)
            z, solution = deq(torch.zeros_like(case.x), case.x, return_solution=True)
            loss = case.loss(z)
            parameters = list(case.cell.parameters())

            def backward(loss=loss, parameters=parameters) -> float:
                start = time.perf_counter()
                torch.autograd.grad(loss, parameters, retain_graph=True)
                return time.perf_counter() - start

            clock = spread(alternate({key: backward}, context.profile.adjoints_repeats)[key])
            found = solution.backward
            each, converged = found.sample_nfe.double(), found.converged.double().mean().item()
            name = f"adjoints.{case.key}.rtol{RTOL:g}.{key}"
            mean = Spread(each.mean().item(), each.min().item(), each.max().item(), len(each))
            results.figure(f"{name}.products", found.nfe, "products")
            results.figure(f"{name}.products_per_sample", mean, "products")
            results.figure(f"{name}.converged", converged, "1")
            results.figure(f"{name}.residual", found.relative_residual.max().item(), "1")
            results.figure(f"{name}.time", clock.scaled(1e3), "ms")
            needed[key] = found.nfe if converged == 1.0 else math.inf
            rows.append(
                (
                    case.title,
                    title,
                    ("" if converged == 1.0 else "> ") + str(found.nfe),
                    f"{mean.median:.1f}",
                    f"{100 * converged:.0f}%",
                    f"{found.relative_residual.max().item():.1e}",
                    number(clock.median * 1e3),
                )
            )
            context.bar.advance()
        results.target(
            f"adjoints.gmres.{case.key}",
            f"Products of GMRES as a share of the fewer of Anderson's and Broyden's, to rtol {RTOL:g}: {case.title}",
            "<=",
            1.0,
            _share(needed["gmres"], min(needed["anderson"], needed["broyden"])),
            "x",
        )
    results.table(
        "adjoints",
        f"The adjoint to rtol {RTOL:g}, at most {batch} samples, float32, one thread",
        ("cell", "solver", "products", "per sample", "converged", "residual", "backward, ms"),
        rows,
        f"Products with the Jacobian until the slowest sample is done, at most {MAX_PRODUCTS}, and their mean over"
        " samples. Residual: the largest relative residual at the end. Backward: includes the gradients of the"
        " parameters.",
    )


def _gradients(context: Context, cases: list[Case]) -> None:
    """Cosine and relative error of the gradients of all parameters, compared with those of a float64 solve."""
    results, batch, rows = context.results, context.profile.adjoints_batch, []
    for case in cases:
        reference = _reference(case)
        errors: dict[str, float] = {}
        steps = {key: _step(case, adjoint) for key, (_, adjoint) in ADJOINTS.items()}
        clocks = alternate({key: _timed(step) for key, step in steps.items()}, context.profile.adjoints_repeats)
        for key, (title, adjoint) in ADJOINTS.items():
            context.bar.show(f"{case.key}, {key}")
            watched = WatchedCell(case.cell)
            gradient = _step(case, adjoint, watched)().double()
            cosine = functional.cosine_similarity(gradient, reference, dim=0).item()
            errors[key] = ((gradient - reference).norm() / reference.norm()).item()
            clock = spread(clocks[key])
            name = f"adjoints.{case.key}.{key}"
            results.figure(f"{name}.cosine", cosine, "1")
            results.figure(f"{name}.error", errors[key], "1")
            results.figure(f"{name}.products", watched.products, "products")
            results.figure(f"{name}.step", clock.scaled(1e3), "ms")
            rows.append(
                (
                    case.title,
                    title,
                    f"{cosine:.4f}",
                    number(errors[key]),
                    str(watched.calls),
                    str(watched.products),
                    number(clock.median * 1e3),
                )
            )
            context.bar.advance()
        results.target(
            f"adjoints.shine.{case.key}",
            f"The error of Shine's gradient as a share of JacobianFree's: {case.title}",
            "<=",
            1.0,
            errors["shine"] / errors["jacobian_free"],
            "x",
        )
    results.table(
        "adjoints",
        f"Gradients of all parameters compared with exact ones, at most {batch} samples, float32, one thread",
        ("cell", "adjoint", "cosine", "relative error", "evaluations", "products", "step, ms"),
        rows,
        f"All solve forward by Broyden to rtol {FORWARD_RTOL:g}. Exact: float64, both solves to 1e-10. Time,"
        " evaluations of the cell and products with its Jacobian are those of a whole step, forward and backward.",
    )


def _step(case: Case, adjoint: Adjoint, cell: Callable[[Tensor, Tensor], Tensor] | None = None) -> Callable[[], Tensor]:
    """Run forward and backward; returns the flat gradient of all parameters."""
    deq = _layer(cell or case.cell, adjoint, FORWARD_RTOL)
    parameters = list(case.cell.parameters())

    def step() -> Tensor:
        loss = case.loss(deq(torch.zeros_like(case.x), case.x))
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])

    return step


def _timed(step: Callable[[], Tensor]) -> Callable[[], float]:
    def measure() -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return measure


def _solve_exactly(cell: nn.Module, x: Tensor) -> tuple[Tensor, pydeq.Solution, list[nn.Parameter]]:
    """The fixed point in float64 to 1e-10, by the solver that all adjoints get; with the parameters of its graph."""
    cell, x = copy.deepcopy(cell).double(), x.double()
    adjoint = pydeq.Implicit(pydeq.GMRES(100), 1e-10, 1000)
    deq = pydeq.DEQ(cell, solver=pydeq.Broyden(), adjoint=adjoint, rtol=1e-10, max_steps=400)
    z, solution = deq(torch.zeros_like(x), x, return_solution=True)
    return z, solution, list(cell.parameters())


def _reference(case: Case) -> Tensor:
    """The gradient in float64, both solves to 1e-10."""
    z, solution, parameters = _solve_exactly(case.cell, case.x)
    gradient = torch.autograd.grad(case.loss(z), parameters)
    for solved in (solution, solution.backward):
        if solved is None or not bool(solved.converged.all()):
            raise RuntimeError(f"the reference must converge on {case.key}, got {solved}")
    return torch.cat([part.flatten() for part in gradient])
