"""A training of an experiment's grid, its key and its measurement."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.training import Evaluation, EvaluationRow, History, TrainingConfig
from experiments.training.atomic_files import write_whole
from pydeq.models.equilibrium import PenaltyConfig

FORMAT = 1
FILE = "measurement.json"
ANDERSON_FILE = "test-anderson.json"
"""The test by Anderson's method, which the experiment "inference" makes."""


@dataclass(frozen=True)
class Training:
    """A training, and the hard stops at which it is tested.

    Args:
        config: Configuration of the training.
        stops: Hard stops of the test, in evaluations of f.
        test_batch: Samples, or rows of text, at a time in the test.
    """

    config: TrainingConfig
    stops: tuple[int, ...]
    test_batch: int

    @property
    def key(self) -> str:
        """A hash of all fields: trainings with the same key are the same training."""
        content = {"format": FORMAT, "config": self.config.mapping(), "stops": self.stops, "batch": self.test_batch}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def with_seed(self, seed: int) -> Training:
        """Return the same training with another seed."""
        return replace(self, config=replace(self.config, seed=seed))

    def with_strength(self, strength: float) -> Training:
        """Return the same training with another strength of the penalty; 0 for none."""
        penalty = self.config.jacobian_penalty()
        penalty = replace(penalty, strength=strength) if penalty and strength else PenaltyConfig(strength)
        return replace(self, config=replace(self.config, penalty=penalty))


@dataclass(frozen=True)
class Measurement:
    """The measurement of a training.

    Args:
        key: Key of the :class:`Training`.
        config: Its configuration, as a file holds it.
        status: "finished" or "diverged".
        metric: "accuracy" or "perplexity".
        steps: Number of steps done.
        parameters: Number of trainable entries of the model.
        seconds: Seconds of training, with its evaluations.
        test_seconds: Seconds of the test at all stops.
        evaluations: The evaluations on validation data.
        test: The evaluation on test data, with the hard stops; None if the training diverged.
        environment: See :mod:`experiments.paper.environment`.
        folder: Folder of the training, not stored; None for a measurement that was not read from one.
    """

    key: str
    config: dict[str, Any]
    status: str
    metric: str
    steps: int
    parameters: int
    seconds: float
    test_seconds: float
    evaluations: list[EvaluationRow]
    test: Evaluation | None
    environment: dict[str, Any]
    folder: Path | None = field(default=None, compare=False)

    def at(self, stop: int | None) -> float | None:
        """Return the test metric, accuracies in percent, at a hard stop; None for the model's own cap."""
        if self.test is None:
            return None
        value = self.test.metric if stop is None else self.test.stops[stop]
        return 100.0 * value if self.metric == "accuracy" else value

    def curve(self, name: str) -> tuple[list[float], list[Any]]:
        """Return the steps of the evaluations, and one column of them."""
        return [float(row.step) for row in self.evaluations], [row.flat()[name] for row in self.evaluations]

    def save(self, folder: Path) -> None:
        """Write the measurement into a training's folder, atomically."""
        content = {"format": FORMAT} | self._contents()
        write_whole(folder / FILE, json.dumps(content, indent=1) + "\n")

    def brief(self) -> dict[str, Any]:
        """Return the measurement as a mapping, with the evaluations as columns."""
        rows = [row.flat() for row in self.evaluations]
        columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
        seen = {name: column for name, column in columns.items() if any(value is not None for value in column)}
        return self._contents() | {"evaluations": {name: _rounded(column) for name, column in seen.items()}}

    def _contents(self) -> dict[str, Any]:
        contents = asdict(self)
        del contents["folder"]
        return contents


def load(folder: Path, training: Training) -> Measurement | None:
    """Read the measurement in a training's folder; None if there is none.

    Raises:
        ValueError: If it is damaged, or belongs to another training.
    """
    path = folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            return None  # an older format: measure again
        history = History.of({"steps": [], "evaluations": content["evaluations"]})
        test = None if content["test"] is None else evaluation_of(content["test"])
        found = Measurement(**(content | {"evaluations": history.evaluations, "test": test, "folder": folder}))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}; remove it to measure again") from error
    if found.key != training.key:
        raise ValueError(f"{path} is of the training {found.key}, not {training.key}; remove it")
    return found


def evaluation_of(content: dict[str, Any]) -> Evaluation:
    """Build an evaluation from JSON, whose keys are text."""
    stops: dict[str, Any] = {
        name: {int(k): v for k, v in content[name].items()} for name in ("stops", "stop_residuals")
    }
    return Evaluation(**(content | stops))


def _rounded(column: list[Any]) -> list[Any]:
    return [float(f"{value:.6g}") if isinstance(value, float) else value for value in column]
