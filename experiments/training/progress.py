"""Progress of a training: a bar below the lines on a terminal, lines only elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from experiments.training.history import Evaluation, EvaluationRow, History, StepRow, metric_text
from experiments.training.observers import Observer

if TYPE_CHECKING:
    from experiments.training.configuration import TrainingConfig


def bars(stream: TextIO | None = None) -> Progress:
    """Make progress bars that are shown only on terminals; their console prints plain text on any stream.

    The bar, the steps and the time left come first. On a narrow terminal the text after them is cut.
    """
    console = Console(file=stream, markup=False, emoji=False, highlight=False, soft_wrap=True)
    label = Column(no_wrap=True, overflow="ellipsis", max_width=24)
    rest = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    return Progress(
        TextColumn("{task.fields[label]}", table_column=label), BarColumn(bar_width=16), MofNCompleteColumn(),
        TimeRemainingColumn(), TextColumn("{task.description}", table_column=rest), console=console, transient=True,
        disable=not console.is_terminal, expand=True,
    )  # fmt: skip


class ProgressBar(Observer):
    """Shows the progress of a training.

    Args:
        stream: Where to show it; standard output by default.
        out: Folder of the training, to be named at the end.
    """

    def __init__(self, stream: TextIO | None = None, out: Path | None = None) -> None:
        self.bars, self.out = bars(stream), out
        self.task = self.bars.add_task("", label="", visible=False)
        self.steps, self.metric = 0, "metric"

    def began(self, config: TrainingConfig, history: History, step: int, steps: int, metric: str) -> None:
        self.steps, self.metric = steps, metric
        self.say(f"training {type(config.model).__name__.removesuffix('Config')} on {config.data.name}:"
                 f" {steps} steps" + (f", going on from step {step}" if step else ""))  # fmt: skip
        self.bars.update(self.task, total=steps, completed=step, visible=True)
        self.bars.start()

    def advanced(self, step: int) -> None:
        self.bars.update(self.task, completed=step)

    def stepped(self, row: StepRow) -> None:
        if self.bars.disable:
            self.say(f"step {row.step}/{self.steps}  {describe_step(row)}")
        else:
            self.bars.update(self.task, description=describe_step(row))

    def evaluated(self, row: EvaluationRow) -> None:
        self.say(f"step {row.step}/{self.steps}  {describe(row, self.metric)}")

    def noticed(self, text: str) -> None:
        self.say(f"notice: {text}")

    def ended(self, status: str, test: Evaluation | None) -> None:
        self.bars.stop()
        self.say(status if test is None else f"{status}; test: {describe(test, self.metric)}")
        if self.out is not None:
            self.say(f"results are in {self.out}")

    def close(self) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        """Print one line."""
        self.bars.console.print(text)


def describe_step(row: StepRow) -> str:
    """Describe a row of means."""
    shares = [] if row.converged is None else [f"converged {row.converged:.0%}"]
    if row.backward_converged is not None:
        shares.append(f"backward {row.backward_converged:.0%}")
    parts = [f"loss {row.loss:.4f}", *([", ".join(shares)] if shares else []), f"nfe {row.nfe:.1f}"]
    parts.append(f"residual {row.residual:.1e}")
    if row.backward_nfe is not None:
        parts.append(f"backward nfe {row.backward_nfe:.1f}")
    if row.strength:
        parts.append(f"penalty {row.penalty:.4f}")
    parts += [f"lr {row.learning_rate:.2e}", f"epoch {row.epoch}"]
    return "  ".join(parts)


def describe(found: Evaluation, metric: str) -> str:
    """Describe an evaluation."""
    parts = [f"loss {found.loss:.4f}", f"{metric} {metric_text(metric, found.metric)}"]
    if found.converged is not None:
        parts.append(f"converged {found.converged:.0%}")
    parts += [f"nfe {found.nfe:.1f}", f"residual {found.residual:.1e}"]
    if found.radius is not None:
        parts.append(f"spectral radius {found.radius:.3f}")
    if found.stops:
        stops = (f"{k}: {metric_text(metric, v)}" for k, v in found.stops.items())
        parts.append(f"{metric} at a stop of " + ", ".join(stops))
    return "  ".join(parts)
