"""Progress on the terminal: a bar for each suite, or lines where the output is not a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Bar:
    """The bar of one suite."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def start(self, total: int) -> None:
        """Set how many times ``advance`` will be called."""
        self._progress.update(self._task, total=total, completed=0)

    def advance(self, doing: str | None = None) -> None:
        """Count one more as done; show ``doing`` as the current work."""
        self._progress.advance(self._task)
        if doing is not None:
            self.show(doing)

    def show(self, doing: str) -> None:
        """Show the current work."""
        self._progress.update(self._task, doing=doing)


class Board(Progress):
    """The bars of a run, as a context manager.

    Args:
        console: Where to draw. If it is not a terminal, each suite prints a line when it starts and when it ends.
        names: The suites, in order.
    """

    def __init__(self, console: Console, names: list[str]) -> None:
        super().__init__(
            TextColumn("{task.fields[suite]:<9}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[doing]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._suites = {name: self.add_task("", total=None, start=False, suite=name, doing="waiting") for name in names}

    @contextmanager
    def suite(self, name: str) -> Iterator[Bar]:
        """Show that a suite runs, and give its bar."""
        begin, task, ended = time.perf_counter(), self._suites[name], "failed"
        if self.disable:
            self.console.print(f"{name}: running")
        self.start_task(task)
        self.update(task, doing="")
        try:
            yield Bar(self, task)
            ended = "done"
        finally:
            self.update(task, doing=ended)
            self.stop_task(task)
            if self.disable:
                self.console.print(f"{name}: {ended} after {time.perf_counter() - begin:.1f} s")


_nowhere = Progress(disable=True)
SILENT = Bar(_nowhere, _nowhere.add_task(""))
