"""Peak memory of a solve, in state vectors [B, D].

It comes from the allocations and releases that torch's profiler sees during the solve. What exists before, such as z0,
does not count. f allocates one vector, its result, which counts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.peers import Method, Peer
from benchmarks.problems.maps import elementwise
from benchmarks.results import number
from benchmarks.suites.base import BASELINE, Context
from benchmarks.timing import threads

BATCH, DIM = 4, 65536  # so large that everything but state vectors rounds to nothing
STEPS = (10, 30)


def run(context: Context) -> None:
    problem = elementwise(BATCH, DIM)
    cases = [(f"anderson.memory{m}", Method("anderson", m), 31, 2 * m + 5, f"2 memory + 5, memory {m}") for m in (3, 6)]
    cases += [(f"broyden.steps{k}", Method("broyden"), k + 1, k + 7, f"k + 7, k = {k} steps") for k in STEPS]
    cases += [("picard", Method("picard"), 31, None, "")]
    context.bar.start(len(cases) * len(context.peers))
    rows = []
    for key, method, calls, limit, statement in cases:
        row = [method.title, statement.split(", ")[-1]]
        for name, peer in context.peers.items():
            context.bar.show(f"{key}, {name}")
            with threads(1):
                peak = peak_bytes(peer, lambda peer=peer, m=method, c=calls: peer.run(problem.fn, problem.z0, m, c))
            vectors = peak / (4 * BATCH * DIM)
            context.results.figure(f"memory.{key}.{name}", vectors, "state vectors")
            row.append(number(vectors))
            if name == BASELINE and limit is not None:
                # Small tensors such as norms are not state vectors: round them off.
                context.results.target(
                    f"memory.{key}",
                    f"Peak memory of {method.title}: {statement}",
                    "<=",
                    limit,
                    round(vectors, 1),
                    "state vectors",
                )
            context.bar.advance()
        rows.append((*row, "" if limit is None else str(limit)))
    columns = ("solver", "size", *(f"{name}, vectors" for name in context.peers), "target")
    context.results.table(
        "memory",
        "Peak memory of a solve in state vectors [B, D], with the result of f and without z0",
        columns,
        rows,
        f"Allocations and releases of a solve as torch's profiler reports them, at (B, D) = ({BATCH}, {DIM}), float32.",
    )


def peak_bytes(peer: Peer, solve: Callable[[], object]) -> int:
    """The most bytes that ``solve`` holds at once, of those that it allocates itself; ``peer`` runs it."""
    solve()  # whatever a process allocates once
    peer.forget()
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
