"""The folder of a training, for those who want the trained model."""

from __future__ import annotations

import contextlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from experiments.data import Vocabulary
from experiments.training import snapshot
from experiments.training.checkpoint import CheckpointError, Checkpoints, DamagedError, read, read_tensors, writing
from experiments.training.configuration import TrainingConfig, load_training_config
from pydeq.models import DEQTransformerLM, EquilibriumModel, build

CONFIG, RESULT, FAILURE, VOCABULARY = "config.json", "result.json", "failed.txt", "vocabulary.json"
TRAINED, BEST = "model.safetensors", "best.safetensors"
PLOT = "training.png"


@dataclass(frozen=True, repr=False)
class Run:
    """A trained model and its training.

    Args:
        folder: Folder of the training.
        config: Its configuration.
        model: The model, in evaluation mode, on the CPU.
        step: Number of steps after which the model had these parameters.
        status: "finished", "diverged", or "unfinished" for a training that was interrupted or still runs.
    """

    folder: Path
    config: TrainingConfig
    model: EquilibriumModel
    step: int
    status: str

    def __repr__(self) -> str:
        name = type(self.model).__name__
        return f"Run({name} after {self.step} steps, {self.status}, in {self.folder})"


def load_run(folder: str | Path, checkpoint: Literal["last", "best"] = "last") -> Run:
    """Load the trained model of a run's folder, its configuration and its state.

    A language model gets the vocabulary of its text, and the window that it was trained with. Torch's generators are
    left as they are.

    Args:
        folder: Folder of a training, such as runs/conv_digits.
        checkpoint: The parameters to load: "last" for those after the last step that was saved, "best" for those of the
            best evaluation on validation data.

    Raises:
        FileNotFoundError: If there is no such folder, or it is not the folder of a training.
        CheckpointError: If the training saved no parameters, because its start failed or it was stopped early, or its
            files are damaged.
        ValueError: If ``checkpoint`` is something else, or the configuration is not valid.
    """
    if checkpoint not in ("last", "best"):
        raise ValueError(f"checkpoint must be last or best, got {checkpoint!r}")
    path = Path(folder)
    _check_folder(path)
    config = load_training_config(path / CONFIG)
    tensors, step = _best(path) if checkpoint == "best" else _last(path)
    result = _result(path)
    # A training that was made longer has newer checkpoints than its result.
    reached = max([step, *(int(each.name) for each in Checkpoints(path / "checkpoints").paths())])
    status = result["status"] if result is not None and result["steps"] >= reached else "unfinished"
    if status == "diverged" and checkpoint == "last":
        warnings.warn(
            f"the training in {path} diverged after {result and result['steps']} steps: these are the parameters of"
            f" step {step}",
            stacklevel=3,
        )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = build(config.model)
    snapshot.load_model_tensors(model, tensors, "")
    if isinstance(model, DEQTransformerLM):
        # Longer distances did not occur in training.
        model.generation_window = min(model.config.window, config.data.length + model.config.memory_length)
        if (path / VOCABULARY).is_file():
            model.vocabulary = Vocabulary.of(json.loads((path / VOCABULARY).read_text(encoding="utf-8")))
    return Run(path, config, model.eval(), step, status)


def load(folder: str | Path, checkpoint: Literal["last", "best"] = "last") -> EquilibriumModel:
    """Load the trained model of a run's folder, in evaluation mode, on the CPU.

        model = experiments.load("runs/transformer_shakespeare_small")
        print(model.generate("KING. ", 200))

    See :func:`load_run` for arguments and errors; it also returns the configuration.
    """
    return load_run(folder, checkpoint).model


def note_failure(folder: Path, step: int, error: BaseException) -> None:
    """Write into a folder why its training ended before the first checkpoint; nothing if that cannot be written."""
    if Checkpoints(folder / "checkpoints").paths():
        return
    reason = "it was interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
    when = f"after {step} steps" if step else "in its first step, or before it"
    with contextlib.suppress(OSError):
        (folder / FAILURE).write_text(f"The training ended {when}, without a checkpoint: {reason}\n", encoding="utf-8")


