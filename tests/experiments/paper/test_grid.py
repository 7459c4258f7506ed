"""Trainings that are measured once, go on where they were interrupted, and do not take each other down."""

import json
import os
import signal
from dataclasses import replace

import pytest

pytest.importorskip("safetensors", reason="the requirements of training are not installed")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

from experiments.paper import Grid, GridError, recipes_of
from experiments.paper import grid as grid_module
from experiments.paper.measurement import FILE, load
from experiments.paper.worker import measure

IMAGES = recipes_of("smoke", "cpu").images


@pytest.fixture
def training():
    return IMAGES.training()


def numbers(measurement):
    """All that does not depend on the clock."""
    rows = [{key: value for key, value in row.flat().items() if key != "seconds"} for row in measurement.evaluations]
    return measurement.key, measurement.status, measurement.steps, measurement.test, rows


def interrupted_at(step):
    """A listener that interrupts after a checkpoint."""

    def tell(message):
        # The row of a step is told before its checkpoint is written.
        if message.kind == "evaluated" and message.content[0].step > step:
            raise KeyboardInterrupt

    return tell


def test_a_training_is_measured_once(tmp_path, training, monkeypatch, capsys):
    first = Grid(tmp_path).measure({"it": training})
    measurement = first[training.key]
    assert measurement.status == "finished"
    assert measurement.steps == training.config.steps
    assert set(measurement.test.stops) == set(training.stops)
    assert measurement.at(3) == 100.0 * measurement.test.stops[3]
    assert [row.step for row in measurement.evaluations] == [3, 6, 9, 12]
    assert measurement.environment["device"] == "cpu"
    assert measurement.environment["threads"] == 1
    out = capsys.readouterr().out
    assert "[0/1] it: step 12/12" in out
    assert "[1/1] it: measured" in out

    def refuse(*arguments):
        raise AssertionError("measured a second time")

    monkeypatch.setattr(grid_module, "measure", refuse)
    again = Grid(tmp_path).measure({"another name": training, "it": training})
    assert numbers(again[training.key]) == numbers(measurement)
    assert capsys.readouterr().out == ""


def test_measurements_of_another_run_are_taken(tmp_path, training, monkeypatch):
    other = training.with_seed(1)
    first = Grid(tmp_path / "first").measure({"it": training})[training.key]
    weights = (Grid(tmp_path / "first").folder(training) / "model.safetensors").read_bytes()
    grid = Grid(tmp_path / "second", reuse=[tmp_path / "first"])
    assert set(grid.find({"it": training, "other": other})) == {training.key}
    assert not (tmp_path / "second").exists()
    trained = []

    def counted(training, *arguments):
        trained.append(training.key)
        return measure(training, *arguments)

    monkeypatch.setattr(grid_module, "measure", counted)
    found = grid.measure({"it": training, "other": other})
    assert trained == [other.key]
    assert numbers(found[training.key]) == numbers(first)
    assert found[training.key].folder == grid.folder(training)
    assert (grid.folder(training) / "model.safetensors").read_bytes() == weights
    assert not (grid.folder(training) / "checkpoints").exists()
    # Now it does not need the other run.
    assert numbers(Grid(tmp_path / "second").find({"it": training})[training.key]) == numbers(first)


def test_a_damaged_measurement_of_another_run_is_refused(tmp_path, training):
    path = Grid(tmp_path / "first").folder(training) / FILE
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"measurement\.json is damaged"):
        Grid(tmp_path / "second", reuse=[tmp_path / "first"]).measure({"it": training})
    assert not (tmp_path / "second").exists()


def test_an_interrupted_training_goes_on_to_the_same_numbers(tmp_path, training):
    expected = Grid(tmp_path / "whole").measure({"it": training})[training.key]
    grid = Grid(tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        measure(training, grid.folder(training), 1, interrupted_at(6))
    assert grid.find({"it": training}) == {}
    with pytest.raises(
        FileExistsError, match=r"broken has trainings that were interrupted: it: resume them \(--resume\)"
    ):
        grid.measure({"it": training})
    assert numbers(Grid(tmp_path / "broken", resume=True).measure({"it": training})[training.key]) == numbers(expected)


def test_one_that_was_interrupted_before_its_first_checkpoint_starts_again(tmp_path, training):
    training = replace(training, config=training.config.with_values({"checkpoint.every_steps": 100}))
    grid = Grid(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        measure(training, grid.folder(training), 1, interrupted_at(3))
    assert (grid.folder(training) / "best.safetensors").is_file()
    assert not (grid.folder(training) / "checkpoints").exists()
    rows = grid.measure({"it": training})[training.key].evaluations
    assert [row.step for row in rows] == [3, 6, 9, 12]


def test_one_that_fails_leaves_the_others(tmp_path, training):
    missing = replace(training, config=training.config.with_values({"data.name": str(tmp_path / "nothing")}))
    with pytest.raises(GridError, match=r"1 of 2 trainings failed: bad: .*nothing"):
        Grid(tmp_path).measure({"bad": missing, "good": training})
    assert list(Grid(tmp_path).find({"bad": missing, "good": training})) == [training.key]


def test_two_processes_give_the_numbers_of_one(tmp_path, training):
    trainings = {"one": training, "two": training.with_seed(1), "bad": replace(training, stops=(10**9,), test_batch=-1)}
    with pytest.raises(GridError, match="1 of 3 trainings failed: bad: "):
        Grid(tmp_path / "two", jobs=2).measure(trainings)
    found = Grid(tmp_path / "two").find(trainings)
    expected = Grid(tmp_path / "one").measure({"two": trainings["two"]})
    assert set(found) == {trainings[name].key for name in ("one", "two")}
    for key, measurement in expected.items():
        assert numbers(found[key]) == numbers(measurement)


def suicide(training, folder, threads, queue):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_was_killed_is_reported(tmp_path, training, monkeypatch):
    monkeypatch.setattr(grid_module, "work", suicide)
    with pytest.raises(GridError, match="it: its process ended with exit status -9"):
        Grid(tmp_path, jobs=2).measure({"it": training})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:100], "damaged: .*; remove it to measure again"),
        (lambda text: text.replace('"status"', '"state"'), "damaged: "),
        (lambda text: text.replace(json.loads(text)["key"], "0" * 16), "is of the training 0000000000000000, not "),
    ],
)
def test_a_damaged_measurement_is_refused(tmp_path, training, damage, message):
    folder = Grid(tmp_path).folder(training)
    measure(training, folder, 1, lambda message: None)
    path = folder / FILE
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=message) as error:
        Grid(tmp_path).measure({"it": training})
    assert str(path) in str(error.value)


def test_an_older_formats_measurement_is_none(tmp_path, training):
    (tmp_path / FILE).write_text('{"format": 0}')
    assert load(tmp_path, training) is None
