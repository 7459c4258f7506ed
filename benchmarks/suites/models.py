"""Reference models: a training step and inference, with pydeq and with another library's solver.

The same model, parameters and inputs on every side, and the caps and tolerances of its configuration: only what its
``deq`` is differs. Weights are new ones, so most solves end at their caps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.allocations import peak_bytes
from benchmarks.peers import LayerSettings, Method, Peer
from benchmarks.results import number, times
from benchmarks.suites.base import BASELINE, Context
from benchmarks.timing import alternate, ratios, spread, threads
from pydeq import DEQ, Anderson, Implicit
from pydeq.models import DEQTransformerConfig, DEQTransformerLM, EquilibriumModel, SolverConfig, build
from pydeq.state import layout_of

SECONDS = 5.0  # of a comparison, then three rounds are enough
LIMIT = 1.3


@dataclass(frozen=True)
class Case:
    """A model and an input.

    Args:
        key: For names of figures.
        title: For readers.
        make: On a device, the model and its loss of a fixed input; the same numbers on each.
    """

    key: str
    title: str
    make: Callable[[torch.device], tuple[EquilibriumModel, Callable[[], Tensor]]]


def _mdeq(name: str, batch: int, device: torch.device) -> tuple[EquilibriumModel, Callable[[], Tensor]]:
    model, images, labels = build(name), torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10
    model, images, labels = model.to(device), images.to(device), labels.to(device)
    return model, lambda: nn.functional.cross_entropy(model(images), labels)


def _transformer(device: torch.device) -> tuple[EquilibriumModel, Callable[[], Tensor]]:
    solver = SolverConfig(
        forward="anderson", backward="anderson", memory=6, backward_memory=6, rtol=1e-3, max_steps=12,
        backward_rtol=1e-3, backward_max_steps=13,
    )  # fmt: skip
    config = DEQTransformerConfig(
        vocabulary=128, d_model=128, d_inner=512, heads=4, d_head=32, memory_length=64, solver=solver
    )
    model = DEQTransformerLM(config).to(device)
    text = torch.randint(128, (8, 65)).to(device)

    def loss() -> Tensor:
        return model(text[:, :-1], text[:, 1:]).nll.mean()

    return model, loss


CASES = (
    Case("mdeq_tiny", "MDEQ, CIFAR tiny, batch 8", lambda device: _mdeq("mdeq_cifar_tiny", 8, device)),
    Case("mdeq_large", "MDEQ, CIFAR large, batch 2", lambda device: _mdeq("mdeq_cifar_large", 2, device)),
    Case("transformer", "DEQ-Transformer, d 128, (8, 64)", _transformer),
)


def run(context: Context) -> None:
    results, bar = context.results, context.bar
    cases = [case for case in CASES if case.key not in context.profile.left_out_models]
    bar.start(2 * len(cases))
    rows: list[tuple[str, ...]] = []
    lowest: list[float] = []
    with threads(1), torch.random.fork_rng(devices=[]):
        for case in cases:
            torch.manual_seed(0)
            model, loss = case.make(torch.device("cpu"))
            for kind in ("train", "inference"):
                bar.show(f"{case.key}, {kind}")
                ratio = _measure(context, case, kind, model, loss, rows)
                lowest += [] if ratio is None else [ratio]
                bar.advance()
    results.target(
        "models.each",
        "Reference models, a training step and inference: torchdeq's time over pydeq's, in the worst case",
        ">=",
        LIMIT,
        min(lowest) if lowest else None,
        "x",
    )
    results.table(
        "models",
        "Reference models, one thread, float32, new weights",
        ("model", "what", "library", "ms", f"times {BASELINE}'s", "evaluations", "peak MiB"),
        rows,
        "Training step: forward and backward of the loss. Inference: the loss without gradients, in evaluation mode."
        " Medians of alternating runs. Each side uses the solvers, caps and tolerances of the configuration."
        " Evaluations of the cell include the one that attaches the graph.",
    )


def _measure(
    context: Context, case: Case, kind: str, model: EquilibriumModel, loss: Callable[[], Tensor],
    rows: list[tuple[str, ...]],
) -> float | None:  # fmt: skip
    """The figures of one case; torchdeq's time over pydeq's."""
    results, name = context.results, f"models.{case.key}.{kind}"
    model.train(kind == "train")

    def side(peer: Peer) -> Callable[[], float]:
        def measure() -> float:
            with solved_by(peer, model):
                torch.manual_seed(1)  # dropout
                start = time.perf_counter()
                step(model, loss, kind)
                return time.perf_counter() - start

        return measure

    sides = {each: side(peer) for each, peer in context.peers.items()}
    measured = alternate(sides, context.profile.training_repeats, seconds=SECONDS)
    for each, peer in context.peers.items():
        with _counted(model) as calls, solved_by(peer, model):
            torch.manual_seed(1)  # the masks of the timed steps
            step(model, loss, kind)

        def forget(peer: Peer = peer) -> None:
            peer.forget()
            model.zero_grad()  # the profiler takes what it frees of an earlier step for memory of this one

        with solved_by(peer, model):
            peak = peak_bytes(lambda: step(model, loss, kind), forget) / 2**20
        seconds = spread(measured[each])
        results.figure(f"{name}.{each}.time", seconds.scaled(1e3), "ms")
        results.figure(f"{name}.{each}.evaluations", calls[0], "calls")
        results.figure(f"{name}.{each}.memory", peak, "MiB")
        over = ""
        if each != BASELINE:
            ratio = ratios(measured[each], measured[BASELINE])
            results.figure(f"{name}.{each}_over_{BASELINE}", ratio, "1")
            over = times(ratio.median)
        what = "training step" if kind == "train" else "inference"
        rows.append((case.title, what, each, number(seconds.median * 1e3), over, str(calls[0]), number(peak)))
    return results.value(f"{name}.torchdeq_over_{BASELINE}")


def step(model: EquilibriumModel, loss: Callable[[], Tensor], kind: str) -> None:
    """Forward and backward of the loss ("train"), or the loss without gradients ("inference")."""
    if kind == "train":
        model.zero_grad()
        loss().backward()
    else:
        with torch.no_grad():
            loss()


@contextmanager
def _counted(model: EquilibriumModel) -> Iterator[list[int]]:
    """Counts calls of the model's cell."""
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1

    cell = model.deq.cell
    assert isinstance(cell, nn.Module)
    handle = cell.register_forward_pre_hook(count)
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def solved_by(peer: Peer, model: EquilibriumModel) -> Iterator[None]:
    """Context manager in which another library solves for the model; for pydeq the model keeps its ``deq``."""
    if peer.name == BASELINE:
        yield
        return
    own = model.deq
    model.deq = _Solved(peer, own)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        model.deq = own


