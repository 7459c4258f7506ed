"""A penalty by differences compared with the exact one: bias and scatter of its gradients, and trainings with each."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import pydeq
from benchmarks.problems.convolution import ConvCell
from benchmarks.problems.digits import Classifier, load_digits
from benchmarks.problems.trained import BATCH, CHANNELS, RATE, STRENGTH, trained
from benchmarks.results import number
from benchmarks.suites.base import Context
from benchmarks.timing import Spread, threads

STEPS = (0.01, 0.03, 0.1, 0.3)
DTYPES = ("float64", "float32", "bfloat16")
SAMPLES = 8
STOPS = (1, 2, 3, 4, 6, 8, 12)
KINDS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "vjp": {"mode": "vjp"},
    "difference": {"mode": "difference"},
}
WITHIN = 2.0  # points of accuracy

Activation = Callable[[Tensor], Tensor]


class _Convolutional(ConvCell):
    """The convolutional cell with another activation."""

    def __init__(self, channels: int, activation: Activation) -> None:
        super().__init__(channels)
        self.activation = activation

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        hidden = self.activation(self.norms[0](self.inner(z)))
        branch = self.norms[1](x + self.outer(hidden))
        return self.norms[2](self.activation(z + branch))


class _Attentive(nn.Module):
    """LN(y + FF(y)) with y = LN(x + attention(z)), by torch's own attention."""

    def __init__(self, width: int, activation: Activation) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.first, self.second = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.activation = activation

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the exact penalty needs its second derivative
            y = self.norms[0](x + self.attention(z, z, z, need_weights=False)[0])
        return self.norms[1](y + self.second(self.activation(self.first(y))))


def run(context: Context) -> None:
    context.bar.start(5 * len(DTYPES) + context.profile.differences_seeds * len(KINDS))
    with threads(1):
        _bias(context)
        _trainings(context)


