"""One page with everything: it holds its images and its style, and needs no network.

python -m benchmarks.report.page benchmarks/out/summary.json     # writes report.html next to it, and the plots
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.contest.standings import by_problem
from benchmarks.report import contest, plots
from benchmarks.report.rendering import render
from benchmarks.results import Results, Target


@dataclass(frozen=True)
class Section:
    """The page's text about one suite.

    Args:
        heading: Its title.
        text: What the suite measures.
        plots: For each of its plots a description.
    """

    heading: str
    text: str
    plots: Mapping[str, str] = field(default_factory=dict)


# The picture at the top of the page is the first one of these that the run has drawn.
MAIN = {
    "profile": "Performance profiles: for each library with the best of its solvers on each problem, the share of"
    " problems solved at no more than a multiple of the best library's cost",
    "overhead": "Overhead per iteration of each solver, state size, library and thread count",
}

SECTIONS = {
    "contest": Section(
        "All solvers on all problems",
        "Every solver gets the same map, start and tolerance. A problem counts as solved if the returned value meets"
        " the tolerance, evaluated by the suite in float64. A library whose own test is looser may tighten it. Times"
        " are medians of alternating solves; compilation is not in them.",
        {
            "solvers": "Performance profiles of every solver",
            "precision": "Relative residual against work for each solver",
            "growth": "Time and memory as the state grows, for the fastest solver of each library",
        },
    ),
    "overhead": Section(
        "Overhead per iteration",
        "The cost of a solver without f: the time of a solve minus the time spent inside f, over the calls of f. Every"
        " sample runs every iteration. f is tanh(a z + x) entry by entry.",
        {"overhead": "Overhead per iteration of each solver, state size, library and thread count"},
    ),
    "kernels": Section(
        "Kernels",
        "A single step of each solver: the compiled kernel, its reference in plain torch, and a copy, which shows what"
        " the memory system can do.",
        {"kernels": "Bandwidth of each kernel and of a copy, for each state size"},
    ),
    "nfe": Section(
        "Evaluations to a tolerance",
        "How often f is called until every sample of the batch meets ||f(z) - z|| ≤ rtol ||f(z)||, counted by f"
        " itself.",
        {"residual": "Relative residual against evaluations of f for each solver and library"},
    ),
    "memory": Section(
        "Memory", "The most memory that a solve holds at any moment, in vectors of the size of the state."
    ),
    "import": Section("Import", "The time that importing the library adds to importing torch."),
    "digits": Section(
        "Training on digits",
        "A convolutional equilibrium model on scikit-learn's digits, trained by each library from the same weights on"
        " the same batches, with and without the Jacobian penalty (Bai, Koltun and Kolter, ICML 2021). At a hard stop"
        " the model must answer after a fixed number of evaluations of its cell.",
        {"accuracy": "Test accuracy against evaluations allowed, and spectral radius against epoch"},
    ),
    "compat": Section(
        "Moving over",
        "The same user code with torchdeq and with pydeq.compat.torchdeq, its replacement.",
    ),
    "training": Section(
        "A training step",
        "Forward, backward and the Jacobian penalty around the same cell, to the same caps and tolerances: two cells in"
        " which f takes most of the time, and one in which it does not.",
    ),
    "jacobian": Section(
        "The Jacobian penalty",
        "The cost of several probes, and how far estimates of the squared Frobenius norm of the Jacobian are from its"
        " exact value.",
    ),
    "differences": Section(
        "Penalties by differences",
        "How far the gradient of a penalty by differences is from the exact one, and what trainings with it reach.",
    ),
    "adjoints": Section(
        "Adjoints",
        "Products with the Jacobian that backward solvers need on trained cells, and what approximate gradients save"
        " and miss.",
    ),
    "models": Section(
        "Reference models",
        "A training step and inference of whole models, with pydeq and with another library's solver, with the caps and"
        " tolerances of their configurations.",
    ),
}


def write(results: Results, drawn: Mapping[str, Path], path: Path) -> None:
    """Write the page to ``path``.

    Args:
        drawn: For each plot its PNG, next to which lies the SVG.
    """
    suites = dict.fromkeys(table.suite for table in results.tables)
    if results.entries:
        suites = {"contest": None, **suites}
    images = {name: base64.b64encode(plot.with_suffix(".svg").read_bytes()).decode() for name, plot in drawn.items()}
    page = render(
        "page.html",
        facts=results.facts,
        notices=results.notices,
        summary=contest.sentence(results),
        targets=sorted(results.targets, key=_missed_first),
        sections={suite: SECTIONS.get(suite, Section(suite.capitalize(), "")) for suite in suites},
        tables={suite: [table for table in results.tables if table.suite == suite] for suite in suites},
        images=images,
        main=next((name for name in MAIN if name in images), None),
        descriptions=MAIN,
        contest=_contest(results) if results.entries else None,
        machine=_machine(results),
    )
    path.write_text(page, encoding="utf-8")


def _missed_first(target: Target) -> int:
    return (False, None, True).index(target.met)


def _contest(results: Results) -> dict[str, Any]:
    """What the page shows of the contest."""
    entries = results.entries
    contenders = {entry.contender: entry for entry in entries}
    return {
        "families": list(dict.fromkeys(entry.family for entry in entries)),
        "by_family": contest.by_family(entries),
        "contenders": contenders,
        "problems": {problem: {row.contender: row for row in rows} for problem, rows in by_problem(entries).items()},
        "marks": contest.MARKS,
        "ranks": {status: rank for rank, status in enumerate(contest.MARKS)},
    }


def _machine(results: Results) -> dict[str, Any]:
    """The machine and the versions of a run."""
    facts = results.facts
    kernels = facts["kernels"]
    return {
        "GPU": facts.get("gpu"),
        "CPU": f"{facts['cpu']}, {facts['cores']} cores",
        "caches": ", ".join(f"{level} {size}" for level, size in facts["caches"].items()) or None,
        "memory": f"{facts['memory_gib']} GiB" if facts["memory_gib"] else None,
        "threads": ", ".join(map(str, facts["threads"])) + "; one if a table does not say",
        "load at the start": facts["load_at_start"],
        "platform": facts["platform"],
        **facts["versions"],
        "kernels": kernels["instruction_set"] if kernels["cpu"] else f"none, references run: {kernels['cpu_reason']}",
        "commit": (facts["commit"] or "unknown") + (", with changes" if facts["uncommitted_changes"] else ""),
        "seconds": ", ".join(f"{suite} {seconds:.0f}" for suite, seconds in results.seconds.items()),
    }


def main(arguments: list[str]) -> int:
    """Draw the plots and write the page of a summary again; returns the exit status."""
    if len(arguments) != 1:
        print("usage: python -m benchmarks.report.page SUMMARY.json", file=sys.stderr)
        return 2
    path = Path(arguments[0])
    results = Results.from_json(json.loads(path.read_text(encoding="utf-8")))
    write(results, plots.draw(results, path.parent), path.with_name("report.html"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
