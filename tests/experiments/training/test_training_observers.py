"""Who is told of a training: tables, pictures, TensorBoard, a terminal."""

import builtins
import csv
import io
import math
import re

import pytest
import torch
from small_trainings import small

from experiments import training
from experiments.training.distribution import Distribution
from experiments.training.history import EvaluationRow, History, StepRow
from experiments.training.progress import ProgressBar, describe, describe_step
from experiments.training.trainer import Trainer


def missing(monkeypatch, package):
    """As if a package were not installed."""
    real = builtins.__import__

    def fail(name, *arguments):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", fail)


def test_tables_have_every_row(tmp_path):
    result = training.train(small("conv"), out=tmp_path)
    with (tmp_path / "steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(result.history.steps) == 4  # each second step, and with each evaluation
    for row, expected in zip(rows, result.history.steps, strict=True):
        for name, value in vars(expected).items():
            assert row[name] == ("" if value is None else str(value))  # all digits
    with (tmp_path / "evaluations.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["3", "6"]
    for row, expected in zip(rows, result.history.evaluations, strict=True):
        assert row == {key: "" if value is None else str(value) for key, value in expected.flat().items()}
        assert float(row["metric@3"]) == expected.stops[3]
        assert float(row["train_loss"]) > 0.0


def test_evaluations_have_the_means_of_the_steps_since_the_one_before():
    config = small("mlp", logging__every_steps=1, pretraining__steps=0, penalty__frequency=1.0)
    history = training.train(config).history
    for i, row in enumerate(history.evaluations):
        steps = history.steps[3 * i : 3 * i + 3]
        for name in ("loss", "penalty", "nfe", "residual", "backward_nfe", "backward_residual"):
            mean = sum(getattr(step, name) for step in steps) / 3
            assert getattr(row, f"train_{name}") == pytest.approx(mean)


@pytest.mark.parametrize("model", ["mlp", "transformer"])
def test_rows_have_the_shares_of_samples_that_converged(model):
    config = small(model, logging__every_steps=1, evaluation__every_steps=1, penalty__strength=0.0, steps=4,
                   model__solver__rtol=0.05, model__solver__backward_rtol=0.005, model__solver__max_steps=6,
                   model__solver__backward_max_steps=4)  # fmt: skip
    each = Trainer(config, Distribution("none", "cpu"), [], None)
    solutions, scored = [], []
    loss, evaluate, evaluation_of = each.task.loss, each.task.evaluate, each.evaluate

    def watched_loss(*arguments, **options):
        found = loss(*arguments, **options)
        solutions.append(found[1])
        return found

    def watched_evaluate(wrapped, split, **options):
        for score, solution in evaluate(wrapped, split, **options):
            if not options:  # at the model's own cap
                scored[-1].append(solution.converged)
            yield score, solution

    def watched_evaluation(*arguments):
        scored.append([])
        return evaluation_of(*arguments)

    each.task.loss, each.task.evaluate, each.evaluate = watched_loss, watched_evaluate, watched_evaluation
    history = each.run().history
    assert history.steps[0].converged is None  # a shallow step
    assert history.steps[0].backward_converged is None
    shares = []
    for row, solution, evaluation, found in zip(history.steps, solutions, history.evaluations, scored, strict=False):
        if row.step > 1:
            assert row.converged == pytest.approx(float(solution.converged.double().mean()))
            assert row.backward_converged == pytest.approx(float(solution.backward.converged.double().mean()))
            shares += [row.converged, row.backward_converged]
        assert evaluation.train_converged == row.converged
        assert evaluation.train_backward_converged == row.backward_converged
        assert evaluation.converged == pytest.approx(float(torch.cat(found).double().mean()))
        assert f"converged {evaluation.converged:.0%}" in describe(evaluation, "accuracy")
    assert any(0.0 < share < 1.0 for share in shares)
    row = history.steps[-1]
    assert f"  converged {row.converged:.0%}, backward {row.backward_converged:.0%}  " in describe_step(row)
    assert "converged" not in describe_step(history.steps[0])


def test_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    training.train(small("transformer", logging__plot=True), out=tmp_path)
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_of_what_there_may_be(tmp_path):
    pytest.importorskip("matplotlib")
    from experiments.training.plots import plot_history

    row = StepRow(1, 0, math.nan, 0.0, 0.1, 0.0, 3.0, 0.0, None, None, None, None, 1.0)
    seen = EvaluationRow(math.inf, 0.5, 3.0, 0.1, stops={2: 0.25}, step=1)
    for i, history in enumerate((History(), History([row]), History([row], [seen]))):
        plot_history(history, "accuracy", tmp_path / f"{i}.svg")
        assert "<svg" in (tmp_path / f"{i}.svg").read_text()


def test_without_matplotlib_there_is_a_notice_and_no_picture(tmp_path, monkeypatch):
    missing(monkeypatch, "matplotlib")
    stream = io.StringIO()
    training.train(small("mlp", logging__plot=True), out=tmp_path, observers=[ProgressBar(stream)])
    assert "notice: there is no plot without matplotlib: pip install matplotlib" in stream.getvalue()
    assert not (tmp_path / "training.png").exists()


def test_tensorboard_gets_every_row(tmp_path):
    pytest.importorskip("tensorboard")
    result = training.train(small("mlp", logging__tensorboard=True), out=tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = log.Scalars("train/loss")
    assert [event.step for event in losses] == [row.step for row in result.history.steps]
    for event, row in zip(losses, result.history.steps, strict=True):
        assert event.value == pytest.approx(row.loss, rel=1e-6)
    assert [event.step for event in log.Scalars("validation/metric_at_3")] == [3, 6]
    assert "validation/train_loss" not in log.Tags()["scalars"]


def test_what_a_training_logged_before_it_started_again_is_not_shown(tmp_path):
    pytest.importorskip("tensorboard")

    class StoppedError(Exception):
        pass

    class Stopping(training.Observer):
        def stepped(self, row):
            if row.step == 4:
                raise StoppedError

    config = small("mlp", logging__tensorboard=True, evaluation__every_steps=6, checkpoint__every_steps=6)
    with pytest.raises(StoppedError):
        training.train(config, out=tmp_path, observers=[Stopping()])
    training.train(config.with_values({"seed": 1}), out=tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in log.Scalars("train/loss")] == [2, 4, 6]


def test_without_tensorboard_the_error_says_what_to_do(tmp_path, monkeypatch):
    missing(monkeypatch, "tensorboard")
    with pytest.raises(ModuleNotFoundError, match=r"pip install tensorboard, or set it to false"):
        training.train(small("mlp", logging__tensorboard=True), out=tmp_path)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    result = training.train(small("mlp"), observers=[ProgressBar(stream)])
    lines = stream.getvalue().splitlines()
    assert lines[0] == "training ImplicitMLP on synthetic_images: 6 steps"
    assert [line.split()[1] for line in lines[1:-1]] == ["2/6", "3/6", "3/6", "4/6", "6/6", "6/6"]
    assert f"accuracy {result.test.metric:.2%}" in lines[-1]
    assert lines[-1].startswith("finished; test: loss ")
    assert "accuracy at a stop of 1: " in lines[-1]
    assert "\x1b" not in stream.getvalue()


def test_lines_are_printed_as_they_are():
    stream = io.StringIO()
    text = "[bold]a name[/bold] of :smile: " + "and many words " * 20
    ProgressBar(stream).noticed(text)
    assert stream.getvalue() == f"notice: {text}\n"


def test_a_bar_on_a_terminal():
    stream = Terminal()
    training.train(small("mlp"), observers=[ProgressBar(stream)])
    text = stream.getvalue()
    assert "training ImplicitMLP on synthetic_images" in text
    assert "finished; test: loss" in text
    assert "6/6" in text
    assert "step 2/6" not in text  # in the bar, not a line
    assert "\x1b[2K" in text


def test_the_bar_and_the_time_left_fit_in_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    bar = ProgressBar(stream)
    bar.began(small(), History(), 0, 300000, "accuracy")
    bar.advanced(120)
    row = StepRow(120, 3, 2.3412, 0.01, 1e-3, 0.1, 11.9, 1e-3, 8.0, 1e-4, None, None, 1.0, 0.98, 0.96)
    bar.stepped(row)
    bar.ended("finished", None)
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    last = [line for line in re.split(r"[\r\n]+", drawn) if "120/300000" in line][-1]
    assert len(last) <= 80
    assert re.fullmatch(r" *━{16} +120/300000 [-\d]+:[-\d]{2}:[-\d]{2} loss 2.3412  converged 98%, backward.*…", last)


def test_the_folder_is_named_at_the_end(tmp_path):
    stream = io.StringIO()
    training.train(small("mlp"), out=tmp_path, observers=[ProgressBar(stream, tmp_path)])
    assert stream.getvalue().splitlines()[-1] == f"results are in {tmp_path}"


def test_a_result_prints_a_line(tmp_path):
    result = training.train(small("mlp"), out=tmp_path)
    accuracy = f"{result.test.metric:.2%}"
    assert repr(result) == f"Result(finished after 6 steps, test accuracy {accuracy}, in {tmp_path})"
    result = training.train(small("transformer"))
    assert str(result) == f"Result(finished after 6 steps, test perplexity {result.test.metric:.2f})"
    result.test = None
    assert repr(result) == "Result(finished after 6 steps)"


def test_a_bar_lets_go_of_the_terminal_after_an_error():
    class Broken(training.Observer):
        def advanced(self, step):
            raise RuntimeError("broken")

    bar = ProgressBar(Terminal())
    with pytest.raises(RuntimeError, match="broken"):
        training.train(small("mlp"), observers=[bar, Broken()])
    assert not bar.bars.live.is_started


def test_perplexity_is_no_percentage():
    found = training.Evaluation(loss=2.0, metric=7.389, nfe=3.0, residual=0.1, stops={2: 9.0})
    assert "perplexity 7.39" in describe(found, "perplexity")
    assert "perplexity at a stop of 2: 9.00" in describe(found, "perplexity")
    assert "accuracy 738.90%" in describe(found, "accuracy")
