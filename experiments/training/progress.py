"""Progress on a terminal: a bar where there is a terminal and ``rich``, lines elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TextIO

from experiments.training.history import Evaluation, EvaluationRow, History, StepRow
from experiments.training.observers import Observer

if TYPE_CHECKING:
    from experiments.training.configuration import TrainingConfig


def progress(stream: TextIO | None = None) -> Observer:
    """The observer that suits a stream; standard output by default."""
    stream = sys.stdout if stream is None else stream
    if stream is None:  # a process without one
        return Observer()
    if stream.isatty():
        try:
            import rich.progress  # noqa: F401
        except ModuleNotFoundError:
            pass
        else:
            return Bar(stream)
    return Lines(stream)


class Lines(Observer):
    """A line for each row.

    Args:
        stream: Where they go.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.steps, self.metric = 0, "metric"

    def began(self, config: TrainingConfig, history: History, step: int, steps: int, metric: str) -> None:
        self.steps, self.metric = steps, metric
        self.say(f"training {type(config.model).__name__.removesuffix('Config')} on {config.data.name}:"
                 f" {steps} steps" + (f", going on from step {step}" if step else ""))  # fmt: skip

    def stepped(self, row: StepRow) -> None:
        self.say(f"step {row.step}/{self.steps}  {describe_step(row)}")

    def evaluated(self, row: EvaluationRow) -> None:
        self.say(f"step {row.step}/{self.steps}  {describe(row, self.metric)}")

    def noticed(self, text: str) -> None:
        self.say(f"notice: {text}")

    def ended(self, status: str, test: Evaluation | None) -> None:
        self.say(status if test is None else f"{status}; test: {describe(test, self.metric)}")

    def say(self, text: str) -> None:
        """One line."""
        print(text, file=self.stream, flush=True)


class Bar(Lines):
    """A bar below the lines of evaluations.

    Args:
        stream: A terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"),
            console=Console(file=stream), transient=True,
        )  # fmt: skip
        self.bar_task: Any = None

    def began(self, config: TrainingConfig, history: History, step: int, steps: int, metric: str) -> None:
        super().began(config, history, step, steps, metric)
        self.bar_task = self.bar.add_task("", total=steps, completed=step)
        self.bar.start()

    def advanced(self, step: int) -> None:
        self.bar.update(self.bar_task, completed=step)

    def stepped(self, row: StepRow) -> None:
        self.bar.update(self.bar_task, description=describe_step(row))

    def say(self, text: str) -> None:
        self.bar.console.print(text, markup=False, highlight=False)

    def ended(self, status: str, test: Evaluation | None) -> None:
        self.bar.stop()
        super().ended(status, test)

    def close(self) -> None:
        self.bar.stop()


def describe_step(row: StepRow) -> str:
    """A row of means in words."""
    parts = [f"epoch {row.epoch}", f"loss {row.loss:.4f}", f"nfe {row.nfe:.1f}", f"residual {row.residual:.1e}"]
    if row.backward_nfe is not None:
        parts.append(f"backward nfe {row.backward_nfe:.1f}")
    if row.strength:
        parts.append(f"penalty {row.penalty:.4f}")
    parts.append(f"lr {row.learning_rate:.2e}")
    return "  ".join(parts)


def describe(found: Evaluation, metric: str) -> str:
    """An evaluation in words."""
    say = (lambda value: f"{value:.2%}") if metric == "accuracy" else (lambda value: f"{value:.2f}")
    parts = [f"loss {found.loss:.4f}", f"{metric} {say(found.metric)}", f"nfe {found.nfe:.1f}"]
    parts.append(f"residual {found.residual:.1e}")
    if found.radius is not None:
        parts.append(f"spectral radius {found.radius:.3f}")
    if found.stops:
        parts.append(f"{metric} at a stop of " + ", ".join(f"{k}: {say(v)}" for k, v in found.stops.items()))
    return "  ".join(parts)
