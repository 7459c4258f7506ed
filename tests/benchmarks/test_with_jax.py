"""The tests of this folder that need JAX."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_with_jax() -> None:
    if importlib.util.find_spec("jax") is None:
        pytest.skip("JAX is not installed: pip install -r requirements/peers.txt")
    # Most of the time goes into compiling, and hardly any of it into what is compiled.
    quick = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    environment = os.environ | quick | {"PYDEQ_TEST_JAX": "1"}
    arguments = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(Path(__file__).parent)]
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5_000:] + result.stderr[-5_000:]
    assert " passed" in result.stdout
