"""The Jacobian penalty: the time of eight probes, and the error of estimates at equal cost."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import pydeq
from benchmarks.allocations import quiet
from benchmarks.problems.dense import DenseCell
from benchmarks.problems.trained import trained
from benchmarks.problems.transformer import TransformerCell
from benchmarks.results import number, times
from benchmarks.suites import training
from benchmarks.suites.base import BASELINE, Context
from benchmarks.timing import Spread, alternate, ratios, spread, threads
from pydeq.cell.linearization import linearize

PROBES = 8
LIMIT = 0.6  # of torchdeq's time, by differences
HALF = 0.5  # of the time by vjp, likewise
PRODUCTS = (3, 9, 30)  # probes of the estimates
SAMPLES = 8


@dataclass(frozen=True)
class Estimate:
    """A way to estimate ||J||_F^2; ``options`` are those of :func:`pydeq.frobenius_norm_squared`."""

    key: str
    title: str
    options: dict[str, Any]


ESTIMATES = (
    Estimate("gaussian", "Hutchinson, Gaussian", {"distribution": "gaussian"}),
    Estimate("rademacher", "Hutchinson, Rademacher", {"distribution": "rademacher"}),
    Estimate("gaussian_jvp", "Hutchinson, Gaussian, JVP", {"distribution": "gaussian", "mode": "jvp"}),
    Estimate("rademacher_jvp", "Hutchinson, Rademacher, JVP", {"distribution": "rademacher", "mode": "jvp"}),
    Estimate("hutchpp", "Hutch++, Gaussian", {"distribution": "gaussian", "method": "hutch++"}),
    Estimate("hutchpp_rademacher", "Hutch++, Rademacher", {"distribution": "rademacher", "method": "hutch++"}),
)


def run(context: Context) -> None:
    context.bar.start(2 * len(training.CASES) + len(ESTIMATES) * 4)
    with threads(1):
        _time(context)
        _in_a_layer(context)
        _errors(context)


def _time(context: Context) -> None:
    """Compare eight probes at once with a loop over them, for a penalty with its gradients."""
    results, rows, shares = context.results, [], []
    for case in training.CASES:
        context.bar.show(f"{PROBES} probes, {case.key}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            cell, z, x = case.problem(context.profile.training_share)
            z = torch.randn_like(z)
        sides = dict(_sides(context, cell, z, x))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            measured = alternate(sides, context.profile.jacobian_repeats)
        results.notices += dict.fromkeys(
            f"{PROBES} probes, {case.key}: {warning.message}"
            for warning in caught
            if warning.category is RuntimeWarning
        )
        for side, values in measured.items():
            found = spread(values)
            results.figure(f"jacobian.{case.key}.probes{PROBES}.{side}", found.scaled(1e3), "ms")
            over = ""
            for other in context.others:
                if side.startswith(BASELINE):
                    ratio = ratios(values, measured[other])
                    results.figure(f"jacobian.{case.key}.probes{PROBES}.{side}_over_{other}", ratio, "1")
                    over = times(ratio.median)
                    if side == f"{BASELINE}_difference" and other == "torchdeq" and case.key != "dense":
                        shares.append(ratio.median)
            work, inside = _work(sides[side], min(5, context.profile.jacobian_repeats))
            results.figure(f"jacobian.{case.key}.probes{PROBES}.{side}.operations", work, "1e9")
            results.figure(f"jacobian.{case.key}.probes{PROBES}.{side}.products_time", inside * 1e3, "ms")
            label = side.replace("_", ", ")
            rows.append((case.title, label, number(found.median * 1e3), over, number(work), number(inside * 1e3)))
        context.bar.advance()
    results.target(
        "jacobian.probes",
        f"A penalty with {PROBES} probes by differences and its gradients: share of the time of torchdeq's loop, in the"
        " worst case of the cells that spend most of a step in f",
        "<=",
        LIMIT,
        max(shares) if shares else None,
        "x",
    )
    results.table(
        "jacobian",
        f"The penalty with {PROBES} Gaussian probes and its gradients, one thread, float32",
        ("cell", "library", "ms", *(f"share of {name}'s" for name in context.others), "Gflop", "in them, ms"),
        rows,
        f"One evaluation of the cell, {PROBES} products, and backward through them. Medians of alternating runs. Gflop:"
        " of matrix products and convolutions, with the least time seen inside these operators. Each probe takes a"
        " product with J, one product back through it and one for the weights; JVPs do not go back to z. Differences"
        " take one evaluation per probe and one more; the transformer's attention is then fused.",
    )


def _fused(cell: nn.Module) -> nn.Module:
    """The same map with fused attention, which only differences can use."""
    if not isinstance(cell, TransformerCell):
        return cell
    fused = copy.copy(cell)  # the same parameters
    fused.fused = True
    return fused


def _in_a_layer(context: Context) -> None:
    """The time that a penalty with one probe adds in a layer, where f(z) and its graph exist already."""
    results, rows, shares, alone = context.results, [], [], []
    for case in training.CASES:
        context.bar.show(f"one probe in a layer, {case.key}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            cell, z, x = case.problem(context.profile.training_share)
            z = torch.randn_like(z)

        def timed(fn: nn.Module, options: dict[str, Any] | None, z: Tensor = z, x: Tensor = x) -> Callable[[], float]:
            def measure() -> float:
                fn.zero_grad()
                start = time.perf_counter()
                at = linearize(fn, z, (x,))
                loss = at.y[0].mean()
                if options is not None:
                    loss = loss + pydeq.JacobianPenalty(1.0, **options).evaluate(fn, z, (x,), at)
                loss.backward()
                return time.perf_counter() - start

            return measure

        def by_vjp(cell: nn.Module = cell, z: Tensor = z, x: Tensor = x) -> float:
            cell.zero_grad()
            start = time.perf_counter()
            pydeq.jacobian_penalty(cell, z, x, mode="vjp").backward()
            return time.perf_counter() - start

        fused = _fused(cell)
        sides = {
            "plain": timed(cell, None),
            "vjp": timed(cell, {"mode": "vjp"}),
            "plain_fused": timed(fused, None),
            "difference": timed(fused, {"mode": "difference"}),
            "central": timed(fused, {"mode": "difference", "order": 2}),
            "alone": by_vjp,
        }
        measured = alternate(sides, 3 * context.profile.jacobian_repeats)
        seconds = {side: statistics.median(values) for side, values in measured.items()}
        added = {
            "vjp": seconds["vjp"] - seconds["plain"],
            "difference": seconds["difference"] - seconds["plain_fused"],
            "central": seconds["central"] - seconds["plain_fused"],
        }
        for side, value in added.items():
            results.figure(f"jacobian.{case.key}.layer.{side}.added", value * 1e3, "ms")
        results.figure(f"jacobian.{case.key}.alone.vjp", spread(measured["alone"]).scaled(1e3), "ms")
        ratio, of_alone = added["difference"] / added["vjp"], added["difference"] / seconds["alone"]
        results.figure(f"jacobian.{case.key}.layer.difference_over_vjp", ratio, "1")
        results.figure(f"jacobian.{case.key}.layer.difference_over_alone", of_alone, "1")
        if case.key != "dense":
            shares.append(ratio)
            alone.append(of_alone)
        times_ms = (number(value * 1e3) for value in (seconds["plain"], *added.values(), seconds["alone"]))
        rows.append((case.title, *times_ms, times(ratio), times(of_alone)))
        context.bar.advance()
    for name, statement, values in (
        ("difference", "what a penalty by vjp adds", shares),
        ("difference_alone", "the time of a penalty by vjp outside of a layer", alone),
    ):
        results.target(
            f"jacobian.{name}",
            f"Time that a penalty by differences adds to a layer's step: share of {statement}, in the worst case"
            " of the cells that spend most of a step in f",
            "<=",
            HALF,
            max(values) if values else None,
            "x",
        )
    results.table(
        "jacobian",
        "The penalty with one Gaussian probe and its gradients in a layer, one thread, float32, in ms",
        ("cell", "f and backward", "vjp adds", "difference adds", "central adds", "vjp outside", "share", "of outside"),
        rows,
        "Time added to one evaluation of f with its backward pass, which the loss needs in any case. Outside: a penalty"
        " outside of a layer, with its own evaluation, product, and backward through both. Medians of alternating runs."
        " With differences, attention is fused.",
    )


class _Operations(TorchDispatchMode):
    """Counts operations by torch's formulas; torch's own counter does not count inside ``autograd.grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


