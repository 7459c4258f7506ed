"""Progress on the terminal: a bar for each suite, or lines where the output is not a terminal, and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Estimate:
    """The time left in a run, from the seconds that each suite took before.

    As suites finish, the earlier seconds are scaled to this run: by the time of the finished suites over their earlier
    time. A suite without earlier seconds counts as the mean of the other suites. A suite that has begun goes on as fast
    as so far, since it may have more or less to do than before.

    Args:
        names: The suites to run.
        before: Seconds of suites in an earlier run.
    """

    def __init__(self, names: Sequence[str], before: Mapping[str, float]) -> None:
        known = [before[name] for name in names if name in before]
        mean = sum(known) / len(known) if known else 1.0
        self._known = bool(known)
        self._expected = {name: before.get(name, mean) for name in names}
        self._took: dict[str, float] = {}

    def finish(self, name: str, seconds: float) -> None:
        """Count a suite as finished."""
        self._took[name] = seconds
        self._known = True

    def left(self, running: str | None = None, elapsed: float = 0.0, done: float = 0.0) -> float | None:
        """Seconds left; None if nothing is known yet.

        Args:
            running: The suite that runs.
            elapsed: Its seconds so far.
            done: The share of it that is done.
        """
        whole = elapsed / done if done else None
        if not self._known and whole is None:
            return None
        expected = sum(self._expected[name] for name in self._took)
        scale = sum(self._took.values()) / expected if expected else 1.0
        if not self._known and whole is not None:
            scale = whole  # all suites take as long as the first one
        rest = {name: scale * seconds for name, seconds in self._expected.items() if name not in self._took}
        if running in rest:
            rest[running] = max((rest[running] if whole is None else whole) - elapsed, 0.0)
        return sum(rest.values())


def about(seconds: float) -> str:
    """A rough time in words, such as "about 7 minutes"."""
    if seconds < 50:
        return f"about {max(10, 10 * round(seconds / 10))} seconds"
    minutes = max(1, round(seconds / 60))
    if minutes < 100:
        return f"about {minutes} minute{'s' if minutes > 1 else ''}"
    return f"about {seconds / 3600:.1f} hours"


class Bar:
    """The bar of one suite."""

    def __init__(self, progress: Progress, task: TaskID, tick: Callable[[], None] = lambda: None) -> None:
        self._progress, self._task, self._tick = progress, task, tick

    def start(self, total: int) -> None:
        """Set how many times ``advance`` will be called."""
        self._progress.update(self._task, total=total, completed=0)

    def advance(self, doing: str | None = None) -> None:
        """Count one more as done; show ``doing`` as the current work."""
        self._progress.advance(self._task)
        self._tick()
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
        before: Seconds of suites in an earlier run, to estimate the time left.
    """

    def __init__(self, console: Console, names: Sequence[str], before: Mapping[str, float] | None = None) -> None:
        super().__init__(
            TextColumn("{task.fields[suite]:<11}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[doing]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._estimate = Estimate(names, before or {})
        self._suites = {name: self.add_task("", total=None, start=False, suite=name, doing="waiting") for name in names}
        self._whole = self.add_task("", total=len(names), suite="all", doing=self._left_text())

    @contextmanager
    def suite(self, name: str) -> Iterator[Bar]:
        """Show that a suite runs, and give its bar."""
        begin, task, ended = time.perf_counter(), self._suites[name], "failed"
        if self.disable:
            left = self._left_text()
            self.console.print(f"{name}: running{left and f'; {left}'}", highlight=False)
        self.start_task(task)
        self.update(task, doing="")
        try:
            yield Bar(self, task, lambda: self._show_left(name, time.perf_counter() - begin, self._done(task)))
            ended = "done"
        finally:
            seconds = time.perf_counter() - begin
            self._estimate.finish(name, seconds)
            self.update(task, doing=ended)
            self.stop_task(task)
            self.advance(self._whole)
            self._show_left()
            if self.disable:
                self.console.print(f"{name}: {ended} after {seconds:.1f} s", highlight=False)

    def _done(self, task: TaskID) -> float:
        return next(each.percentage for each in self.tasks if each.id == task) / 100

    def _show_left(self, running: str | None = None, elapsed: float = 0.0, done: float = 0.0) -> None:
        self.update(self._whole, doing=self._left_text(running, elapsed, done))

    def _left_text(self, running: str | None = None, elapsed: float = 0.0, done: float = 0.0) -> str:
        left = self._estimate.left(running, elapsed, done)
        return f"{about(left)} left" if left else ""


_nowhere = Progress(disable=True)
SILENT = Bar(_nowhere, _nowhere.add_task(""))
