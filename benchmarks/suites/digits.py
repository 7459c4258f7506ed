"""A convolutional DEQ trained on digits by each library, with and without the Jacobian penalty.

All trainings start from the same weights, see the same batches, and alternate their steps. Each model is then
stopped hard: it must classify with what 1 ... 12 evaluations of its cell give.
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

import pydeq
from benchmarks.peers import Layer, LayerSettings, Method, Peer
from benchmarks.problems.digits import Classifier, Digits, load_digits
from benchmarks.results import number
from benchmarks.suites.base import BASELINE, Context
from benchmarks.timing import Spread, ratios, spread, threads

SETTINGS = LayerSettings(Method("anderson", memory=6), rtol=1e-3, max_calls=20, adjoint_rtol=1e-3, adjoint_max_calls=15)
CHANNELS, BATCH, RATE = 16, 64, 2e-2
STRENGTH = 0.5  # of the penalty in the loss, as in the paper on CIFAR-10
STOPS = range(1, 13)
RADIUS_IMAGES, RADIUS_STEPS = 64, 40


class CountedCell:
    """A cell that counts the calls of a solve."""

    def __init__(self, cell: torch.nn.Module) -> None:
        self.cell, self.calls = cell, 0

    def __call__(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return self.cell(z, x)


@dataclass
class Training:
    """One model in training.

    Args:
        name: The library.
        penalized: Whether the loss has the penalty.
    """

    name: str
    penalized: bool
    model: Classifier
    cell: CountedCell
    layer: Layer
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    seconds: list[float] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    radius: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return "penalty" if self.penalized else "plain"

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One step of training, timed."""
        self.cell.calls = 0
        start = time.perf_counter()
        logits, z, x = self.model(images, self.layer.solve)
        loss = functional.cross_entropy(logits, labels)
        calls = self.cell.calls
        if self.penalized:
            loss = loss + STRENGTH * self.layer.penalty(z, x)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.seconds.append(time.perf_counter() - start)
        self.calls.append(calls)

    @torch.no_grad()
    def test(self, digits: Digits, stop: int) -> float:
        """Test accuracy if the solve may evaluate the cell at most ``stop`` times."""
        logits, _, _ = self.model(digits.test_images, lambda z0, x: self.layer.solve(z0, x, stop))
        return (logits.argmax(1) == digits.test_labels).float().mean().item()

    @torch.no_grad()
    def spectral_radius(self, digits: Digits) -> float:
        """Mean spectral radius over test images, at the equilibrium, by pydeq's estimator for every library."""
        x = self.model.inject(digits.test_images[:RADIUS_IMAGES])
        z = self.layer.solve(torch.zeros_like(x), x, 50)
        generator = torch.Generator().manual_seed(0)
        return pydeq.spectral_radius(self.model.cell, z, x, steps=RADIUS_STEPS, generator=generator).mean().item()


def run(context: Context) -> None:
    digits, profile = load_digits(), context.profile
    steps = len(digits.images) // BATCH
    context.bar.start(profile.digits_seeds * profile.digits_epochs * steps)
    done: dict[tuple[str, str], list[Training]] = {}
    with threads(1):
        for seed in range(profile.digits_seeds):
            for training in _train(context, digits, seed, steps):
                training.accuracy = [training.test(digits, stop) for stop in STOPS]
                done.setdefault((training.name, training.kind), []).append(training)
    _report(context, done)


def _train(context: Context, digits: Digits, seed: int, steps: int) -> list[Training]:
    profile = context.profile
    torch.manual_seed(seed)
    start = Classifier(CHANNELS)
    trainings = [
        _training(name, peer, penalized, start, steps * profile.digits_epochs)
        for penalized in (False, True)
        for name, peer in context.peers.items()
    ]
    for epoch in range(profile.digits_epochs):
        for turn, (images, labels) in enumerate(digits.batches(BATCH, epoch, seed)):
            for training in trainings if turn % 2 == 0 else reversed(trainings):
                training.step(images, labels)
            context.bar.advance(f"training {seed + 1}, epoch {epoch + 1}")
        for training in trainings:
            training.radius.append(training.spectral_radius(digits))
    return trainings