# The operators in which matrix products and convolutions run.
_PRODUCTS = {
    f"aten::{name}"
    for name in ("mm", "addmm", "bmm", "baddbmm", "mkldnn_convolution", "thnn_conv2d", "convolution_backward")
}


def _work(side: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Operations of matrix products and convolutions, in 1e9, and the least seconds in them, under a profiler."""
    with _Operations() as counted:
        side()
    spent = []
    for _ in range(repeats):
        with quiet(), profile(activities=[ProfilerActivity.CPU]) as profiled:
            side()
        spent.append(sum(event.self_cpu_time_total for event in profiled.key_averages() if event.key in _PRODUCTS))
    return counted.total / 1e9, min(spent) / 1e6


def _sides(context: Context, cell: nn.Module, z: Tensor, x: Tensor) -> Iterator[tuple[str, Callable[[], float]]]:
    def timed(penalty: Callable[[], Tensor]) -> Callable[[], float]:
        def measure() -> float:
            cell.zero_grad()
            start = time.perf_counter()
            penalty().backward()
            return time.perf_counter() - start

        return measure

    for mode in ("vjp", "jvp", "difference"):
        name = BASELINE if mode == "vjp" else f"{BASELINE}_{mode}"
        fn = _fused(cell) if mode == "difference" else cell
        yield name, timed(lambda mode=mode, fn=fn: pydeq.jacobian_penalty(fn, z, x, probes=PROBES, mode=mode))
    if "torchdeq" in context.peers:
        from torchdeq.loss import jac_reg

        def loop() -> Tensor:
            leaf = z.clone().requires_grad_()
            return jac_reg(cell(leaf, x), leaf, vecs=PROBES)

        yield "torchdeq", timed(loop)


def _cells(context: Context) -> Iterator[tuple[str, str, Callable[..., Tensor], Tensor, Tensor]]:
    """Key, title, cell, its equilibrium and x. States have at most 1024 entries per sample, so exact values exist."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(SAMPLES, 256)
        found: list[tuple[str, str, nn.Module, Tensor, Tensor]] = [
            ("dense", "tanh(Wz + x), D 256", DenseCell(256), torch.zeros_like(x), x),
            ("lowrank", "tanh(Wz + x), D 256, W of rank 8", DenseCell(256, rank=8), torch.zeros_like(x), x),
        ]
    for penalized in (False, True):
        model = trained(context.profile.adjoints_epochs, penalized)
        with torch.no_grad():
            x = model.model.inject(model.images[:SAMPLES])
        found.append((f"digits_{model.key}", f"{model.title}, D 1024", model.cell, torch.zeros_like(x), x))
    for key, title, cell, z0, x in found:
        z = pydeq.fixed_point(cell, z0, x, rtol=1e-5, max_steps=100).image
        assert isinstance(z, Tensor)
        yield key, title, cell, z, x


def _errors(context: Context) -> None:
    """Root mean square of the relative errors over samples and draws."""
    results, draws, rows = context.results, context.profile.jacobian_draws, []
    for key, title, cell, z, x in _cells(context):
        with torch.no_grad():
            exact = pydeq.frobenius_norm_squared(cell, z, x, method="exact").double()
        for estimate in ESTIMATES:
            context.bar.show(f"error of {estimate.key}, {key}")
            cells = []
            for probes in PRODUCTS:
                generator = torch.Generator().manual_seed(0)
                squares = []
                for _ in range(draws):
                    with torch.no_grad():
                        found = pydeq.frobenius_norm_squared(
                            cell, z, x, probes=probes, generator=generator, **estimate.options
                        )
                    squares.append(((found.double() - exact) / exact).square().mean().item())
                error = spread(squares)
                mean = statistics.fmean(squares) ** 0.5
                bounds = Spread(mean, error.low**0.5, error.high**0.5, draws)
                results.figure(f"jacobian.error.{key}.{estimate.key}.probes{probes}", bounds, "1")
                cells.append(number(mean))
            rows.append((title, estimate.title, *cells))
            context.bar.advance()
    results.table(
        "jacobian",
        "Relative error of the estimate of ||J||_F^2, by the number of products",
        ("cell", "estimate", *(str(probes) for probes in PRODUCTS)),
        rows,
        f"Root mean square over {SAMPLES} samples and {draws} draws, against the exact value. Hutch++ takes its"
        " products out of the same number, and one more. A penalty also averages over the batch.",
    )