def check_unused(folder: Path, resume: bool) -> None:
    """Check that a training may begin in a folder, or continue there.

    Raises:
        FileExistsError: If the folder has a training and ``resume`` is false, or a trained model but no checkpoint.
    """
    if Checkpoints(folder / "checkpoints").paths():
        if not resume:
            raise FileExistsError(
                f"out {folder} has a training already: resume it (--resume), or choose another folder"
            )
        return
    # The best parameters of a training that was stopped before its first checkpoint must not stop a job that is
    # started again with resume.
    models = [name for name in (TRAINED, *(() if resume else (BEST,))) if (folder / name).is_file()]
    if models:
        raise FileExistsError(
            f"out {folder} has a trained model already, {' and '.join(models)}, and no checkpoint to resume from:"
            " choose another folder, or remove these files"
        )


def remove_earlier(folder: Path) -> list[str]:
    """Remove what an earlier training left in a folder, except what is written again at once; return the names.

    Raises:
        CheckpointError: If a file cannot be removed.
    """
    removed = []
    for name in (TRAINED, BEST, RESULT, VOCABULARY, PLOT):
        with writing(folder / name), contextlib.suppress(FileNotFoundError):
            (folder / name).unlink()
            removed.append(name)
    return removed


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}{_runs_in(path.parent)}")
    if not (path / CONFIG).is_file():
        if (path / FAILURE).is_file():
            raise _nothing_saved(path)
        raise FileNotFoundError(f"{path} is not the folder of a training: it has no {CONFIG}{_runs_in(path)}")


def _runs_in(path: Path) -> str:
    """Name the runs in a folder, for error messages."""
    found = sorted(file.parent.name for file in path.glob(f"*/{CONFIG}"))
    return f"; the trainings in {path} are {', '.join(found)}" if found else ""


def _nothing_saved(path: Path) -> CheckpointError:
    with contextlib.suppress(OSError):
        return CheckpointError(f"there is no model in {path}. {(path / FAILURE).read_text(encoding='utf-8').strip()}")
    result = _result(path)
    if result is not None:
        return CheckpointError(
            f"there is no model in {path}: the training {result['status']} before its first checkpoint"
        )
    return CheckpointError(
        f"there is no model in {path}: the training was stopped before its first checkpoint, or still runs"
    )


def _last(path: Path) -> tuple[dict[str, Tensor], int]:
    """The parameters of the last step that was saved."""
    damaged = []
    checkpoints = Checkpoints(path / "checkpoints").paths()
    if (path / TRAINED).is_file():
        tensors, about = read_tensors(path / TRAINED)
        result = _result(path)
        step = int(about.get("step", 0 if result is None else result["steps"]))
        if not checkpoints or int(checkpoints[0].name) <= step:
            return tensors, step
    for each in checkpoints:
        try:
            found = read(each)
        except DamagedError as error:  # or removed in the meantime by a training that goes on
            damaged.append(str(error))
            continue
        if damaged:
            warnings.warn(f"{damaged[0]}; using the one of step {found.state['step']}", stacklevel=4)
        prefix = "model."
        tensors = {key.removeprefix(prefix): each for key, each in found.tensors.items() if key.startswith(prefix)}
        return tensors, found.state["step"]
    if damaged:
        raise CheckpointError("no checkpoint is complete: " + "; ".join(damaged))
    raise _nothing_saved(path)


def _best(path: Path) -> tuple[dict[str, Tensor], int]:
    """The parameters of the best evaluation."""
    if not (path / BEST).is_file():
        if not Checkpoints(path / "checkpoints").paths():
            raise _nothing_saved(path)
        raise CheckpointError(f"there is no {BEST} in {path}: no evaluation has saved its parameters; load the last")
    tensors, about = read_tensors(path / BEST)
    return tensors, int(about["step"])


def _result(path: Path) -> dict[str, Any] | None:
    if not (path / RESULT).is_file():
        return None
    return json.loads((path / RESULT).read_text(encoding="utf-8"))
