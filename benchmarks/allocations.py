"""The memory that a solve allocates, by torch's profiler."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(solve: Callable[[], object], forget: Callable[[], None]) -> int:
    """The most bytes that ``solve`` holds at once, of those that it allocates itself.

    Args:
        solve: Runs twice.
        forget: Frees what the first run keeps for the next one.
    """
    solve()  # whatever a process allocates once
    forget()
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = solve()
    del kept
    results = profiled.profiler.kineto_results if profiled.profiler else None
    assert results is not None
    changes: list[Any] = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the trace lines that the profiler writes to stderr from C++, which would break the progress bars."""
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(nowhere)
        os.close(saved)
