"""Where rows go: tables as CSV files."""

from __future__ import annotations

from pathlib import Path

from pydeq.training.history import Evaluation, EvaluationRow, StepRow


class Log:
    """Told of every row."""

    def __init__(self, out: Path | None) -> None:
        self.out = out

    def stepped(self, row: StepRow) -> None:
        """A row of means over training steps."""

    def evaluated(self, row: EvaluationRow) -> None:
        """An evaluation on validation data."""

    def tested(self, found: Evaluation) -> None:
        """The evaluation on test data, in the end."""
