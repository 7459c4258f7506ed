"""The process that runs a stage's cases, and tells its parent about them.

A message is one line of JSON on the parent's pipe: ``{"plan": [names]}``, then for each case ``{"begin": name, "limit":
seconds}``, ``{"row": {...}}`` for each of its rows, and ``{"end": name}``.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

BROKEN = 70  # exit status of a worker in which nothing runs on the device any more


@dataclass(frozen=True)
class Case:
    """One measurement.

    Args:
        name: Its name, unique in its stage.
        run: Yields rows.
        limit: Seconds, after which the parent ends the worker.
    """

    name: str
    run: Callable[[], Iterable[Row]]
    limit: float = 30.0


def work(cases: Sequence[Case], skip: Collection[str], pipe: int, broken: Callable[[], bool]) -> int:
    """Run the cases that are not in ``skip``; returns the exit status.

    Args:
        pipe: File descriptor that messages are written to.
        broken: Whether nothing runs on the device any more; asked after a case that failed.
    """

    def tell(message: Row) -> None:
        os.write(pipe, (json.dumps(message) + "\n").encode())

    left = [case for case in cases if case.name not in skip]
    tell({"plan": [case.name for case in left]})
    for case in left:
        tell({"begin": case.name, "limit": case.limit})
        failed = False
        try:
            for row in case.run():
                tell({"row": row})
        except ImportError as error:
            tell({"row": {"not run": str(error)}})
        except Exception as error:  # keep the figures of the other cases
            traceback.print_exc()
            failed = True
            first_line = (str(error).splitlines() or [""])[0]
            tell({"row": {"failed": f"{type(error).__name__}: {first_line}"}})
        tell({"end": case.name})
        if failed and broken():
            print("The device is in an error state: another process goes on.", file=sys.stderr, flush=True)
            return BROKEN
    return 0


def main(stage: str, skip: str, pipe: int) -> int:
    """Run the cases of a stage, as its parent asks. Ends the process, or returns an exit status if none can run."""
    import pydeq
    from benchmarks.device import clock

    facts = pydeq.kernels()
    if not facts.cuda:
        print(f"no CUDA kernels run here: {facts.cuda_reason}", file=sys.stderr)
        return 1
    cases = importlib.import_module(f"benchmarks.device.{stage}").cases()
    # Each capture of a graph runs the garbage collector, which visits all imported objects.
    gc.collect()
    gc.freeze()
    status = work(cases, skip.split(","), pipe, clock.is_broken)
    sys.stdout.flush()
    os._exit(status)  # torch's own exit would use a device that may be broken, and could hang
