"""Runs the cases of a stage in worker processes, and writes their rows as they come.

It does not import torch: it starts at once, and a fault on the device cannot affect it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

FAILED, OUT_OF_TIME = 1, 124  # exit statuses; the second is that of the command timeout
START = 60.0  # seconds for a worker to import torch and to start CUDA
PATIENCE = 2.0  # seconds between SIGTERM and SIGKILL


class StoppedError(Exception):
    """The stage must end: its time is used up, or this process was told to stop."""


class Parent:
    """One stage.

    Args:
        command: Starts a worker. ``--skip NAMES --pipe FD`` is appended: cases to leave out, and where it is to write
            its messages.
        path: File of JSON lines that rows are appended to.
        seconds: Time for the whole stage.
        show: Called with each row once it is written.
    """

    def __init__(self, command: Sequence[str], path: Path, seconds: float, show: Callable[[Row], None]) -> None:
        self.command, self.path, self.show = command, path, show
        self.begin = time.monotonic()
        self.end = self.begin + seconds
        self.planned = False
        self.left: list[str] = []
        self.done: list[str] = []
        self.failed = False

    def run(self) -> int:
        """Run every case, as far as time allows, and return the exit status. No worker is still running at the end."""
        before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while self._run_worker():
                pass
        except StoppedError as over:
            self._write({"not run": str(over), "cases": self.left})
            return FAILED if self.failed else OUT_OF_TIME
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return FAILED if self.failed else 0

    def _run_worker(self) -> bool:
        """Run one worker until it ends or a case takes too long; returns whether another worker must continue.

        Raises:
            StoppedError: If the stage ends before the worker does.
        """
        before = len(self.done)
        worker = _Worker([*self.command, "--skip", ",".join(self.done)])
        case: str | None = None
        try:
            for message in worker.messages(self.end):
                if "plan" in message:
                    self.planned, self.left = True, message["plan"]
                elif "begin" in message:
                    case = message["begin"]
                    worker.limit(message["limit"])
                elif "row" in message:
                    self._write({"case": case, **message["row"]})
                elif "end" in message:
                    self._finish(message["end"])
                    case = None
                    if not self.left:
                        break
                    worker.limit(START)
        finally:
            ending = worker.stop()
        if case is not None:
            self._write({"case": case, "failed": ending})
            self._finish(case)
        elif len(self.done) == before and (self.left or not self.planned):
            self._write({"failed": f"a worker began no case: {ending}"})
            return False
        return bool(self.left)

    def _finish(self, case: str) -> None:
        self.done.append(case)
        self.left.remove(case)

    def _write(self, row: Row) -> None:
        """Write and show a row, with the stage's seconds so far."""
        self.failed = self.failed or "failed" in row
        row = {**row, "at": round(time.monotonic() - self.begin, 1)}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.show(row)


class _Worker:
    """A process whose messages are read until it ends, or until its limit."""

    def __init__(self, command: Sequence[str]) -> None:
        self._pipe, theirs = os.pipe()
        self._process = subprocess.Popen([*command, "--pipe", str(theirs)], pass_fds=[theirs])
        os.close(theirs)
        self.limit(START)
        self._late = False

    def limit(self, seconds: float) -> None:
        """Set its time limit, counted from now."""
        self._seconds, self._until = seconds, time.monotonic() + seconds

    def messages(self, end: float) -> Iterator[Row]:
        """Yield its messages, until it has ended or its limit is over.

        Raises:
            StoppedError: At ``end``, by ``time.monotonic()``.
        """
        pending = b""
        while True:
            now = time.monotonic()
            if now >= end:
                raise StoppedError("no time was left")
            if now >= self._until:
                self._late = True
                return
            if not select.select([self._pipe], [], [], min(end, self._until) - now)[0]:
                continue
            piece = os.read(self._pipe, 1 << 16)
            if not piece:
                return
            *lines, pending = (pending + piece).split(b"\n")
            yield from map(json.loads, lines)

    def stop(self) -> str:
        """End it if it is still running; return a description of its end."""
        os.close(self._pipe)
        if self._late or self._wait(PATIENCE) is None:
            self._process.terminate()
            if self._wait(PATIENCE) is None:
                self._process.kill()
        status = self._process.wait()
        if self._late:
            return f"it took more than {self._seconds:g} s"
        return f"the process was ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"

    def _wait(self, seconds: float) -> int | None:
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


def _stop(number: int, frame: object) -> None:
    raise StoppedError(f"the stage was stopped by {signal.Signals(number).name}")
