"""One page with everything: it holds its images and its style, and needs no network."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report.rendering import render
from benchmarks.results import Results


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


SECTIONS = {
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
        " which f dominates, and one in which it does not.",
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


def write(results: Results, plots: Mapping[str, Path], path: Path) -> None:
    """Write the page to ``path``."""
    suites = dict.fromkeys(table.suite for table in results.tables)
    page = render(
        "page.html",
        facts=results.facts,
        notices=results.notices,
        targets=results.targets,
        sections=SECTIONS,
        tables={suite: [table for table in results.tables if table.suite == suite] for suite in suites},
        images={name: base64.b64encode(plot.read_bytes()).decode() for name, plot in plots.items()},
        machine=_machine(results),
    )
    path.write_text(page, encoding="utf-8")


def _machine(results: Results) -> dict[str, Any]:
    """The machine and the versions of a run."""
    facts = results.facts
    kernels = facts["kernels"]
    return {
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
