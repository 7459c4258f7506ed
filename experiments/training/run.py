"""The function ``train``: a whole training in one call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.training.configuration import TrainingConfig, load_training_config
from experiments.training.distribution import Distribution
from experiments.training.history import Result
from experiments.training.observers import CsvTables, Observer
from experiments.training.run_folder import check_unused, note_failure
from experiments.training.trainer import Trainer


class FolderInUseError(RuntimeError):
    """Another process is training in the folder."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Any]:
    """Lock a folder against other processes; the system releases the lock when the process ends for any reason.

    Raises:
        FolderInUseError: If another process has the lock.
    """
    try:
        import fcntl
    except ImportError:  # not on this system
        yield None
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUseError(f"another process is training in {folder}: choose another folder, or wait") from None
        yield file


def train(
    config: TrainingConfig | str | Path,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    observers: Sequence[Observer] = (),
) -> Result:
    """Train a model.

        result = experiments.training.train("conv_digits", out="runs/conv_digits")
        print(result.test.metric, result.history.column("metric@3"))

    Args:
        config: A configuration, or the name or path of one.
        out: Folder for checkpoints, tables, plots and the trained parameters, the same for all processes. Without one
            nothing is written.
        resume: Continue from the newest complete checkpoint in ``out``, or start if there is none. Except for the
            seconds, the result is the same as without an interruption, to the last bit. A start removes the files of
            an earlier training that ended before its first checkpoint.
        observers: More observers; they are called in the process of rank 0.

    Returns:
        The model, its history and its evaluation on test data. Torch's generators are restored.

    Raises:
        TypeError, ValueError: If the configuration is not valid, or differs from the resumed training's.
        FileExistsError: If ``out`` has a training and ``resume`` is false, or a trained model but no checkpoint.
        FolderInUseError: If another process is training in ``out``.
        CheckpointError: If a checkpoint cannot be written, or none can be read.
        ModuleNotFoundError: If the configuration needs a package that is not installed.
    """
    found = config if isinstance(config, TrainingConfig) else load_training_config(config)
    if resume and out is None:
        raise ValueError("resume needs out, the folder to go on in, got None")
    folder = None if out is None else Path(out)
    distribution = Distribution(found.strategy, found.device)
    devices = [distribution.device] if distribution.device.type == "cuda" else []
    watching: list[Observer] = list(observers)
    with contextlib.ExitStack() as stack:
        stack.callback(distribution.close)
        stack.enter_context(torch.random.fork_rng(devices))
        if folder is not None and distribution.main:
            watching += _prepared(folder, found, resume, stack, observers)
        for observer in watching:
            stack.callback(observer.close)
        trainer = None
        try:
            trainer = Trainer(found, distribution, watching, folder)
            if resume:
                trainer.resume()
            return trainer.run()
        except BaseException as error:
            if folder is not None and distribution.main:
                note_failure(folder, 0 if trainer is None else trainer.step, error)
            raise


def _prepared(
    folder: Path, config: TrainingConfig, resume: bool, stack: contextlib.ExitStack, observers: Sequence[Observer]
) -> list[Observer]:
    """Prepare and lock the folder; return the observers that write into it."""

    def notice(text: str) -> None:
        for observer in observers:
            observer.noticed(text)

    folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(locked(folder))
    check_unused(folder, resume)
    watching: list[Observer] = [CsvTables(folder)]
    if config.logging.tensorboard:
        from experiments.training.tensorboard import TensorBoard

        watching.append(TensorBoard(folder))
    if config.logging.plot:
        from experiments.training.plots import Plot

        try:
            watching.append(Plot(folder))
        except ModuleNotFoundError:
            notice("there is no plot without matplotlib: pip install matplotlib, or set logging.plot to false")
    return watching
