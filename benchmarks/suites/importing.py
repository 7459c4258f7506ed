"""The time that importing a library adds to ``import torch``, in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

from benchmarks.results import number
from benchmarks.suites.base import BASELINE, Context
from benchmarks.timing import alternate, ratios, spread

LIMIT = 0.2

_PROGRAM = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import {name}
print(middle - start, time.perf_counter() - middle)
"""


def run(context: Context) -> None:
    context.bar.start(context.profile.import_repeats + 1)
    torch_seconds: list[float] = []
    # Bytecode is kept, as after an installation.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def import_time(name: str) -> Callable[[], float]:
        def measure() -> float:
            command = (sys.executable, "-c", _PROGRAM.format(name=name))
            output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
            first, second = output.split()
            torch_seconds.append(float(first))
            return float(second)

        return measure

    # The first round writes bytecode, brings the files into the page cache, and is discarded.
    measured = alternate(
        {name: import_time(name) for name in context.peers}, context.profile.import_repeats, tick=context.bar.advance
    )
    context.results.figure("import.torch", spread(torch_seconds[len(context.peers) :]), "s")
    for name, values in measured.items():
        context.results.figure(f"import.{name}", spread(values), "s")
    for name in context.others:
        context.results.figure(f"import.{name}_over_{BASELINE}", ratios(measured[name], measured[BASELINE]), "1")
    rows = [
        (name, number(spread(values).median), f"{number(min(values))} to {number(max(values))}")
        for name, values in measured.items()
    ]
    context.results.table(
        "import",
        "Time that an import adds to import torch",
        ("library", "seconds", "smallest to largest"),
        rows,
        f"In fresh processes, alternating; import torch itself took {number(spread(torch_seconds).median)} s.",
    )
    context.results.target(
        "import.pydeq",
        "import pydeq, in addition to import torch",
        "<=",
        LIMIT,
        spread(measured[BASELINE]).median,
        "s",
    )
