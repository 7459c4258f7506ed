"""Progress on the terminal: a bar for each suite, or a line where the output is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Bar:
    """The bar of one suite."""

    def __init__(self, progress: Progress | None, task: TaskID | None) -> None:
        self._progress, self._task = progress, task

    def start(self, total: int) -> None:
        """Say how many times ``advance`` will be called."""
        if self._progress and self._task is not None:
            self._progress.update(self._task, total=total, completed=0)

    def advance(self, doing: str | None = None) -> None:
        """One more is done; ``doing`` says what is at work now."""
        if self._progress and self._task is not None:
            self._progress.update(self._task, advance=1)
        if doing is not None:
            self.show(doing)

    def show(self, doing: str) -> None:
        """Say what is at work."""
        if self._progress and self._task is not None:
            self._progress.update(self._task, doing=doing)


SILENT = Bar(None, None)


class Board:
    """The bars of a run, as a context manager.

    Args:
        console: Where to draw. Where it is no terminal, each suite gets a line at its start and its end instead.
        names: The suites, in order.
    """

    def __init__(self, console: Console, names: list[str]) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.fields[suite]:<9}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("[dim]{task.fields[doing]}"),
                console=console,
            )
            for name in names:
                self._tasks[name] = self._progress.add_task("", total=None, start=False, suite=name, doing="waiting")

    def __enter__(self) -> Board:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()

    @contextmanager
    def suite(self, name: str) -> Iterator[Bar]:
        """The bar of one suite, while it runs."""
        start = time.perf_counter()
        if self._progress is None:
            self.console.print(f"{name}: running")
            yield SILENT
        else:
            task = self._tasks[name]
            self._progress.start_task(task)
            self._progress.update(task, doing="")
            doing = "failed"
            try:
                yield Bar(self._progress, task)
                doing = "done"
            finally:
                self._progress.update(task, doing=doing)
                self._progress.stop_task(task)
        if self._progress is None:
            self.console.print(f"{name}: done after {time.perf_counter() - start:.1f} s")
