"""A summary of the benchmark suite as a section of a document."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from benchmarks.profiles import BEYOND_CACHE
from benchmarks.report.tables import limit_text, measured_text
from benchmarks.results import Target, number
from benchmarks.suites.models import CASES as MODELS

SOLVERS = {"picard": "Picard", "anderson": "Anderson, memory 6", "broyden": "Broyden, 30 steps"}
PROBLEMS = (
    ("tanh.d128.rho0.95", "tanh(Wz + x), D 128, spectral radius 0.95", "1e-05"),
    ("tanh.d1024.rho0.95", "the same, D 1024", "1e-05"),
    ("conv", "convolutional cell", "1e-05"),
    ("symmetric", "symmetric linear map, D 50, 0.95", "1e-06"),
    ("tanh.unstable", "tanh(Wz + x), D 128, 1.5 (Anderson: memory 10)", "1e-06"),
)
CELLS = {
    "conv": "convolutional, (16, 32x16x16)",
    "transformer": "transformer, (8, 64x128)",
    "dense": "tanh(Wz + x), (32, 256)",
}
STOPS = (1, 2, 3, 4, 6, 8, 12)


class _Summary:
    """The figures of one summary.json."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.facts = facts
        self.figures: dict[str, dict[str, Any]] = {figure["name"]: figure for figure in facts["figures"]}

    def text(self, name: str, scale: float = 1.0) -> str:
        return number(self.figures[name]["value"] * scale)

    def ratio(self, name: str) -> str:
        """A ratio with its quartiles."""
        figure = self.figures[name]
        value, low, high = (f"{figure[key]:.1f}" for key in ("value", "low", "high"))
        return f"{value}x ({low} to {high})"


def section(facts: Mapping[str, Any], link: str) -> Iterator[str]:
    """The lines of a section.

    Args:
        facts: The content of a summary.json.
        link: Where it is.

    Raises:
        KeyError: If it lacks a figure.
    """
    found = _Summary(facts)
    peer = next(name for name in facts["peers"] if name != "pydeq")
    versions, kernels = facts["versions"], facts["kernels"]["instruction_set"]
    yield from _paragraph(
        f"`python -m benchmarks --profile {facts['profile']}` on {facts['cpu']}, {facts['cores']} virtual cores that"
        f" others share, kernels for {kernels}, torch {versions['torch']}, float32, {facts['date'][:10]}: pydeq beside"
        f" {peer} {versions[peer]} in one process and in turns. Medians, in brackets the quartiles of the ratio;"
        f" [every figure]({link})."
    )
    yield from _paragraph(
        "Overhead per iteration: (time of the solve - time inside f) / calls of f, 30 iterations, nobody stops early."
    )
    yield from _overhead(found, peer)
    yield from _paragraph(
        "Evaluations of f until the slowest of 32 samples is done, mean over maps; counts at the cap of 400 enter as"
        " 400:"
    )
    yield from _evaluations(found, peer)
    yield from _paragraph(
        "A training step, one thread: forward, backward and, with penalty, one Gaussian probe; same caps, same"
        " tolerances:"
    )
    yield from _training(found, peer)
    yield from _paragraph(
        "Reference models with new weights, one thread, the solvers, caps and tolerances of their configurations on"
        " both sides:"
    )
    yield from _models(found, peer)
    yield from _paragraph(
        "A convolutional DEQ trained on scikit-learn's digits (settings chosen on this data), test accuracy at a hard"
        " stop. Few seeds: at low stops single trainings differ by tens of points."
    )
    yield from _digits(found, peer)
    for text in _rest(found, peer).splitlines():
        yield from _paragraph(text)
    yield from _targets(found)
    yield ""


def _paragraph(text: str) -> Iterator[str]:
    yield ""
    yield from textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)
    yield ""


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _head(*cells: str) -> Iterator[str]:
    yield _row(*cells)
    yield f"|{'---|' * len(cells)}"


def _overhead(found: _Summary, peer: str) -> Iterator[str]:
    counts = found.facts["threads"]
    columns = (f"{count} thread{'s' * (count > 1)}: pydeq, {peer}, ratio" for count in counts)
    yield from _head("solver", "(batch, state)", *columns)
    for solver, title in SOLVERS.items():
        cases = (re.fullmatch(rf"overhead\.{solver}\.(\d+)x(\d+)\.t{counts[0]}\.pydeq", name) for name in found.figures)
        for case in filter(None, cases):
            cells = []
            for count in counts:
                name = f"overhead.{solver}.{case[1]}x{case[2]}.t{count}"
                ours, theirs = found.text(f"{name}.pydeq"), found.text(f"{name}.{peer}")
                cells.append(f"{ours}, {theirs} ms, {found.ratio(f'{name}.{peer}_over_pydeq')}")
            yield _row(title, f"({case[1]}, {case[2]})", *cells)


