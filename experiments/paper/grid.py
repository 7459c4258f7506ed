"""Many trainings in parallel processes, each measured only once.

OUT/trainings/<key>/     a folder of experiments.training, with measurement.json once it is measured

The key is a hash of the training. A ProcessPoolExecutor does not fit: when one worker is killed, the pool fails all its
futures, and reports neither the training nor the exit status. An interruption would wait for the running trainings.
"""

from __future__ import annotations

import multiprocessing
import queue
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.paper.measurement import ANDERSON_FILE, FILE, Measurement, Training, load
from experiments.paper.progress import GridProgress
from experiments.paper.worker import Message, measure, work
from experiments.training.run_folder import CONFIG, RESULT, TRAINED

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

POLL_SECONDS = 0.2

# What is taken from a training of another run, if it is there: its measurements, and its model.
REUSED = (CONFIG, RESULT, TRAINED, ANDERSON_FILE, FILE)


class GridError(RuntimeError):
    """Some trainings could not be measured; the other measurements are kept."""


class Grid:
    """Measures trainings.

    Args:
        out: The folder; it is made if it does not exist.
        jobs: Trainings at a time, each in its own process; with 1, in this process.
        threads: Torch's threads for each training.
        resume: Whether to continue interrupted trainings; otherwise they are an error.
        reuse: Folders of other grids, whose measurements are taken instead of training again.
    """

    def __init__(
        self, out: Path, jobs: int = 1, threads: int = 1, resume: bool = False, reuse: Sequence[Path] = ()
    ) -> None:
        self.out, self.jobs, self.threads, self.resume, self.reuse = out, jobs, threads, resume, tuple(reuse)

    def folder(self, training: Training) -> Path:
        """Return the folder of a training."""
        return _folder(self.out, training)

    def find(self, trainings: Mapping[str, Training]) -> dict[str, Measurement]:
        """Read the measurements that exist, here or in a folder to reuse, by the trainings' keys.

        Args:
            trainings: Trainings by label.

        Raises:
            ValueError: If a measurement is damaged.
        """
        found = {}
        for training in trainings.values():
            for folder in (self.out, *self.reuse):
                measurement = load(_folder(folder, training), training)
                if measurement is not None:
                    found[training.key] = measurement
                    break
        return found

    def _take(self, trainings: Iterable[Training]) -> None:
        """Copy what the folders to reuse have of trainings that are not measured here."""
        for training in trainings:
            for folder in self.reuse:
                own, other = self.folder(training), _folder(folder, training)
                if load(own, training) is None and load(other, training) is not None:
                    own.mkdir(parents=True, exist_ok=True)
                    for name in REUSED:  # the measurement last: with it, the training counts as measured
                        if (other / name).is_file():
                            shutil.copyfile(other / name, own / name)

    def measure(self, trainings: Mapping[str, Training]) -> dict[str, Measurement]:
        """Return the measurements of all trainings, by their keys; train what is not measured yet.

        Args:
            trainings: Trainings by label.

        Raises:
            FileExistsError: If a training was interrupted and ``resume`` is false.
            GridError: If some failed; the other trainings are measured.
            ValueError: If a measurement is damaged.
        """
        labels = {training.key: label for label, training in reversed(list(trainings.items()))}
        self._take(trainings.values())
        found = self.find(trainings)
        waiting = {each.key: each for each in trainings.values() if each.key not in found}
        begun = [labels[key] for key, each in waiting.items() if (self.folder(each) / "checkpoints").is_dir()]
        if begun and not self.resume:
            raise FileExistsError(
                f"{self.out} has trainings that were interrupted: {'; '.join(begun)}: resume them (--resume), or choose"
                " another folder"
            )
        failures: dict[str, str] = {}
        if waiting:
            with GridProgress(labels, len(found)) as display:
                run = self._in_processes if self.jobs > 1 else self._here
                failures = run(list(waiting.values()), display)
        found |= self.find({labels[key]: each for key, each in waiting.items()})
        if failures:
            texts = "; ".join(f"{labels[key]}: {text}" for key, text in failures.items())
            raise GridError(f"{len(failures)} of {len(labels)} trainings failed: {texts}")
        return found

    def _here(self, trainings: list[Training], display: GridProgress) -> dict[str, str]:
        failures = {}
        for training in trainings:
            try:
                measure(training, self.folder(training), self.threads, display.receive)
            except Exception as error:  # the report names it, and the other trainings go on
                failures[training.key] = f"{type(error).__name__}: {error}"
                display.receive(Message(training.key, "failed", (failures[training.key],)))
        return failures

    def _in_processes(self, trainings: list[Training], display: GridProgress) -> dict[str, str]:
        context = multiprocessing.get_context("spawn")  # a fork would share torch's threads
        messages: Queue[Message] = context.Queue()
        waiting, running, failures = list(trainings), dict[str, BaseProcess](), dict[str, str]()

        def receive() -> None:
            try:
                message = messages.get(timeout=POLL_SECONDS)
                while True:
                    if message.kind == "failed":
                        failures[message.key] = message.content[0]
                    display.receive(message)
                    message = messages.get_nowait()
            except queue.Empty:
                pass

        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    training = waiting.pop(0)
                    arguments = (training, self.folder(training), self.threads, messages)
                    process = context.Process(target=work, args=arguments, daemon=True)
                    process.start()
                    running[training.key] = process
                ended = [key for key, process in running.items() if process.exitcode is not None]
                receive()  # after the exit codes, so that all messages of ended processes are read
                for key in ended:
                    status = running.pop(key).exitcode
                    if status and key not in failures:
                        failures[key] = f"its process ended with exit status {status}"
                        display.receive(Message(key, "failed", (failures[key],)))
        finally:
            for process in running.values():
                process.terminate()
            deadline = time.monotonic() + 10.0
            for process in running.values():
                process.join(max(0.0, deadline - time.monotonic()))
                if process.exitcode is None:
                    process.kill()
            messages.close()
            messages.cancel_join_thread()
        return failures


def _folder(out: Path, training: Training) -> Path:
    return out / "trainings" / training.key
