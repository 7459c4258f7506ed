"""Peak memory of a solve, in state vectors [B, D].

It comes from the allocations and releases that torch's profiler sees during the solve. What exists before, such as z0,
does not count. f allocates one vector, its result, which counts.
"""

from __future__ import annotations

from benchmarks.allocations import peak_bytes
from benchmarks.peers import Method
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
                peak = peak_bytes(
                    lambda peer=peer, m=method, c=calls: peer.run(problem.fn, problem.z0, m, c), peer.forget
                )
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