def _training(name: str, peer: Peer, penalized: bool, start: Classifier, steps: int) -> Training:
    model = copy.deepcopy(start)
    cell = CountedCell(model.cell)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return Training(name, penalized, model, cell, peer.layer(cell, SETTINGS), optimizer, scheduler)


def _report(context: Context, done: dict[tuple[str, str], list[Training]]) -> None:
    results, figure = context.results, context.results.figure
    rows, speed = [], []
    for (name, kind), trainings in done.items():
        case = f"digits.{kind}.{name}"
        by_stop = list(zip(*(training.accuracy for training in trainings), strict=True))
        accuracy = [statistics.fmean(values) for values in by_stop]
        radius = [statistics.fmean(values) for values in zip(*(t.radius for t in trainings), strict=True)]
        for stop, values in zip(STOPS, by_stop, strict=True):
            found = Spread(statistics.fmean(values), min(values), max(values), len(values))
            figure(f"{case}.accuracy.nfe{stop}", found, "1")
        figure(f"{case}.spectral_radius", radius[-1], "1")
        seconds = [value for training in trainings for value in training.seconds[1:]]  # the first step warms up
        calls = [value for training in trainings for value in training.calls]
        figure(f"{case}.step", spread(seconds), "s")
        figure(f"{case}.calls", statistics.fmean(calls), "calls")
        label = "with penalty" if kind == "penalty" else "without penalty"
        stops = tuple(float(stop) for stop in STOPS)
        epochs = tuple(float(epoch + 1) for epoch in range(len(radius)))
        percent, least, most = (
            tuple(100.0 * value for value in values)
            for values in (accuracy, tuple(map(min, by_stop)), tuple(map(max, by_stop)))
        )
        results.curve("accuracy", "Test accuracy at a hard stop", name, label, stops, percent, least, most)
        results.curve("accuracy", "Spectral radius of the cell", name, label, epochs, tuple(radius))
        rows.append((label, name, *(f"{100 * value:.1f}" for value in accuracy), f"{radius[-1]:.2f}"))
        speed.append((label, name, number(spread(seconds).median * 1e3), f"{statistics.fmean(calls):.1f}"))
    for kind in ("plain", "penalty"):
        for name in context.others:
            theirs, ours = done[name, kind], done[BASELINE, kind]
            ratio = ratios(
                [value for training in theirs for value in training.seconds[1:]],
                [value for training in ours for value in training.seconds[1:]],
            )
            figure(f"digits.{kind}.step.{name}_over_{BASELINE}", ratio, "1")
    first = next(iter(done.values()))
    length = f"{len(first[0].radius)} epochs, mean of {len(first)} training{'s' if len(first) > 1 else ''} each"
    results.table(
        "digits",
        f"Test accuracy in percent when stopped after 1 ... {STOPS[-1]} evaluations; {length}",
        ("loss", "library", *(str(stop) for stop in STOPS), "spectral radius"),
        rows,
        f"One residual block of {CHANNELS} channels of 8x8. {_conditions()} One test image is 0.2 points."
        " Trainings that start alike drift apart, most at early stops; the summary has the extremes. torchdeq's"
        " Anderson needs at least three evaluations, so at stops 1 and 2 it is replaced by plain iteration, which"
        " equals Anderson's first two evaluations. Spectral radius: mean over 64 test images, by pydeq.spectral_radius"
        " for every library.",
    )
    results.table(
        "digits",
        f"A training step, batch {BATCH}",
        ("loss", "library", "ms", "evaluations forward"),
        speed,
        "Medians over alternating steps. Evaluations of the cell in the forward solve include the one that attaches"
        " the graph.",
    )


def _conditions() -> str:
    return (
        f"Anderson with memory 6 everywhere, forward to rtol {SETTINGS.rtol:g} in at most {SETTINGS.max_calls}"
        f" evaluations, backward to {SETTINGS.adjoint_rtol:g} in at most {SETTINGS.adjoint_max_calls}; Adam at"
        f" {RATE:g} with a cosine to 0; penalty of strength {STRENGTH:g} on every step."
    )
