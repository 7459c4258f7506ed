"""Choose the best settings of each solver: ``python -m benchmarks.peers.search [library ...]``.

Each solver tries its grid on a few training problems, whose seeds no suite uses. Its cost is the geometric mean of
evaluations and products until a problem is solved; three times the cap where it is not. Of settings that cost the
same, the library's defaults win, unless others take less than two thirds of their time. The contenders named ``best``
have the settings that this prints.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any

from benchmarks.peers import REQUIREMENTS, Contender, Counts, contenders
from benchmarks.problems.base import Problem
from benchmarks.problems.maps import symmetric_linear, tanh_map

CAP = 200
TRAINING: tuple[Problem, ...] = tuple(
    dataclasses.replace(problem, max_calls=CAP)
    for problem in (
        tanh_map(64, 0.6, seed=101, batch=4),
        tanh_map(64, 0.95, seed=102, batch=4),
        tanh_map(64, 1.5, seed=103, batch=4),
        symmetric_linear(seed=104, rho=0.95, batch=4),
    )
)


def cost(contender: Contender) -> tuple[float, float]:
    """The geometric mean over the training problems of what a solution costs, and the seconds of all solves."""
    total = seconds = 0.0
    for problem in TRAINING:
        spent = 3 * CAP
        for tighten in (1.0, 0.1, 0.01):
            counts, begin = Counts(), time.perf_counter()
            try:
                claim = contender.prepare(problem, tighten, counts)()
            except Exception:  # whatever a library raises: these settings fail
                break
            seconds += time.perf_counter() - begin
            if (problem.excess(claim.value) <= 1.0).all():
                spent = counts.evaluations + counts.products
                break
        total += math.log(spent)
    return math.exp(total / len(TRAINING)), seconds


def search(key: str, default: Contender, grid: list[Mapping[str, Any]]) -> None:
    """Print the cost of the defaults, and the best settings with theirs."""
    settings = [{}, *grid]
    costs = [cost(dataclasses.replace(default, settings=chosen)) for chosen in settings]
    least = min(each for each, _ in costs)
    equal = [i for i, (each, _) in enumerate(costs) if each <= 1.001 * least]
    fastest = min(equal, key=lambda i: costs[i][1])
    best = fastest if costs[fastest][1] < 2 / 3 * costs[equal[0]][1] else equal[0]
    print(f"{key:34} default {costs[0][0]:6.1f}   best {costs[best][0]:6.1f}   {settings[best]}", flush=True)


def main() -> None:
    warnings.simplefilter("ignore")
    found, notices = contenders(sys.argv[1:] or None)
    for notice in notices:
        print(notice)
    by_key = {contender.key: contender for contender in found}
    for name in {contender.library: None for contender in found}:
        assert name in REQUIREMENTS
        module = importlib.import_module(f"benchmarks.peers.{name}")
        for key, grid in getattr(module, "GRIDS", {}).items():
            search(key, by_key[f"{key}.default"], list(grid))


if __name__ == "__main__":
    main()
