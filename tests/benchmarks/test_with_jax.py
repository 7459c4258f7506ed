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
    environment = os.environ | {"PYDEQ_TEST_JAX": "1", "JAX_PLATFORMS": "cpu"}
    arguments = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(Path(__file__).parent)]
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5_000:] + result.stderr[-5_000:]
    assert " passed" in result.stdout