class _Solved(nn.Module):
    """A stand-in for a model's ``deq`` that solves with another library, on flat states."""

    def __init__(self, peer: Peer, own: DEQ) -> None:
        super().__init__()
        self.peer, self.cell, self.settings = peer, own.cell, settings_of(own)

    def forward(self, z0: Any, *context: Any, **options: Any) -> tuple[Any, None]:
        layout = layout_of(z0)

        def cell(z: Tensor, x: Any) -> Tensor:
            y: Any = self.cell(layout.view(z), *context)
            parts = y if isinstance(y, tuple) else (y,)
            flat = [part.flatten(1) for part in parts]
            return flat[0] if len(flat) == 1 else torch.cat(flat, 1)

        layer = self.peer.layer(cell, self.settings)
        return layout.view(layer.solve(layout.flatten(z0), torch.empty(0))), None


def settings_of(deq: DEQ) -> LayerSettings:
    """Solver, caps and tolerances of a layer that uses the same solver forward and backward."""
    solver, adjoint = deq.solver, deq.adjoint
    if not isinstance(adjoint, Implicit) or adjoint.solver != solver or deq.rtol is None or adjoint.rtol is None:
        raise ValueError(f"deq must solve its adjoint as itself, to tolerances of its own, got {deq}")
    anderson = isinstance(solver, Anderson)
    method = Method("anderson", solver.memory) if anderson else Method("broyden")
    return LayerSettings(method, deq.rtol, deq.max_steps, adjoint.rtol, adjoint.max_steps)
