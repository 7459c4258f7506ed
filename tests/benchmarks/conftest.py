"""JAX in a process of its own: it starts threads, and a process that has it must not fork, as other tests do."""

from __future__ import annotations

import os

import pytest

IN_CHILD = "PYDEQ_TEST_JAX"


@pytest.fixture(scope="session")
def jax():
    """JAX. Tests that use it run in the process that test_with_jax.py starts."""
    return pytest.importorskip("jax")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    child = IN_CHILD in os.environ
    here = [item for item in items if item.path.parent == config.rootpath / "tests" / "benchmarks"]
    out = [item for item in here if ("jax" in getattr(item, "fixturenames", ())) is not child]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]
