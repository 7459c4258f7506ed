"""benchmarks/device.py as far as it runs without a GPU: parts run on the CPU, and none loses another's figures."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import device


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.setattr(device, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(device, "SHAPES", ((2, 33),))
    monkeypatch.setattr(device, "SOLVED", ((2, 8),))
    monkeypatch.setattr(device, "TRAINED", ((2, 8),))
    return device.load_peers()


def test_measures_every_peer(cpu):
    assert "pydeq" in cpu
    for row in device.overhead(cpu):
        assert {f"{name} us" for name in cpu} <= set(row)
    for part in (device.solve, device.training):
        for row in part(cpu):
            assert all(row[f"{name} ms"] > 0.0 for name in cpu)


def test_optimistix_stands_beside(cpu):
    pytest.importorskip("optimistix", reason="JAX and optimistix are not installed")
    versions, overhead, solve = device.optimistix(cpu)
    assert versions["optimistix"]
    assert overhead["jax f us"] > 0.0
    # Both stop at the first residual below the tolerance: over the batch there, of each sample here.
    assert max(solve["pydeq residual"], solve["optimistix residual"]) < 3 * device.RTOL


FINE, BROKEN, ABSENT = [{"figure": 1.5}, {"figure": 2.5}], {"failed": "ValueError: no figure"}, {"not run": "no jax"}


@pytest.fixture
def parts(tmp_path, monkeypatch, cpu):
    """Three parts without a GPU: a function that runs them, and returns its status and the figures."""

    def fine(peers):
        yield from FINE

    def broken(peers):
        yield FINE[0]
        raise ValueError("no figure")

    def absent(peers):
        raise ImportError("no jax")

    monkeypatch.setattr(device, "PARTS", (fine, broken, absent))
    monkeypatch.setattr(device, "environment", lambda peers: "none")
    monkeypatch.setattr(device.pydeq, "kernels", lambda: SimpleNamespace(cuda=True))

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["device", "--out", str(tmp_path), *arguments])
        return device.main(), json.loads((tmp_path / "device.json").read_text())

    return main


def test_a_part_that_fails_loses_nothing(parts):
    expected = {"environment": "none", "fine": FINE, "broken": [FINE[0], BROKEN], "absent": [ABSENT]}
    assert parts() == (1, expected)


def test_nothing_is_measured_when_the_time_is_over(parts):
    status, figures = parts("--seconds", "0")
    assert status == 0
    late = [{"not run": "no time was left"}]
    assert figures == {"environment": "none", "fine": late, "broken": late, "absent": [ABSENT]}


def test_after_a_fault_the_parts_that_are_left_run_in_another_process(parts, monkeypatch):
    def fault():
        raise RuntimeError("CUDA error: misaligned address")

    def call(command):
        assert command[:3] == [sys.executable, "-m", "benchmarks.device"]
        monkeypatch.setattr(device, "synchronize", lambda: None)
        begun.append(parts(*command[5:]))
        return begun[-1][0]

    begun: list = []
    monkeypatch.setattr(device, "synchronize", fault)
    monkeypatch.setattr(device.subprocess, "call", call)
    status, figures = parts()
    assert len(begun) == status == 1
    assert figures == {"environment": "none", "fine": FINE, "broken": [FINE[0], BROKEN], "absent": [ABSENT]}


def test_refuses_to_run_without_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        device.pydeq, "kernels", lambda: SimpleNamespace(cuda=False, cuda_reason="torch finds no GPU here")
    )
    monkeypatch.setattr(sys, "argv", ["device", "--out", str(tmp_path)])
    assert device.main() == 1
    assert "torch finds no GPU here" in capsys.readouterr().err


def test_counts_the_kernels_by_their_names():
    text = (Path(device.__file__).parent.parent / "csrc" / "common" / "step.cuh").read_text()
    names = re.findall(r"^(step_\w+_kernel)\(", text, flags=re.MULTILINE)
    assert len(names) == 3
    assert all(map(device.STEP_KERNEL.search, names))
