"""benchmarks/device.py as far as it runs without a GPU: parts run on the CPU, and none loses another's figures."""

from __future__ import annotations

import json
import sys
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


def test_a_part_that_fails_loses_nothing(tmp_path, monkeypatch, capsys):
    def fine(peers):
        return [{"figure": 1.5}]

    def broken(peers):
        raise ValueError("no figure")

    def absent(peers):
        raise ImportError("No module named 'jax'")

    monkeypatch.setattr(device, "PARTS", (fine, broken, absent))
    monkeypatch.setattr(device, "environment", lambda peers: {"device": "none"})
    monkeypatch.setattr(device.pydeq, "kernels", lambda: SimpleNamespace(cuda=True))
    monkeypatch.setattr(sys, "argv", ["device", "--out", str(tmp_path / "out")])
    assert device.main() == 1
    assert json.loads((tmp_path / "out" / "device.json").read_text()) == {
        "environment": {"device": "none"},
        "fine": [{"figure": 1.5}],
        "broken": "failed: ValueError: no figure",
        "absent": "not run: No module named 'jax'",
    }
    monkeypatch.setattr(sys, "argv", ["device", "--out", str(tmp_path / "out"), "--seconds", "0"])
    assert device.main() == 0
    assert "not run: no time was left" in (tmp_path / "out" / "device.json").read_text()


def test_refuses_to_run_without_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        device.pydeq, "kernels", lambda: SimpleNamespace(cuda=False, cuda_reason="torch finds no GPU here")
    )
    monkeypatch.setattr(sys, "argv", ["device", "--out", str(tmp_path)])
    assert device.main() == 1
    assert "torch finds no GPU here" in capsys.readouterr().err
