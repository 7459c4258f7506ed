"""TensorBoard logs of a training."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.training.checkpoint import writing
from experiments.training.history import EvaluationRow, History, StepRow
from experiments.training.observers import Observer

if TYPE_CHECKING:
    from experiments.training.configuration import TrainingConfig


class TensorBoard(Observer):
    """Writes the scalars of all rows into the folder ``tensorboard``.

    Args:
        folder: Folder of the training.

    Raises:
        ModuleNotFoundError: If the package ``tensorboard`` is not installed; the message says what to do.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import tensorboard  # noqa: F401
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "logging.tensorboard needs the package tensorboard: pip install tensorboard, or set it to false",
                name="tensorboard",
            ) from error
        self.folder = folder / "tensorboard"
        self.writer: Any = None

    def began(self, config: TrainingConfig, history: History, step: int, steps: int, metric: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Hides the rows that a killed process wrote after its last checkpoint.
        with writing(self.folder):
            self.writer = SummaryWriter(str(self.folder), purge_step=step + 1)

    def stepped(self, row: StepRow) -> None:
        self._write("train", asdict(row), row.step)

    def evaluated(self, row: EvaluationRow) -> None:
        flat = {key: value for key, value in row.flat().items() if not key.startswith("train_")}
        self._write("validation", flat, row.step)
        with writing(self.folder):
            self.writer.flush()

    def _write(self, group: str, values: dict[str, Any], step: int) -> None:
        with writing(self.folder):
            for name, value in values.items():
                if value is not None and name not in ("step", "epoch"):
                    self.writer.add_scalar(f"{group}/{name.replace('@', '_at_')}", value, step)

    def close(self) -> None:
        if self.writer is not None:
            with writing(self.folder):
                self.writer.close()