def _evaluations(found: _Summary, peer: str) -> Iterator[str]:
    yield from _head("problem", "rtol", f"Anderson: pydeq, {peer}", f"Broyden: pydeq, {peer}", "Picard")
    for key, title, rtol in PROBLEMS:

        def calls(solver: str, side: str, case: str = f"nfe.{key}.rtol{rtol}") -> str:
            return f"{found.figures[f'{case}.{solver}.{side}']['value']:.1f}"

        pairs = (f"{calls(solver, 'pydeq')}, {calls(solver, peer)}" for solver in ("anderson", "broyden"))
        yield _row(title, rtol.replace("e-0", "e-"), *pairs, calls("picard", "pydeq"))


def _training(found: _Summary, peer: str) -> Iterator[str]:
    yield from _head(
        "cell",
        "loss",
        f"ms: pydeq, {peer}, ratio",
        f"evaluations + products: pydeq, {peer}",
        f"peak MiB: pydeq, {peer}",
    )
    for cell, title in CELLS.items():
        for kind, label in (("plain", "without penalty"), ("penalty", "with penalty")):
            name = f"training.{cell}.{kind}"

            def pair(figure: str, scale: float = 1.0, name: str = name) -> str:
                return f"{found.text(f'{name}.pydeq.{figure}', scale)}, {found.text(f'{name}.{peer}.{figure}', scale)}"

            work = ", ".join(
                f"{found.text(f'{name}.{side}.evaluations')} + {found.text(f'{name}.{side}.products')}"
                for side in ("pydeq", peer)
            )
            ratio = found.ratio(f"{name}.step.{peer}_over_pydeq")
            yield _row(title, label, f"{pair('step', 1e3)}, {ratio}", work, pair("memory"))


def _models(found: _Summary, peer: str) -> Iterator[str]:
    yield from _head(
        "model", "what", f"ms: pydeq, {peer}, ratio", f"evaluations: pydeq, {peer}", f"peak MiB: pydeq, {peer}"
    )
    for case in MODELS:
        for kind, label in (("train", "training step"), ("inference", "inference")):
            name = f"models.{case.key}.{kind}"
            time, evaluations, memory = (
                f"{found.text(f'{name}.pydeq.{figure}')}, {found.text(f'{name}.{peer}.{figure}')}"
                for figure in ("time", "evaluations", "memory")
            )
            yield _row(case.title, label, f"{time}, {found.ratio(f'{name}.{peer}_over_pydeq')}", evaluations, memory)


def _digits(found: _Summary, peer: str) -> Iterator[str]:
    yield from _head("evaluations", *map(str, STOPS), "spectral radius", "ms per step")
    for side in ("pydeq", peer):
        for kind, label in (("plain", ""), ("penalty", ", with penalty")):
            name = f"digits.{kind}.{side}"
            shares = (f"{100 * found.figures[f'{name}.accuracy.nfe{stop}']['value']:.1f}%" for stop in STOPS)
            radius, step = found.text(f"{name}.spectral_radius"), found.text(f"{name}.step", 1e3)
            yield _row(f"{side}{label}", *shares, radius, step)


def _rest(found: _Summary, peer: str) -> str:
    def pair(case: str) -> str:
        return f"{found.text(f'memory.{case}.pydeq')} ({peer} {found.text(f'memory.{case}.{peer}')})"

    def shares(batch: int, dim: int) -> str:
        steps = ("picard", "anderson", "broyden")
        name = f"kernels.{{}}_step.{batch}x{dim}.t{found.facts['threads'][0]}.kernel.copy_share"
        return ", ".join(f"{found.figures[name.format(step)]['value']:.2f}" for step in steps)

    return (
        "At the larger shapes memory is the limit: one thread's steps of Picard, Anderson and Broyden move their bytes"
        f" at {shares(8, 65536)} times the speed of a copy at (8, 65536), and at {shares(*BEYOND_CACHE)} times beyond"
        f" the caches, at {BEYOND_CACHE}.\n"
        f"Peak memory of a solve, in state vectors: Anderson of memory 6 {pair('anderson.memory6')}, Broyden after 30"
        f" steps {pair('broyden.steps30')}. `import pydeq` adds {found.text('import.pydeq')} s to `import torch`."
    )


def _targets(found: _Summary) -> Iterator[str]:
    targets = [
        Target(**{field.name: entry[field.name] for field in fields(Target)}) for entry in found.facts["targets"]
    ]
    missed = [target for target in targets if not target.met]
    if not missed:
        yield f"All of the suite's {len(targets)} targets were met in this run."
        return
    yield f"Of the suite's {len(targets)} targets {len(targets) - len(missed)} were met in this run. Missed:"
    yield ""
    for target in missed:
        yield f"- {target.statement}: {measured_text(target)} (wanted {limit_text(target)})"
