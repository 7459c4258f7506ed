"""The context in which a suite runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
        peers: The libraries that are installed, by name, pydeq first.
        results: Collects what the suite finds.
        bar: Shows progress.
        threads: Thread counts for overheads and kernels. Everything else runs on one thread.
    """

    profile: Profile
    peers: Mapping[str, Peer]
    results: Results
    bar: Bar
    threads: tuple[int, ...]

    @property
    def others(self) -> tuple[str, ...]:
        """The names of the libraries that pydeq is compared with."""
        return tuple(name for name in self.peers if name != BASELINE)
