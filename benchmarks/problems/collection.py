"""All sets of problems, by family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from benchmarks.problems import burkardt, cells, maps, more, no_fixed_point, scipy_tests, sizes, spectra
from benchmarks.problems.base import Problem

FAMILIES: dict[str, Callable[[], Iterable[Problem]]] = {
    "burkardt": burkardt.family,
    "burkardt.given": partial(burkardt.family, given=True),
    "more": more.family,
    "more.given": partial(more.family, given=True),
    "scipy": scipy_tests.family,
    "scipy.given": partial(scipy_tests.family, given=True),
    "radius": maps.family,
    "spectra": spectra.family,
    "runaway": no_fixed_point.runaway,
    "false_friends": no_fixed_point.false_friends,
    "cycles": no_fixed_point.cycles,
    "sizes": sizes.family,
    "cell": cells.cells,
    "adjoint": cells.adjoints,
}


def may_exist(name: str) -> bool:
    """Whether ``name`` is a family or fits the beginning of one; no problem is made to find out."""
    return name == "all" or any(name[: len(family)] == family[: len(name)] for family in FAMILIES)


def problems(names: Sequence[str] | None = None) -> list[Problem]:
    """The problems of the named families, each once, in the order of ``FAMILIES``.

    Args:
        names: A family, or the beginning of keys, such as ``more.chebyquad``. None, or "all" among them, means all.

    Raises:
        ValueError: If a name fits nothing.
    """
    if names is None or "all" in names:
        return [problem for family in FAMILIES.values() for problem in family()]
    found: list[Problem] = []
    unused = set(names)
    for family, make in FAMILIES.items():
        # Keys begin with their family, so other families need not be made.
        prefixes = [name for name in names if name not in FAMILIES and name[: len(family)] == family[: len(name)]]
        if family not in names and not prefixes:
            continue
        for problem in make():
            fitting = {name for name in prefixes if problem.key.startswith(name)}
            unused -= fitting
            if family in names or fitting:
                found.append(problem)
    unused -= FAMILIES.keys()
    if unused:
        raise ValueError(f"expected families or beginnings of keys, got {sorted(unused)}; families: {list(FAMILIES)}")
    return found
