"""The plot of time and memory against the size of a problem."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.contest.standings import time_of
from benchmarks.results import Entry

# tanh(a z + x) of benchmarks/problems/sizes.py, float32, by batch and entries of a sample.
KEY = re.compile(r"sizes\.tanh\.(\d+)x(\d+)\.float32")
TIME = "ms of a solve"
LEAST = 3  # sizes of a batch, so that there is a line

# (batch, library) -> its points, by entries of a sample
Lines = dict[tuple[int, str], list[tuple[int, float]]]


def time_lines(entries: Sequence[Entry]) -> Lines:
    """Milliseconds of the fastest solver of each library."""
    return _lines(entries, lambda entry: 1e3 * time_of(entry))


def memory_lines(entries: Sequence[Entry]) -> Lines:
    """The most memory of a solve at once, in state vectors, of the fastest measured solver of each library."""

    def vectors(entry: Entry) -> float:
        batch, dim = _size(entry) or (1, 1)
        return (entry.peak_bytes or 0) / (4 * batch * dim)

    return _lines([entry for entry in entries if entry.peak_bytes is not None], vectors)


def _size(entry: Entry) -> tuple[int, int] | None:
    match = KEY.fullmatch(entry.problem)
    return (int(match[1]), int(match[2])) if match else None


def _lines(entries: Sequence[Entry], value: Callable[[Entry], float]) -> Lines:
    fastest: dict[tuple[int, str, int], Entry] = {}
    for entry in entries:
        size = _size(entry)
        if size is None or entry.status != "solved" or entry.seconds is None:
            continue
        key = (size[0], entry.library, size[1])
        if key not in fastest or time_of(entry) < time_of(fastest[key]):
            fastest[key] = entry
    lines: Lines = {}
    for (batch, library, dim), entry in sorted(fastest.items()):
        lines.setdefault((batch, library), []).append((dim, value(entry)))
    return {side: points for side, points in lines.items() if len(points) >= LEAST}


def draw(entries: Sequence[Entry], looks: Callable[[Sequence[tuple[str, str]]], dict]) -> Figure | None:
    """A column of panels for each batch: time above, memory below.

    Args:
        looks: Gives each (name, library) the line that it has in the other plots.
    """
    kinds = [(TIME, time_lines(entries)), ("state vectors held", memory_lines(entries))]
    kinds = [(label, lines) for label, lines in kinds if lines]
    batches = sorted({batch for _, lines in kinds for batch, _ in lines})
    if not batches:
        return None
    libraries = list(dict.fromkeys(library for _, lines in kinds for _, library in lines))
    look = looks([(library, library) for library in libraries])
    figure, axes = plt.subplots(
        len(kinds), len(batches), figsize=(4.4 * len(batches), 3.5 * len(kinds)), squeeze=False, sharey="row"
    )
    for row, (label, lines) in zip(axes, kinds, strict=True):
        for panel, batch in zip(row, batches, strict=True):
            for (of, library), points in lines.items():
                if of == batch:
                    sizes, values = zip(*points, strict=True)
                    panel.plot(sizes, values, marker=look[library].marker, markersize=4, **look[library].options)
            panel.set_xscale("log")
            panel.set_title(f"batch {batch}", fontsize=10)
            panel.set_xlabel("entries of a sample")
        if label == TIME:
            row[0].set_yscale("log")
        else:
            row[0].set_ylim(bottom=0)
        row[0].set_ylabel(label)
    order = sorted(libraries, key=lambda name: not look[name].own)
    handles = [
        Line2D([], [], label=name, marker=look[name].marker, markersize=4, **look[name].options) for name in order
    ]
    figure.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, handlelength=3.2)
    figure.suptitle("tanh(a z + x), float32: the fastest solver of each library at each size", fontsize=10)
    figure.tight_layout()
    return figure
