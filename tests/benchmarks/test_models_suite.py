"""Whole models with their solves exchanged: the same function, and counted alike."""

from __future__ import annotations

import pytest
import torch

import pydeq
from benchmarks import peers
from benchmarks.profiles import PROFILES
from benchmarks.progress import SILENT
from benchmarks.results import Results
from benchmarks.suites import models
from benchmarks.suites.base import Context
from pydeq.models import ConvDEQ, ConvDEQConfig, SolverConfig

PEERS, _ = peers.load()


def _tiny(rtol: float = 1e-6, max_steps: int = 60):
    solver = SolverConfig(
        forward="broyden", backward="broyden", rtol=rtol, max_steps=max_steps, backward_rtol=rtol,
        backward_max_steps=max_steps,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ConvDEQ(
        ConvDEQConfig(image_channels=1, classes=3, channels=8, inner=8, groups=2, stride=2, solver=solver)
    ).double()
    images = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    return model, lambda: model(images).square().sum()


@pytest.mark.parametrize("name", list(PEERS))
def test_an_exchanged_model_has_the_same_loss_and_gradients(name):
    model, loss = _tiny(rtol=1e-9)
    own = loss()
    expected = torch.autograd.grad(own, list(model.parameters()))
    with models.solved_by(PEERS[name], model):
        other = loss()
        found = torch.autograd.grad(other, list(model.parameters()))
    torch.testing.assert_close(other, own, rtol=1e-6, atol=1e-8)
    for ours, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6)
    assert isinstance(model.deq, pydeq.DEQ)


def test_settings_are_those_of_the_layer():
    model, _ = _tiny(1e-4, 17)
    settings = models.settings_of(model.deq)
    assert (settings.method.solver, settings.rtol, settings.max_calls) == ("broyden", 1e-4, 17)
    assert (settings.adjoint_rtol, settings.adjoint_max_calls) == (1e-4, 17)
    with pytest.raises(ValueError, match="must solve its adjoint as itself"):
        models.settings_of(pydeq.DEQ(torch.nn.Identity(), solver=pydeq.Anderson(), rtol=1e-3))


@pytest.mark.filterwarnings("ignore:the forward solve of a pydeq.DEQ")
def test_the_suite_reports_every_side(monkeypatch):
    monkeypatch.setattr(models, "CASES", (models.Case("tiny", "tiny", lambda device: _tiny(1e-3, 8)),))
    context = Context(PROFILES["smoke"], PEERS, Results({}), SILENT, (1,))
    models.run(context)
    value = context.results.value
    for kind in ("train", "inference"):
        for name in PEERS:
            assert value(f"models.tiny.{kind}.{name}.time") > 0
            assert 1 <= value(f"models.tiny.{kind}.{name}.evaluations") <= 10
            assert value(f"models.tiny.{kind}.{name}.memory") > 0
    assert {target.name for target in context.results.targets} == {"models.each"}
