"""Figures of residuals, by matplotlib, which is imported only here."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def figure(size: tuple[float, float] = (7.0, 4.5)) -> Any:
    """A new figure that belongs to no window.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a plot needs matplotlib: pip install matplotlib") from None
    return Figure(size, layout="constrained")


def draw_residuals(axes: Any, curves: Mapping[str, Tensor], rtol: float | None = None) -> None:
    """Draw relative residuals against evaluations.

    Args:
        curves: By name, residuals [evaluations, batch], NaN after a sample stopped; one color each.
        rtol: A tolerance to mark.
    """
    for number, (name, rows) in enumerate(curves.items()):
        columns = rows.detach().double().cpu().T
        for i, column in enumerate(columns):
            kept = column.isfinite() & (column > 0)
            steps = kept.nonzero()[:, 0] + 1
            label = name if i == 0 else None
            axes.plot(steps.tolist(), column[kept].tolist(), color=f"C{number % 10}", alpha=0.7, lw=1.2, label=label)
    if rtol:
        axes.axhline(rtol, color="black", lw=0.8, ls="--", label=f"rtol {rtol:g}")
    axes.set_yscale("log")
    axes.set_xlabel("evaluations of f")
    axes.set_ylabel("relative residual of each sample")
    if any(curves):
        axes.legend(fontsize="small")


def save(made: Any, path: str | os.PathLike[str] | None) -> None:
    """Write a figure to a file, if there is a path; the suffix decides the format."""
    if path is not None:
        made.savefig(path, dpi=150)


def draw_eigenvalues(axes: Any, values: Tensor) -> None:
    """Draw complex eigenvalues, and the unit circle, inside of which plain iteration contracts."""
    points = values.detach().flatten().cpu()
    points = points[points.real.isfinite()]
    axes.scatter(points.real.tolist(), points.imag.tolist(), s=12, color="C0", label="largest eigenvalues")
    circle = [2.0 * math.pi * i / 200 for i in range(201)]
    axes.plot([math.cos(t) for t in circle], [math.sin(t) for t in circle], color="black", lw=0.8, label="|λ| = 1")
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel("real part")
    axes.set_ylabel("imaginary part")
    axes.legend(fontsize="small")
