"""Progress of the trainings of a grid: on a terminal a bar for each running one, elsewhere only lines."""

from __future__ import annotations

import time
from typing import Any, TextIO

from experiments.paper.worker import Message
from experiments.training.history import EvaluationRow
from experiments.training.progress import bars, describe


class GridProgress:
    """Shows the messages of a grid's workers; a context manager.

    Args:
        labels: Labels of the trainings, by their keys.
        done: Number of trainings that are measured already.
        stream: Where to show them; standard output by default.
    """

    def __init__(self, labels: dict[str, str], done: int = 0, stream: TextIO | None = None) -> None:
        self.bars, self.labels, self.done = bars(stream), labels, done
        self.tasks: dict[str, Any] = {}
        self.steps: dict[str, int] = {}
        self.metrics: dict[str, str] = {}
        self.began_at: dict[str, float] = {}

    def __enter__(self) -> GridProgress:
        self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()

    def receive(self, message: Message) -> None:
        """Show a message of a worker."""
        key, content = message.key, message.content
        if message.kind == "began":
            step, steps, self.metrics[key] = content
            self.steps[key], self.began_at[key] = steps, time.monotonic()
            self.tasks[key] = self.bars.add_task("", label=self.labels.get(key, key), total=steps, completed=step)
            self.say(key, f"training, {steps} steps" + (f", going on from step {step}" if step else ""))
        elif message.kind == "advanced":
            self.bars.update(self.tasks[key], completed=content[0])
        elif message.kind == "evaluated":
            row: EvaluationRow = content[0]
            self.say(key, f"step {row.step}/{self.steps[key]}  {describe(row, self.metrics[key])}")
        elif message.kind == "noticed":
            self.say(key, f"notice: {content[0]}")
        elif message.kind == "testing":
            self.bars.update(self.tasks[key], description="testing")
        else:
            if key in self.tasks:
                self.bars.remove_task(self.tasks.pop(key))
            if message.kind == "failed":
                self.say(key, f"failed: {content[0]}")
            else:
                self.done += 1
                self.say(key, f"measured, {time.monotonic() - self.began_at.get(key, time.monotonic()):.0f} s")

    def say(self, key: str, text: str) -> None:
        """Print one line about a training."""
        self.bars.console.print(f"[{self.done}/{len(self.labels)}] {self.labels.get(key, key)}: {text}")
