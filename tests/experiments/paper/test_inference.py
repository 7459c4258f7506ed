"""Trained models with another solver, and the time of a batch."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("safetensors", reason="the requirements of training are not installed")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

import torch
from measurements import measured

from benchmarks.timing import Spread
from experiments import training
from experiments.data import normalize
from experiments.paper import EXPERIMENTS, Grid, inference, recipes_of
from experiments.paper.batch_times import batch_times
from experiments.paper.recipes import PENALIZED, PLAIN
from experiments.training.distribution import Distribution
from experiments.training.tasks import task_of
from pydeq.models import build


@pytest.fixture(scope="module")
def smoke():
    return recipes_of("smoke", "cpu")


@pytest.fixture(scope="module")
def trained(smoke, tmp_path_factory):
    """The measurements of both trainings, from their folders."""
    trainings = EXPERIMENTS["inference"].trainings(smoke, 1)
    found = Grid(tmp_path_factory.mktemp("grid")).measure({label: each for label, (each,) in trainings.items()})
    return {label: [found[each.key]] for label, (each,) in trainings.items()}


@pytest.fixture
def times(monkeypatch):
    """Inference takes 10, 4, 6 and 3 ms, a training step 20 and 25 ms."""
    solves = [f"inference, {label}{end}" for label in (PLAIN, PENALIZED) for end in ("", ", stopped at 3")]
    steps = [f"training step, {label}" for label in (PLAIN, PENALIZED)]
    made = [
        {name: Spread(ms, ms - 0.5, ms + 0.5, 9) for name, ms in zip(names, times, strict=True)}
        for names, times in ((solves, (10.0, 4.0, 6.0, 3.0)), (steps, (20.0, 25.0)))
    ]
    monkeypatch.setattr(inference, "batch_times", lambda *_: tuple(made))


@pytest.mark.usefixtures("times")
def test_the_trained_models_are_tested_with_anderson(smoke, trained):
    report = EXPERIMENTS["inference"].report(smoke, trained)
    (table, _) = report.tables
    rows = {row.label: row.entries for row in table.rows}
    for label, (measurement,) in trained.items():
        config = training.training_config_from_mapping(measurement.config)
        model = build(config.with_values({"model.solver.forward": "anderson"}).model)
        model.load_state_dict(training.load(measurement.folder).state_dict())
        distribution = Distribution("none", "cpu")
        source = task_of(config)(config, distribution).source
        for stop, entry in zip(smoke.images.stops, rows[f"{label}, Anderson"], strict=False):
            hits = 0
            for samples in source.evaluation("test", 100):
                x = normalize(samples.images, source.statistics.mean, source.statistics.std)
                with torch.no_grad():
                    hits += int((model.eval()(x, max_steps=stop).argmax(1) == samples.labels).sum())
            assert entry.number == pytest.approx(hits, abs=1.01)  # of 100; a tie may round otherwise
        assert rows[f"{label}, Broyden"][0].number == 100 * measurement.test.stops[1]
        # It is kept, and not tested again.
        path = measurement.folder / "test-anderson.json"
        content = json.loads(path.read_text())
        assert content["test"]["stop_residuals"]["3"] != measurement.test.stop_residuals[3]  # that of Broyden's method
        content["test"]["stops"]["3"] = 0.125
        path.write_text(json.dumps(content))
        again = EXPERIMENTS["inference"].report(smoke, trained).tables[0]
        assert {row.label: row.entries for row in again.rows}[f"{label}, Anderson"][2].number == 12.5
        path.write_text("{")
        with pytest.raises(ValueError, match=r"test-anderson\.json is damaged"):
            EXPERIMENTS["inference"].report(smoke, trained)
        path.unlink()


@pytest.mark.usefixtures("times")
def test_where_a_training_diverged_nothing_is_timed(smoke):
    trainings = EXPERIMENTS["inference"].trainings(smoke, 1)
    found = {label: [measured(each, None)] for label, (each,) in trainings.items()}
    report = EXPERIMENTS["inference"].report(smoke, found)
    assert {each.shown for each in report.claims} == {None}
    assert "diverged" in str(report.tables[0])


@pytest.mark.usefixtures("times")
def test_claims_of_known_numbers(smoke, monkeypatch):
    trainings = EXPERIMENTS["inference"].trainings(smoke, 1)
    found = {label: [measured(each, 0.9, {3: 0.80})] for label, (each,) in trainings.items()}
    other = {label: measured(each, 0.9, {3: 0.79}).test for label, (each,) in trainings.items()}
    monkeypatch.setattr(inference, "_by_anderson", lambda each, of: other[PLAIN])
    monkeypatch.setattr(inference, "load", lambda folder: None)
    found = {label: [replace(each, folder=Path("anywhere"))] for label, (each,) in found.items()}
    claims = {each.name: each for each in EXPERIMENTS["inference"].report(smoke, found).claims}
    assert {name: each.shown for name, each in claims.items()} == {
        "inference.anderson": False, "inference.time": True, "inference.training_time": False,
    }  # fmt: skip
    assert claims["inference.anderson"].measured["difference"] == pytest.approx(-1.0)
    assert claims["inference.time"].measured["ratio"] == pytest.approx(10 / 3)
    assert claims["inference.training_time"].measured["ratio"] == pytest.approx(0.8)


def test_times_are_of_the_models_at_their_caps_and_leave_no_gradients(smoke, trained):
    models = {label: training.load(group[0].folder) for label, group in trained.items()}
    seen = {label: [] for label in models}
    for label, model in models.items():
        model.deq.register_forward_hook(lambda *arguments, to=seen[label]: to.append(arguments[2][1].nfe))
    configs = {PLAIN: smoke.images.plain, PENALIZED: smoke.images.penalized}
    solves, steps = batch_times(models, configs, 3)
    names = [f"inference, {label}{end}" for label in (PLAIN, PENALIZED) for end in ("", ", stopped at 3")]
    assert list(solves) == names
    assert list(steps) == [f"training step, {label}" for label in (PLAIN, PENALIZED)]
    assert set(seen[PLAIN]) == {6, 3}
    assert set(seen[PENALIZED]) == {4, 3}
    assert all(0 < each.low <= each.median <= each.high for group in (solves, steps) for each in group.values())
    assert all(parameter.grad is None for model in models.values() for parameter in model.parameters())
