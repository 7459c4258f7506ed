"""Plots of a training: loss, evaluations of f, residual and spectral radius over the steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.training.checkpoint import writing
from experiments.training.history import Evaluation, EvaluationRow, History
from experiments.training.observers import Observer
from experiments.training.run_folder import PLOT

if TYPE_CHECKING:
    from experiments.training.configuration import TrainingConfig


class Plot(Observer):
    """Draws ``training.png`` after each evaluation and at the end.

    Args:
        folder: Folder of the training.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """

    def __init__(self, folder: Path) -> None:
        import matplotlib  # noqa: F401

        self.path = folder / PLOT
        self.history, self.metric = History(), "metric"

    def began(self, config: TrainingConfig, history: History, step: int, steps: int, metric: str) -> None:
        self.history, self.metric = history, metric

    def evaluated(self, row: EvaluationRow) -> None:
        self._draw()

    def ended(self, status: str, test: Evaluation | None) -> None:
        self._draw()

    def _draw(self) -> None:
        with writing(self.path):
            plot_history(self.history, self.metric, self.path)


def plot_history(history: History, metric: str, path: Path) -> None:
    """Draw a history into a file, whose suffix gives the format.

    Args:
        history: The history; it may be empty.
        metric: Name of the metric.
        path: The file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(2, 3)
    steps, seen = history.steps, history.evaluations
    x, x_seen = [row.step for row in steps], [row.step for row in seen]

    def draw(panel: Any, title: str, scale: str, curves: dict[str, tuple[list[int], list[Any], str]]) -> None:
        panel.set_title(title)
        positive = False
        for label, (at, values, style) in curves.items():
            points = [(step, value) for step, value in zip(at, values, strict=True) if value is not None]
            if points:
                panel.plot(*zip(*points, strict=True), style, label=label, markersize=3, linewidth=1)
                positive = positive or any(0.0 < value < float("inf") for _, value in points)
        if scale == "log" and positive:
            panel.set_yscale("log")
        if len(panel.lines) > 1:
            panel.legend(fontsize="x-small")
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)

    draw(panels[0, 0], "loss", "log", {
        "training": (x, [row.loss for row in steps], "-"),
        "validation": (x_seen, [row.loss for row in seen], "o-"),
    })  # fmt: skip
    draw(panels[0, 1], "evaluations of f", "linear", {
        "training, forward": (x, [row.nfe for row in steps], "-"),
        "training, backward": (x, [row.backward_nfe for row in steps], "-"),
        "validation": (x_seen, [row.nfe for row in seen], "o-"),
    })  # fmt: skip
    draw(panels[0, 2], "relative residual", "log", {
        "training, forward": (x, [row.residual for row in steps], "-"),
        "training, backward": (x, [row.backward_residual for row in steps], "-"),
        "validation": (x_seen, [row.residual for row in seen], "o-"),
    })  # fmt: skip
    draw(panels[1, 0], "spectral radius on validation data", "linear", {
        "mean": (x_seen, [row.radius for row in seen], "o-"),
        "largest": (x_seen, [row.radius_max for row in seen], "o--"),
    })  # fmt: skip
    stops = list(seen[-1].stops) if seen else []
    draw(panels[1, 1], f"{metric} on validation data", "log" if metric == "perplexity" else "linear", {
        f"at a stop of {stop}": (x_seen, [row.stops.get(stop) for row in seen], "-") for stop in stops
    } | {"at the model's own": (x_seen, [row.metric for row in seen], "o-")})  # fmt: skip
    draw(panels[1, 2], "Jacobian penalty", "linear", {"": (x, [row.penalty for row in steps], "-")})
    figure.savefig(path, dpi=110, metadata={"Software": None} if path.suffix == ".png" else None)
