import json
import subprocess
import sys

import pytest

pytest.importorskip("safetensors", reason="the requirements of training are not installed")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
pytest.importorskip("matplotlib")

import torch

from experiments.command_line import main
from experiments.paper import grid
from experiments.paper.command import NAMES
from experiments.paper.worker import measure


def reproduce(*arguments):
    return main(["reproduce", *map(str, arguments)])


def test_all_experiments_in_the_smoke_profile(tmp_path, capsys):
    assert reproduce("all", "--profile", "smoke", "--out", tmp_path, "--jobs", 1, "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert len(list((tmp_path / "trainings").iterdir())) == 29
    claims = 0
    for name in NAMES:
        content = json.loads((tmp_path / f"reproduce-smoke-{name}.json").read_text())
        assert (content["experiment"], content["profile"], content["seeds"]) == (name, "smoke", 1)
        assert content["environment"]["versions"]["torch"] == torch.__version__
        assert content["trainings"]
        for training in content["trainings"]:
            assert training["status"] == "finished"
            assert training["config"]["seed"] in {"modes": (0, 1, 2), "length": (0, 1)}.get(name, (0,))
            assert training["seconds"] > 0.0
            assert len(training["evaluations"]["step"]) == len(training["evaluations"]["radius"])
            assert {"commit", "device_name", "versions"} <= set(training["environment"])
        claims += len(content["claims"])
        assert (tmp_path / f"reproduce-smoke-{name}.png").stat().st_size < 100_000
    assert sum(line.startswith(("SHOWN: ", "NOT SHOWN: ", "NOT MEASURED: ")) for line in out.splitlines()) == claims
    for paper in ("(29.20)", "(89.1)", "(82.4)", "explodes", "does not stabilize"):
        assert paper in out
    # All is measured: nothing is trained again.
    assert reproduce("table3", "--profile", "smoke", "--out", tmp_path, "--device", "cpu") == 0
    assert "training," not in capsys.readouterr().out


def test_plan_trains_nothing(tmp_path, capsys):
    assert reproduce("table2", "figure7", "--plan", "--out", tmp_path / "new", "--seeds", 3) == 0
    out = capsys.readouterr().out
    assert out.count("ConvDEQ on cifar10, 1600 steps") == 2 * (3 + 3 + 3 + 1)
    assert "unpenalized, seed 2:" in out
    assert "10 different trainings, 0 of them measured" in out
    assert not (tmp_path / "new").exists()


def test_paper_profile_says_that_it_needs_a_gpu(tmp_path, capsys):
    assert reproduce("table2", "--profile", "paper", "--device", "cpu", "--out", tmp_path / "new") == 1
    assert "takes days on a GPU" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_reader_that_ends_early_ends_the_command():
    command = [sys.executable, "-u", "-m", "experiments", "reproduce", "table2", "--plan"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    error = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 1
    assert "rror" not in error


@pytest.mark.parametrize("option", ["--seeds", "--jobs"])
def test_counts_must_be_positive(option, capsys):
    assert reproduce("table2", option, 0) == 2
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err


def test_precision_is_a_choice_of_cpu_long(capsys):
    assert reproduce("table2", "--plan", "--profile", "cpu-long") == 0
    plain = capsys.readouterr().out
    assert reproduce("table2", "--plan", "--profile", "cpu-long", "--amp", "bf16") == 0
    mixed = capsys.readouterr().out
    assert "cap 18; to do" in plain
    assert "cap 18, bf16; to do" in mixed
    assert reproduce("table2", "--plan", "--amp", "bf16") == 2
    assert "amp must be none with profile cpu: only cpu-long has a choice, got 'bf16'" in capsys.readouterr().err


def test_a_training_that_fails_leaves_the_other_experiments(tmp_path, capsys, monkeypatch):
    def fails(training, *arguments):
        if training.config.optimizer.weight_decay:  # of figure 8
            raise RuntimeError("no luck")
        return measure(training, *arguments)

    monkeypatch.setattr(grid, "measure", fails)
    assert reproduce("figure8", "table2", "--profile", "smoke", "--out", tmp_path, "--jobs", 1, "--device", "cpu") == 1
    captured = capsys.readouterr()
    assert "1 of 5 trainings failed: figure8: weight decay 0.001, seed 0: RuntimeError: no luck" in captured.err
    assert "figure8: not all of its trainings are measured" in captured.out
    assert not (tmp_path / "reproduce-smoke-figure8.json").exists()
    assert (tmp_path / "reproduce-smoke-table2.json").exists()


def test_a_folder_to_reuse_must_be_that_of_a_run(tmp_path, capsys):
    assert reproduce("table2", "--plan", "--reuse", tmp_path) == 2
    assert "--reuse must be the folder of a run, which has a folder trainings, got " in capsys.readouterr().err


def test_unknown_experiment(capsys):
    with pytest.raises(SystemExit, match="2"):
        reproduce("table4")
    assert "figure8" in capsys.readouterr().err


def test_missing_data_are_an_error_that_names_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYDEQ_DATA", str(tmp_path / "none"))
    assert reproduce("table2", "--out", tmp_path, "--jobs", 1) == 1
    assert "cifar10" in capsys.readouterr().err
