"""``python -m experiments train``."""

import json
import os
import subprocess
import sys

import pytest
import torch
from small_trainings import small

from experiments import training
from experiments.command_line import main
from experiments.training.run import locked

pytest.importorskip("yaml")
pytest.importorskip("safetensors")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(json.dumps(small("mlp").mapping()))  # YAML, too
    return str(path)


def test_trains_and_goes_on(config, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["train", config, "--out", out, "--steps", "3", "--set", "optimizer.lr=1e-2"]) == 0
    text = capsys.readouterr().out
    assert "step 3/3" in text
    assert json.loads((tmp_path / "out" / "config.json").read_text())["optimizer"]["lr"] == 0.01
    assert main(["train", config, "--out", out, "--steps", "5", "--set", "optimizer.lr=0.01", "--resume"]) == 0
    assert "6 steps" not in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "result.json").read_text())["steps"] == 5


def test_where_things_go_by_default(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", config, "--epochs", "1", "--device", "cpu"]) == 0
    result = json.loads((tmp_path / "runs" / "some" / "result.json").read_text())
    assert (result["status"], result["steps"], result["metric"]) == ("finished", 4, "accuracy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "optimizer.llr=1"], "did you mean 'lr'"),
        (["--set", "optimizer"], "must be set as key=value"),
        (["--set", "data.name=digitz"], "digits"),
        (["--steps", "-1"], "steps must be at least 0"),
    ],
)
def test_mistakes_end_with_a_line_that_names_them(config, tmp_path, capsys, arguments, message):
    assert main(["train", config, "--out", str(tmp_path / "out"), *arguments]) == 1
    captured = capsys.readouterr().err
    assert captured.startswith("error: ")
    assert message in captured


def test_without_a_configuration_their_names_are_listed(capsys):
    assert main(["train"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == training.training_config_names()
    assert "A convolutional equilibrium on scikit-learn's 8 x 8 digits: half a minute on a core." in lines[1]
    assert all(len(line.split()) > 4 and "#" not in line for line in lines)


def test_the_folder_is_named(config, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["train", config, "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"results are in {out}"


def test_what_is_not_there(config, tmp_path, capsys):
    assert main(["train", "conv_digit"]) == 1
    assert "did you mean 'conv_digits'" in capsys.readouterr().err
    missing = ["--set", "data.name=cifar10", "--set", f"data.root={tmp_path}", "--set", "model.inputs=3072"]
    assert main(["train", config, "--out", str(tmp_path / "out"), *missing]) == 1
    assert "cifar10 is not here" in capsys.readouterr().err
    assert main(["train", config, "--out", str(tmp_path / "a"), "--steps", "2"]) == 0
    assert main(["train", config, "--out", str(tmp_path / "a"), "--steps", "2"]) == 1
    assert "has a training already" in capsys.readouterr().err


def test_a_folder_in_use_is_left_alone(config, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"):
        assert main(["train", config, "--out", str(tmp_path / "out")]) == 1
    assert f"error: another process is training in {tmp_path / 'out'}" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_an_altered_file_is_named(config, tmp_path, capsys):
    batches = tmp_path / "data" / "cifar10"
    batches.mkdir(parents=True)
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        (batches / name).write_bytes(b"not what was published")
    values = ["--set", "data.name=cifar10", "--set", f"data.root={tmp_path / 'data'}", "--set", "model.inputs=3072"]
    assert main(["train", config, "--out", str(tmp_path / "out"), *values]) == 1
    error = capsys.readouterr().err
    assert "data_batch_1.bin" in error
    assert "as published" in error


def test_divergence_is_a_failure(config, tmp_path, capsys):
    values = ["--set", "optimizer.name=sgd", "--set", "optimizer.lr=3e38", "--set", "optimizer.clip=null",
              "--set", "model.bound=null", "--set", "schedule.warmup=0"]  # fmt: skip
    assert main(["train", config, "--out", str(tmp_path / "out"), *values]) == 1
    assert "the loss is not finite" in capsys.readouterr().out


def test_an_interruption_says_how_to_go_on(config, tmp_path, capsys, monkeypatch):
    from experiments.training import command

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "train", interrupt)
    assert main(["train", config, "--out", str(tmp_path / "out")]) == 130
    assert "continue with --resume" in capsys.readouterr().err


def test_the_package_is_imported_without_what_training_needs():
    program = (
        "import sys\n"
        "for name in ('matplotlib', 'tensorboard', 'safetensors', 'yaml', 'sklearn'):\n"
        "    sys.modules[name] = None\n"
        "import pydeq, pydeq.models, experiments.training, experiments.command_line\n"
        "experiments.command_line.parser()\n"
        "config = experiments.training.TrainingConfig(\n"
        "    model={'model': 'implicit_mlp', 'inputs': 64, 'hidden': 4, 'outputs': 4},\n"
        "    data=experiments.training.DataConfig('synthetic_images'), steps=1)\n"
        "print(experiments.training.train(config).status)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "finished"


def test_torchrun(config, tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch has no distributed package")
    out = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "experiments", "train", config, "--out", str(out), "--set", "strategy=ddp", "--device", "cpu"],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished; test:") == 1  # one rank speaks
    assert json.loads((out / "result.json").read_text())["status"] == "finished"
    assert training.checkpoint.read(out / "checkpoints" / "00000006").state["world"] == 2
