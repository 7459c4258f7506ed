"""The finished parts of a run, in files: if a run is stopped, ``--resume`` continues it.

``--reuse`` takes results of the contest from other runs, so that its problems can be split into runs side by side.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Results

# Facts that differ between two runs of the same code on the same machine. What the commit has besides the code, such as
# documents, does not matter.
VOLATILE = ("date", "load_at_start", "memory_gib", "commit", "uncommitted_changes")
# Facts that results of the contest depend on. It always uses one core, so the number of cores does not matter.
OF_CONTEST = (
    "profile", "code", "peers", "device", "gpu", "cpu", "caches", "platform", "versions", "kernels",
)  # fmt: skip


class Kept:
    """JSON values by key, on a line each of a file. A process that is killed loses at most the value it computes.

    Args:
        path: The file; None keeps the values in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._values: dict[str, Any] = {}
        if path is None or not path.exists():
            return
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # the last line may be cut off
        self._values = dict(map(json.loads, whole.splitlines()))
        if whole != text:
            path.write_text(whole, encoding="utf-8")

    def __call__(self, key: str, compute: Callable[[], Any]) -> Any:
        """The value of ``key``; if there is none, that of ``compute()``, which is stored.

        Values are those that JSON gives back: tuples become lists.
        """
        if key not in self._values:
            line = json.dumps([key, compute()])
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
            self._values[key] = json.loads(line)[1]
        return self._values[key]


class Partial:
    """The finished suites of a run.

    Args:
        folder: Where to keep them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def start(self, facts: Mapping[str, Any], resume: bool) -> None:
        """Begin a run, or continue the one in the folder.

        Args:
            facts: What the figures depend on: profile, commit, machine and so on.
            resume: Whether to continue.

        Raises:
            ValueError: If there is nothing to continue, or if it was measured under other conditions.
        """
        path = self._folder / "run.json"
        if not resume:
            self.clear()
            self._folder.mkdir(parents=True)
            _replace(path, json.dumps(dict(facts)))
            return
        if not path.exists():
            raise ValueError(f"there is no unfinished run in {self._folder.parent}")
        before = json.loads(path.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(dict(facts)))
        different = _different(*({k: v for k, v in each.items() if k not in VOLATILE} for each in (before, now)))
        if different is not None:
            name, old, new = different
            raise ValueError(
                f"{name} must be that of the unfinished run, {old!r}, got {new!r}; run without --resume to start again"
            )

    def reuse(self, shares: Sequence[Mapping[str, Any]]) -> None:
        """Take the results of the contest's problems from other runs, as read by :func:`read_shares`."""
        kept = self.kept("contest")
        for share in shares:
            problems: dict[str, list[Any]] = {}
            for entry in share["entries"]:
                problems.setdefault(entry["problem"], []).append(entry)
            for problem, rows in problems.items():
                kept(f"contest.{problem}", lambda rows=rows: rows)

    def load(self, suite: str) -> Results | None:
        """The results of a suite; None if it has not finished."""
        path = self._folder / f"{suite}.json"
        return Results.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def save(self, suite: str, results: Results) -> None:
        """Keep the results of a suite that has finished."""
        _replace(self._folder / f"{suite}.json", json.dumps(results.contents()))

    def kept(self, suite: str) -> Kept:
        """The rows that a suite keeps while it runs."""
        return Kept(self._folder / f"{suite}.jsonl")

    def clear(self) -> None:
        """Delete everything."""
        if self._folder.exists():
            shutil.rmtree(self._folder)


def read_shares(paths: Sequence[Path], facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Read the summaries of runs whose results of the contest are to be reused.

    Args:
        paths: The summaries.
        facts: Of the present run, as in :meth:`Partial.start`.

    Raises:
        OSError: If a summary cannot be read.
        ValueError: If it is no summary, or was measured under other conditions.
    """
    now, shares = json.loads(json.dumps(dict(facts))), []
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            content = None
        if not isinstance(content, dict) or not {"entries", "seconds"} <= content.keys():
            raise ValueError(f"{path} is not a summary")
        different = _different(*({k: v for k, v in each.items() if k in OF_CONTEST} for each in (content, now)))
        if different is not None:
            name, old, new = different
            raise ValueError(f"{name} must be that of {path}, {old!r}, got {new!r}")
        shares.append(content)
    return shares


def _different(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first fact by name that has changed, with both values."""
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            return name, before.get(name), now.get(name)
    return None


def _replace(path: Path, text: str) -> None:
    """Write a file so that it is never seen half written."""
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