def _cells(context: Context) -> Iterator[tuple[str, str, nn.Module, Tensor]]:
    """Key, title, cell and x."""
    for name, activation in (("gelu", functional.gelu), ("relu", functional.relu)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield (
                f"conv_{name}",
                f"convolution and group norm, {name.upper()}",
                _Convolutional(CHANNELS, activation),
                torch.randn(SAMPLES, CHANNELS, 8, 8),
            )
            yield (
                f"attention_{name}",
                f"attention and layer norm, {name.upper()}",
                _Attentive(32, activation),
                torch.randn(SAMPLES, 8, 32),
            )
    model = trained(context.profile.adjoints_epochs, penalized=True)
    with torch.no_grad():
        x = model.model.inject(model.images[:SAMPLES])
    yield "digits", "the convolution, RELU, trained on digits with penalty", copy.deepcopy(model.cell), x


def _bias(context: Context) -> None:
    """Compare gradients by differences with exact ones, for the same probes and for the mean of all probes."""
    results, rows = context.results, []
    draws = min(24, context.profile.jacobian_draws)
    for key, title, cell, x in _cells(context):
        with torch.no_grad():
            z = pydeq.fixed_point(cell, torch.zeros_like(x), x, rtol=1e-5, max_steps=60).image
        assert isinstance(z, Tensor)
        wide = copy.deepcopy(cell).double()
        _, whole = _gradient(wide, z.double(), x.double(), 0, method="exact", mode="vjp")
        exact = [_gradient(wide, z.double(), x.double(), draw, mode="jvp") for draw in range(draws)]
        scatter = _rms([(g - whole).norm() / whole.norm() for _, g in exact])
        results.figure(f"differences.{key}.exact.scatter", scatter, "1")
        rows.append((title, "float64", "exact", "", "", "", "", number(scatter)))
        for dtype in DTYPES:
            context.bar.show(f"{key}, {dtype}")
            for order in (1, 2):
                for step in STEPS:
                    options = {"mode": "difference", "order": order, "step": step}
                    found = []
                    for draw in range(draws):
                        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                            if dtype == "float64":
                                found.append(_gradient(wide, z.double(), x.double(), draw, **options))
                            else:
                                found.append(_gradient(cell, z, x, draw, **options))
                    values = {
                        "value_bias": sum(p for p, _ in found) / sum(p for p, _ in exact) - 1.0,
                        "draw": statistics.median(
                            float((d - g).norm() / g.norm()) for (_, d), (_, g) in zip(found, exact, strict=True)
                        ),
                        "mean": float((_mean(found) - _mean(exact)).norm() / _mean(exact).norm()),
                        "cosine": float(torch.cosine_similarity(_mean(found), _mean(exact), 0)),
                        "scatter": _rms([(d - whole).norm() / whole.norm() for _, d in found]),
                    }
                    for what, value in values.items():
                        results.figure(f"differences.{key}.{dtype}.order{order}.step{step:g}.{what}", value, "1")
                    kind = f"{'forward' if order == 1 else 'central'}, {step:g}"
                    rows.append((title, dtype, kind, *(number(value) for value in values.values())))
            context.bar.advance()
    results.table(
        "differences",
        "The gradient of a penalty by differences compared with the exact one",
        ("cell", "dtype", "order, step", "bias of the value", "one draw", "mean", "cosine of means", "scatter"),
        rows,
        f"{draws} draws of one Gaussian probe for {SAMPLES} samples, at the equilibrium. Columns are relative distances"
        " from exact float64 gradients: of the same probes (one draw: the median over draws; mean: the mean of all"
        " draws), or of the exact norm (scatter: root mean square). bfloat16: autocast. Step: in units of the root mean"
        " square of the state.",
    )


def _gradient(cell: nn.Module, z: Tensor, x: Tensor, seed: int, **options: Any) -> tuple[float, Tensor]:
    """A penalty and its gradient by all parameters, in float64."""
    generator = torch.Generator().manual_seed(seed)
    penalty = pydeq.jacobian_penalty(cell, z, x, generator=generator, **options)
    found = torch.autograd.grad(penalty, list(cell.parameters()), allow_unused=True, materialize_grads=True)
    return penalty.item(), torch.cat([g.double().flatten() for g in found])


def _mean(found: list[tuple[float, Tensor]]) -> Tensor:
    return torch.stack([gradient for _, gradient in found]).mean(0)


def _rms(values: list[Tensor]) -> float:
    return statistics.fmean(float(value) ** 2 for value in values) ** 0.5


def _trainings(context: Context) -> None:
    """The classifier of digits, from the same weights on the same batches."""
    results, seeds, rows, means = context.results, context.profile.differences_seeds, [], {}
    for kind, options in KINDS.items() if seeds else ():
        accuracy = []
        for seed in range(seeds):
            context.bar.show(f"training {seed + 1}, {kind}")
            accuracy.append(_train(context.profile.digits_epochs, seed, options))
            context.bar.advance()
        by_stop = list(zip(*accuracy, strict=True))
        for stop, values in zip(STOPS, by_stop, strict=True):
            found = Spread(statistics.fmean(values), min(values), max(values), seeds)
            results.figure(f"differences.digits.{kind}.accuracy.nfe{stop}", found, "1")
        means[kind] = 100.0 * statistics.fmean(value for values in by_stop for value in values)
        rows.append((kind, *(f"{100 * statistics.fmean(v):.1f}" for v in by_stop), f"{means[kind]:.1f}"))
    results.target(
        "differences.digits",
        f"Digits at hard stops, penalized by differences: points of accuracy above those of a penalty by vjp,"
        f" mean over {len(STOPS)} stops and all trainings",
        ">=",
        -WITHIN,
        means["difference"] - means["vjp"] if seeds else None,
        "points",
    )
    if not seeds:
        return
    results.table(
        "differences",
        f"Test accuracy in percent when stopped; {context.profile.digits_epochs} epochs, mean of {seeds} trainings",
        ("penalty", *(str(stop) for stop in STOPS), "mean"),
        rows,
        "One residual block of 16 channels. Trainings that start alike drift apart, most at early stops.",
    )


def _train(epochs: int, seed: int, options: dict[str, Any] | None) -> list[float]:
    """Accuracy at each stop."""
    digits = load_digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(CHANNELS)
        solver = pydeq.Anderson(memory=6)
        adjoint = pydeq.Implicit(solver=solver, rtol=1e-3, max_steps=15)
        deq = pydeq.DEQ(model.cell, solver=solver, adjoint=adjoint, rtol=1e-3, max_steps=20)
        penalty = None if options is None else pydeq.JacobianPenalty(STRENGTH, **options)
        terms: list[Tensor] = []

        def solve(z0: Tensor, x: Tensor) -> Tensor:
            z, solution = deq(z0, x, return_solution=True, penalty=penalty)
            terms[:] = [] if penalty is None else [solution.penalty]
            return z

        optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
        steps = epochs * (len(digits.images) // BATCH)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for epoch in range(epochs):
            for images, labels in digits.batches(BATCH, epoch, seed):
                logits, _, _ = model(images, solve)
                loss = functional.cross_entropy(logits, labels) + sum(terms)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
        accuracy = []
        with torch.no_grad():
            for stop in STOPS:
                logits, _, _ = model(digits.test_images, lambda z0, x, stop=stop: deq(z0, x, max_steps=stop))
                accuracy.append((logits.argmax(1) == digits.test_labels).float().mean().item())
    return accuracy
