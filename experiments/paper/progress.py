"""How far the trainings of a grid are: bars on a terminal where there is ``rich``, lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from experiments.paper.worker import Message
from experiments.training.history import EvaluationRow
from experiments.training.progress import describe


class Lines:
    """A line for each evaluation.

    Args:
        stream: Where they go.
        labels: What trainings are called, by their keys.
        done: How many were measured before.
    """

    def __init__(self, stream: TextIO, labels: dict[str, str], done: int = 0) -> None:
        self.stream, self.labels = stream, labels
        self.done, self.total = done, len(labels)
        self.steps: dict[str, int] = {}
        self.metrics: dict[str, str] = {}
        self.began_at: dict[str, float] = {}

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def receive(self, message: Message) -> None:
        """Show what a worker tells."""
        key, content = message.key, message.content
        if message.kind == "began":
            step, self.steps[key], self.metrics[key] = content
            self.began_at[key] = time.monotonic()
            self.say(key, f"training, {self.steps[key]} steps" + (f", going on from step {step}" if step else ""))
        elif message.kind == "evaluated":
            row: EvaluationRow = content[0]
            self.say(key, f"step {row.step}/{self.steps[key]}  {describe(row, self.metrics[key])}")
        elif message.kind == "noticed":
            self.say(key, f"notice: {content[0]}")
        elif message.kind == "failed":
            self.say(key, f"failed: {content[0]}")
        elif message.kind == "done":
            self.done += 1
            self.say(key, f"measured, {time.monotonic() - self.began_at.get(key, time.monotonic()):.0f} s")

    def say(self, key: str, text: str) -> None:
        """One line about a training."""
        print(f"[{self.done}/{self.total}] {self.labels.get(key, key)}: {text}", file=self.stream, flush=True)


class Bars(Lines):
    """A bar for each training that runs, below the lines.

    Args:
        stream: A terminal.
        labels, done: As above.
    """

    def __init__(self, stream: TextIO, labels: dict[str, str], done: int = 0) -> None:
        super().__init__(stream, labels, done)
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=Console(file=stream), transient=True,
        )  # fmt: skip
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> Bars:
        self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()

    def receive(self, message: Message) -> None:
        super().receive(message)
        key = message.key
        if message.kind == "began":
            step, steps, _ = message.content
            self.tasks[key] = self.bars.add_task(self.labels.get(key, key), total=steps, completed=step)
        elif message.kind == "advanced":
            self.bars.update(self.tasks[key], completed=message.content[0])
        elif message.kind == "testing":
            self.bars.update(self.tasks[key], description=f"{self.labels.get(key, key)}, testing")
        elif message.kind in ("done", "failed") and key in self.tasks:
            self.bars.remove_task(self.tasks.pop(key))

    def say(self, key: str, text: str) -> None:
        line = f"[{self.done}/{self.total}] {self.labels.get(key, key)}: {text}"
        self.bars.console.print(line, markup=False, highlight=False)


def progress(labels: dict[str, str], done: int, stream: TextIO | None = None) -> Lines:
    """The display that suits a stream, standard output by default."""
    chosen = sys.stdout if stream is None else stream
    if chosen.isatty():
        try:
            return Bars(chosen, labels, done)
        except ModuleNotFoundError:
            pass
    return Lines(chosen, labels, done)
