"""One page with everything: it holds its images and its style, and needs no network."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.report.tables import VERDICTS, is_number, limit_text, measured_text
from benchmarks.results import Results, Table

# suite -> heading, what it measures, plots
SECTIONS: dict[str, tuple[str, str, tuple[tuple[str, str], ...]]] = {
    "overhead": (
        "Overhead per iteration",
        "What a solver costs beside f: the time of a solve without the time spent inside f, over the calls of f. Every"
        " sample runs every iteration. f is tanh(a z + x) entry by entry.",
        (("overhead", "Overhead per iteration of each solver, state size, library and thread count"),),
    ),
    "kernels": (
        "Kernels",
        "One step of each solver alone: the compiled kernel, its reference in plain torch, and the copy that says what"
        " the memory system gives.",
        (("kernels", "Bandwidth of each kernel and of a copy, for each state size"),),
    ),
    "nfe": (
        "Evaluations to a tolerance",
        "How often f is called until every sample of the batch meets ||f(z) - z|| ≤ rtol ||f(z)||, counted by f"
        " itself.",
        (("residual", "Relative residual against evaluations of f for each solver and library"),),
    ),
    "memory": ("Memory", "The most that a solve holds at any moment, in vectors as large as the state.", ()),
    "import": ("Import", "What importing the library adds to importing torch.", ()),
    "digits": (
        "Training on digits",
        "A convolutional equilibrium model on scikit-learn's digits, trained by each library from the same weights on"
        " the same batches, with and without the Jacobian penalty (Bai, Koltun and Kolter, ICML 2021). At a hard stop"
        " the model must answer after so many evaluations of its cell.",
        (("accuracy", "Test accuracy against evaluations allowed, and spectral radius against epoch"),),
    ),
    "compat": (
        "Moving over",
        "The same user code with torchdeq and with pydeq.compat.torchdeq, its replacement.",
        (),
    ),
    "training": (
        "A training step",
        "Forward, backward and the Jacobian penalty around the same cell, to the same caps and tolerances: two cells in"
        " which f dominates, and one in which it does not.",
        (),
    ),
    "jacobian": (
        "The Jacobian penalty",
        "What several probes cost, and how far estimates of the squared Frobenius norm of the Jacobian are from its"
        " exact value.",
        (),
    ),
    "differences": (
        "Penalties by differences",
        "How far the gradient of a penalty by differences is from the exact one, and what trainings with it reach.",
        (),
    ),
    "adjoints": (
        "Adjoints",
        "Products with the Jacobian that backward solvers need on trained cells, and what approximate gradients save"
        " and miss.",
        (),
    ),
    "models": (
        "Reference models",
        "A training step and inference of whole models, as they are and with their solves done by another library, with"
        " the caps and tolerances of their configurations.",
        (),
    ),
}

STYLE = """
:root { --ink: #1c1e21; --soft: #5c636b; --line: #d9dde2; --shade: #f5f7f9; --met: #0a7d4f; --missed: #b3261e; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 1260px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .4rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p { max-width: 52rem; }
.soft, .note { color: var(--soft); }
.note { font-size: .87rem; max-width: 60rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .6rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { background: var(--shade); font-weight: 600; }
.number { text-align: right; }
tr.group td { border-top: 2px solid #aab2bb; }
.met { color: var(--met); font-weight: 600; }
.not-met { color: var(--missed); font-weight: 600; }
.not-measured { color: var(--soft); }
img { max-width: 100%; height: auto; margin: .8rem 0; }
dl { display: grid; grid-template-columns: max-content auto; gap: .15rem 1.2rem; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; }
nav a { margin-right: 1rem; }
"""


def write(results: Results, plots: Mapping[str, Path], path: Path) -> None:
    """Write the page to ``path``."""
    suites = list(dict.fromkeys(table.suite for table in results.tables))
    title = f"{results.facts['peers'][0]} benchmarks"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p class='soft'>Profile {escape(results.facts['profile'])}, {escape(results.facts['date'])}.</p>",
        "<nav>" + "".join(f"<a href='#{suite}'>{escape(SECTIONS[suite][0])}</a>" for suite in suites) + "</nav>",
        *(f"<p class='not-met'>{escape(notice)}</p>" for notice in results.notices),
    ]
    if results.targets:
        parts.append(_targets(results))
    for suite in suites:
        parts.append(_section(suite, [table for table in results.tables if table.suite == suite], plots))
    parts.append(_facts(results))
    path.write_text(
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n",
        encoding="utf-8",
    )


def _targets(results: Results) -> str:
    met = [target.met for target in results.targets]
    rows = []
    for target in results.targets:
        verdict = VERDICTS[target.met]
        rows.append(
            f"<tr><td>{escape(target.statement)}</td><td class='number'>{escape(limit_text(target))}</td>"
            f"<td class='number'>{escape(measured_text(target))}</td>"
            f"<td class='{verdict.replace(' ', '-')}'>{verdict}</td></tr>"
        )
    return (
        f"<h2>Targets</h2><p>{met.count(True)} met, {met.count(False)} not met, {met.count(None)} not measured.</p>"
        "<div class='scroll'><table><tr><th>what</th><th class='number'>target</th><th class='number'>measured</th>"
        f"<th></th></tr>{''.join(rows)}</table></div>"
    )


def _section(suite: str, tables: list[Table], plots: Mapping[str, Path]) -> str:
    heading, text, images = SECTIONS[suite]
    parts = [f"<h2 id='{suite}'>{escape(heading)}</h2>", f"<p>{escape(text)}</p>"]
    for name, description in images:
        if name in plots:
            data = base64.b64encode(plots[name].read_bytes()).decode()
            parts.append(f"<img src='data:image/png;base64,{data}' alt='{escape(description)}'>")
    return "\n".join(parts + [_table(table) for table in tables])


def _table(table: Table) -> str:
    def cell(tag: str, text: str, of_number: bool) -> str:
        return f"<{tag}{' class=number' if of_number else ''}>{escape(text)}</{tag}>"

    columns = zip(*table.rows, strict=True)
    numbers = [all(is_number(text) for text in column) for column in columns]
    head = "".join(cell("th", text, right) for text, right in zip(table.columns, numbers, strict=True))
    rows = []
    for begins, row in table.display():
        cells = "".join(cell("td", text, right) for text, right in zip(row, numbers, strict=True))
        rows.append(f"<tr{' class=group' if begins else ''}>{cells}</tr>")
    note = f"<p class='note'>{escape(table.note)}</p>" if table.note else ""
    return (
        f"<h3>{escape(table.title)}</h3><div class='scroll'><table><tr>{head}</tr>{''.join(rows)}</table></div>{note}"
    )


def _facts(results: Results) -> str:
    facts = results.facts
    kernels = facts["kernels"]
    rows: dict[str, Any] = {
        "CPU": f"{facts['cpu']}, {facts['cores']} cores",
        "caches": ", ".join(f"{level} {size}" for level, size in facts["caches"].items()) or None,
        "memory": f"{facts['memory_gib']} GiB" if facts["memory_gib"] else None,
        "threads": ", ".join(map(str, facts["threads"])) + "; one where a table does not say",
        "load at the start": facts["load_at_start"],
        "platform": facts["platform"],
        **facts["versions"],
        "kernels": kernels["instruction_set"] if kernels["cpu"] else f"none, references run: {kernels['cpu_reason']}",
        "commit": (facts["commit"] or "unknown") + (", with changes" if facts["uncommitted_changes"] else ""),
        "seconds": ", ".join(f"{suite} {seconds:.0f}" for suite, seconds in results.seconds.items()),
    }
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in rows.items() if value is not None
    )
    return f"<h2>Measured on</h2><dl>{items}</dl>"
