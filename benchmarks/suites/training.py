"""A training step: forward, backward and the Jacobian penalty, by each library around the same cell.

In two cells, convolutional and transformer, f dominates; in a cheap cell the solver dominates. Weights stay at their
initial values, so every step of a case is the same work. Caps and tolerances are the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.allocations import peak_bytes
from benchmarks.peers import Layer, LayerSettings, Method, Peer
from benchmarks.problems.convolution import ConvCell
from benchmarks.problems.dense import DenseCell
from benchmarks.problems.transformer import TransformerCell
from benchmarks.results import number, times
from benchmarks.suites.base import BASELINE, Context
from benchmarks.timing import WatchedCell, alternate, ratios, spread, threads

SETTINGS = LayerSettings(Method("anderson", memory=6), rtol=1e-3, max_calls=30, adjoint_rtol=1e-4, adjoint_max_calls=30)
STRENGTH = 0.5
KINDS = ("plain", "penalty")
BY_DIFFERENCE = f"{BASELINE}_difference"  # the penalty's mode; the other one is vjp
PRICE = 1.4  # of a step with penalty over one without


@dataclass(frozen=True)
class Case:
    """A cell with its input, and how many times torchdeq's time a step should save.

    Args:
        key: For names of figures.
        title: For readers.
        make: Makes cell, z0 and x under a seed.
        limit: torchdeq's time over pydeq's, at least.
    """

    key: str
    title: str
    make: Callable[[], tuple[nn.Module, Tensor, Tensor]]
    limit: float

    def problem(self, share: float) -> tuple[nn.Module, Tensor, Tensor]:
        """Cell, z0 and x for this share of the batch."""
        cell, z0, x = self.make()
        batch = math.ceil(share * len(z0))
        return cell, z0[:batch], x[:batch]


def _convolutional() -> tuple[nn.Module, Tensor, Tensor]:
    return ConvCell(32), torch.zeros(16, 32, 16, 16), torch.randn(16, 32, 16, 16)


def _transformer() -> tuple[nn.Module, Tensor, Tensor]:
    return TransformerCell(128, heads=4, inner=512), torch.zeros(8, 64, 128), torch.randn(8, 64, 384)


def _dense() -> tuple[nn.Module, Tensor, Tensor]:
    return DenseCell(256), torch.zeros(32, 256), torch.randn(32, 256)


CASES = (
    Case("conv", "convolutional, (16, 32x16x16)", _convolutional, 1.3),
    Case("transformer", "transformer, (8, 64x128)", _transformer, 1.3),
    Case("dense", "tanh(Wz + x), (32, 256)", _dense, 3.0),
)


def run(context: Context) -> None:
    results, bar = context.results, context.bar
    bar.start(len(CASES) * len(KINDS))
    rows: list[tuple[str, ...]] = []
    lowest: list[float] = []
    prices: list[float] = []
    with threads(1):
        for case in CASES:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                cell, z0, x = case.problem(context.profile.training_share)
            x.requires_grad_()
            worst: list[float] = []
            for kind in KINDS:
                bar.show(f"{case.key}, {kind}")
                ratio = _measure(context, case, kind, cell, z0, x, rows)
                worst += [] if ratio is None else [ratio]
                bar.advance()
            for side in (BASELINE, BY_DIFFERENCE):
                price = results.value(f"training.{case.key}.penalty.{side}.price")
                prices += [] if price is None else [price]
            lowest += worst
            results.target(
                f"training.{case.key}",
                f"A training step, {case.title}: torchdeq's time over pydeq's, with and without penalty",
                ">=",
                case.limit,
                min(worst) if worst else None,
                "x",
            )
    results.target(
        "training.never_slower",
        "A training step: torchdeq's time over pydeq's, in the worst case",
        ">=",
        1.0,
        min(lowest) if lowest else None,
        "x",
    )
    results.target(
        "training.penalty_price",
        "A training step with penalty, by vjp or by differences: its time over that of a step without penalty,"
        " in the worst case",
        "<=",
        PRICE,
        max(prices) if prices else None,
        "x",
    )
    results.table(
        "training",
        "A training step, one thread, float32",
        ("cell", "loss", "library", "ms", f"times {BASELINE}'s", "evaluations", "products", "peak MiB", "in f"),
        rows,
        "Forward, backward and, if the loss has it, the penalty with one Gaussian probe. Medians of alternating steps."
        " The cell counts its evaluations and the products of a cotangent with its Jacobian, including those that"
        " attach the graph and form the gradients of the parameters. Peak: tensors that the step allocates. In f: the"
        f" time that a step without penalty spends in evaluations and products. {_conditions()}",
    )


def _measure(
    context: Context, case: Case, kind: str, cell: nn.Module, z0: Tensor, x: Tensor, rows: list[tuple[str, ...]]
) -> float | None:
    """The figures of one case; torchdeq's time over pydeq's."""
    results, name = context.results, f"training.{case.key}.{kind}"
    sides = {side: (peer, SETTINGS) for side, peer in context.peers.items()}
    if kind == "penalty":
        sides[BY_DIFFERENCE] = context.peers[BASELINE], replace(SETTINGS, penalty="difference")
    steps = {side: _step(peer, settings, cell, cell, z0, x, kind) for side, (peer, settings) in sides.items()}

    def timed(step: Callable[[], object]) -> Callable[[], float]:
        def measure() -> float:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start

        return measure

    turns = {side: timed(step) for side, step in steps.items()}
    if kind == "penalty":  # its cost, alternating with a step without it
        turns["plain"] = timed(_step(context.peers[BASELINE], SETTINGS, cell, cell, z0, x, "plain"))
    measured = alternate(turns, context.profile.training_repeats)
    if kind == "penalty":
        for side in (BASELINE, BY_DIFFERENCE):
            results.figure(f"{name}.{side}.price", ratios(measured[side], measured["plain"]), "1")
    evaluation, product = _cost(cell, z0, x)
    for side, (peer, settings) in sides.items():
        counted = WatchedCell(cell)
        step = _step(peer, settings, cell, counted, z0, x, kind)
        step()  # the first penalty of a cell also tries once whether its graph can be differentiated twice
        counted.calls = counted.products = 0
        step()

        def forget(peer: Peer = peer) -> None:
            peer.forget()
            cell.zero_grad()  # the profiler takes what it frees of an earlier step for memory of this one
            x.grad = z0.grad = None

        peak = peak_bytes(steps[side], forget) / 2**20
        seconds = spread(measured[side])
        inside = (counted.calls * evaluation + counted.products * product) / seconds.median
        results.figure(f"{name}.{side}.step", seconds, "s")
        results.figure(f"{name}.{side}.evaluations", counted.calls, "calls")
        results.figure(f"{name}.{side}.products", counted.products, "products")
        results.figure(f"{name}.{side}.memory", peak, "MiB")
        over = ""
        if side != BASELINE:
            ratio = ratios(measured[side], measured[BASELINE])
            results.figure(f"{name}.step.{side}_over_{BASELINE}", ratio, "1")
            over = times(ratio.median)
        label = "with penalty" if kind == "penalty" else "without penalty"
        shown = f"{BASELINE}, by difference" if side == BY_DIFFERENCE else side
        share = f"{100 * inside:.0f}%" if kind == "plain" else ""
        row = (case.title, label, shown, number(seconds.median * 1e3), over)
        rows.append((*row, str(counted.calls), str(counted.products), number(peak), share))
    return results.value(f"{name}.step.torchdeq_over_{BASELINE}")


def _step(
    peer: Peer,
    settings: LayerSettings,
    cell: nn.Module,
    called: Callable[[Tensor, Tensor], Tensor],
    z0: Tensor,
    x: Tensor,
    kind: str,
) -> Callable[[], None]:
    """A training step of one library, which calls ``called`` for the cell; gradients as it leaves them."""
    layer: Layer = peer.layer(called, settings)
    # Norms would hide a loss of z's length from the cell.
    weights = torch.randn(z0.shape, generator=torch.Generator().manual_seed(1))

    def step() -> None:
        cell.zero_grad()
        x.grad = None
        if kind == "penalty":
            z, penalty = layer.solve_penalized(z0, x)
            loss = (z * weights).mean() + STRENGTH * penalty
        else:
            loss = (layer.solve(z0, x) * weights).mean()
        loss.backward()

    return step


def _cost(cell: nn.Module, z0: Tensor, x: Tensor) -> tuple[float, float]:
    """Seconds of an evaluation and of a product, medians."""

    def evaluation() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            cell(z0, x)
        return time.perf_counter() - start

    z = z0.clone().requires_grad_()
    y = cell(z, x)
    v = torch.ones_like(y)

    def product() -> float:
        start = time.perf_counter()
        torch.autograd.grad(y, z, v, retain_graph=True)
        return time.perf_counter() - start

    measured = alternate({"evaluation": evaluation, "product": product}, 5)
    return spread(measured["evaluation"]).median, spread(measured["product"]).median


def _conditions() -> str:
    return (
        f"Anderson of memory 6 everywhere, forward to rtol {SETTINGS.rtol:g} in at most {SETTINGS.max_calls}"
        f" evaluations, backward to {SETTINGS.adjoint_rtol:g} in at most {SETTINGS.adjoint_max_calls}."
    )
