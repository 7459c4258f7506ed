"""The context in which a suite runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.partial import Kept
from benchmarks.peers import NAMES, Peer
from benchmarks.profiles import Profile
from benchmarks.progress import Bar
from benchmarks.results import Results

BASELINE = NAMES[0]


@dataclass(frozen=True)
class Context:
    """Settings, libraries and results for a suite.

    Args:
        profile: The size of the measurements.
        peers: The libraries that are installed and asked for, by name, pydeq first.
        results: Collects what the suite finds.
        bar: Shows progress.
        threads: Thread counts for overheads and kernels. Everything else runs on one thread.
        peers_asked: The libraries to compare pydeq with; None for all.
        problems_asked: Families of problems, or prefixes of their keys; None for all.
        device: Where to solve, "cpu" or "cuda", for suites in ``ON_DEVICE``.
        kept: ``kept(key, compute)`` is a JSON value that is computed once, even if the run is stopped and resumed.
    """

    profile: Profile
    peers: Mapping[str, Peer]
    results: Results
    bar: Bar
    threads: tuple[int, ...]
    peers_asked: tuple[str, ...] | None = None
    problems_asked: tuple[str, ...] | None = None
    device: str = "cpu"
    kept: Kept = field(default_factory=Kept)

    @property
    def others(self) -> tuple[str, ...]:
        """The names of the libraries that pydeq is compared with."""
        return tuple(name for name in self.peers if name != BASELINE)

    def asks_library(self, library: str) -> bool:
        """Whether a library takes part. pydeq always does."""
        return library == BASELINE or self.peers_asked is None or library in self.peers_asked

    def asks_problem(self, family: str, key: str) -> bool:
        """Whether a problem is asked for, by its family or by the beginning of its key."""
        asked = self.problems_asked
        return asked is None or family in asked or key.startswith(asked)
