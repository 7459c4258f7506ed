"""Observers of a training; one of them writes the tables on the disk."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.training.atomic_files import write_whole
from experiments.training.checkpoint import writing
from experiments.training.history import STEP_COLUMNS, Evaluation, EvaluationRow, History, StepRow

if TYPE_CHECKING:
    from experiments.training.configuration import TrainingConfig


class Observer:
    """Base class of observers; its methods do nothing. Only the process of rank 0 calls them."""

    def began(self, config: TrainingConfig, history: History, step: int, steps: int, metric: str) -> None:
        """The training starts, or continues, at ``step`` of ``steps``; ``history`` has the rows so far, and grows."""

    def advanced(self, step: int) -> None:
        """``step`` steps are done."""

    def stepped(self, row: StepRow) -> None:
        """There is a new row of means over training steps."""

    def evaluated(self, row: EvaluationRow) -> None:
        """There is a new evaluation on validation data."""

    def noticed(self, text: str) -> None:
        """There is something that the user should know."""

    def ended(self, status: str, test: Evaluation | None) -> None:
        """The training is over."""

    def close(self) -> None:
        """No more calls will come, perhaps because of an error."""


class CsvTables(Observer):
    """The files ``steps.csv`` and ``evaluations.csv``: each row of the history is written at once.

    Args:
        folder: Folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.columns: list[str] = []

    def began(self, config: TrainingConfig, history: History, step: int, steps: int, metric: str) -> None:
        # A process that was killed may have written rows after its last checkpoint.
        stops = [f"{name}@{stop}" for name in ("metric", "residual") for stop in config.evaluation.stops]
        self.columns = list(EvaluationRow(0.0, 0.0, 0.0, 0.0).flat()) + stops
        lines = [STEP_COLUMNS, *([getattr(row, name) for name in STEP_COLUMNS] for row in history.steps)]
        self._write("steps.csv", lines)
        self._write("evaluations.csv", [self.columns, *(self._line(row) for row in history.evaluations)])

    def stepped(self, row: StepRow) -> None:
        self._append("steps.csv", list(asdict(row).values()))

    def evaluated(self, row: EvaluationRow) -> None:
        self._append("evaluations.csv", self._line(row))

    def _line(self, row: EvaluationRow) -> list[Any]:
        flat = row.flat()
        return [flat.get(name) for name in self.columns]

    def _write(self, name: str, lines: list[list[Any]]) -> None:
        with writing(self.folder / name):
            write_whole(self.folder / name, _text(lines))

    def _append(self, name: str, line: list[Any]) -> None:
        with writing(self.folder / name), (self.folder / name).open("a", encoding="utf-8", newline="") as file:
            file.write(_text([line]))


def _text(lines: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
