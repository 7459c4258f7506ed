"""A training that was killed, at any moment, goes on to the numbers of one that was not."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_trainings import small

from experiments import training
from experiments.training.checkpoint import CheckpointError, Checkpoints, read
from experiments.training.distribution import Distribution
from experiments.training.observers import Observer
from experiments.training.running_means import RunningMeans

pytest.importorskip("safetensors")

MODELS = ["mlp", "conv", "transformer", "ignn"]


class Notices(Observer):
    def __init__(self):
        self.texts = []

    def noticed(self, text):
        self.texts.append(text)


def table(path):
    """The rows of a table, without the seconds."""
    with path.open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def assert_same(one, other):
    """The same parameters, optimizer, generators, memory and rows, to the last bit."""
    for name in ("steps.csv", "evaluations.csv"):
        assert table(one / name) == table(other / name)
    paths = [Checkpoints(folder / "checkpoints").paths()[0] for folder in (one, other)]
    assert paths[0].name == paths[1].name
    first, second = (read(path) for path in paths)
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    assert results[0] == results[1]
    for name in ("model.safetensors", "best.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


class Killer:
    """Trainings in copies of a process, which are killed there."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", str(Path(__file__).with_name("killed.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},  # what is imported here
        )  # fmt: skip

    def train(self, config, out, event=None):
        request = {"config": config.mapping(), "out": str(out), "event": event}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def killer():
    killer = Killer()
    yield killer
    with killer.process:
        killer.process.stdin.close()
        assert killer.process.wait(30) == 0


@pytest.mark.parametrize("model", MODELS)
def test_killed_at_many_moments_it_goes_on_to_the_same_numbers(killer, tmp_path, model):
    """One folder, killed again and again, each time a bit later; by a signal that no process can handle."""
    config = small(model)
    training.train(config, out=tmp_path / "whole")
    deaths, event, step = [], 3, 5 if model == "mlp" else 11
    while True:
        ended = killer.train(config, tmp_path / "killed", event)
        if ended["signal"] is None:
            break
        assert ended["signal"] == signal.SIGKILL
        deaths.append(ended["events"][-1])
        event += step
    assert ended["code"] == 0
    assert len(deaths) >= 3
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_killed_at_any_moment_of_a_checkpoint(killer, tmp_path):
    """Every event from the last step before the second checkpoint to the first one after it."""
    config = small("mlp", steps=5, evaluation__every_steps=5)
    training.train(config, out=tmp_path / "whole")
    events = killer.train(config, tmp_path / "watched")["events"]
    assert_same(tmp_path / "whole", tmp_path / "watched")
    begin, end = events.index("step 4"), events.index("step 5")
    names = events[begin : end + 1]
    assert "half of the tensors" in names
    assert any(name.startswith("replace .writing-00000004 by 00000004") for name in names)
    for event in range(begin, end + 1):
        out = tmp_path / str(event)
        assert killer.train(config, out, event)["signal"] == signal.SIGKILL
        kept = sorted(path.name for path in (out / "checkpoints").iterdir() if path.name.isdecimal())
        assert kept
        assert all(read(out / "checkpoints" / name).state["step"] == int(name) for name in kept)
        assert killer.train(config, out)["code"] == 0
        assert_same(tmp_path / "whole", out)
        left = [path.name for path in (out / "checkpoints").iterdir()]
        assert not [name for name in left if name.startswith(".")]  # nothing half-done stays


@pytest.mark.parametrize("options", [{"amp": "fp16"}, {"optimizer.name": "sgd"}, {"accumulation": 4}], ids=str)
def test_what_else_is_carried_along(tmp_path, options):
    config = small("transformer").with_values(options)
    training.train(config, out=tmp_path / "whole")
    with pytest.raises(StoppedError):
        training.train(config, out=tmp_path / "parts", observers=[Stopping(at=5)])
    training.train(config, out=tmp_path / "parts", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_means_of_fewer_quantities_are_read():
    """By an earlier version, which did not know the last two."""
    means = RunningMeans(torch.device("cpu"))
    sums = torch.arange(14, dtype=torch.float64).view(2, 7)
    means.sums = means.widened(sums)
    means.add(loss=5.0, converged=0.5)
    found = means.take(Distribution("none", "cpu"))
    assert found["loss"] == (0 + 5.0) / (7 + 1)
    assert found["gradient_norm"] == 6 / 13
    assert (found["converged"], found["backward_converged"]) == (0.5, None)


class StoppedError(Exception):
    pass


class Stopping(Observer):
    def __init__(self, at):
        self.at = at

    def advanced(self, step):
        if step == self.at:
            raise StoppedError


def stopped(tmp_path, config, at=5):
    """A folder with the checkpoints of steps 2 and 4."""
    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        training.train(config, out=out, observers=[Stopping(at)])
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["00000002", "00000004"]
    return out


def damage(path, how):
    content = path.read_bytes()
    middle = len(content) // 2
    if how == "truncated":
        path.write_bytes(content[:middle])
    elif how == "flipped":
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["truncated", "flipped", "empty", "missing"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, file, how):
    config = small("mlp")
    training.train(config, out=tmp_path / "whole")
    out = stopped(tmp_path, config)
    damage(out / "checkpoints" / "00000004" / file, how)
    notices = Notices()
    training.train(config, out=out, resume=True, observers=[notices])
    (text,) = notices.texts
    assert "00000004 is damaged" in text
    assert "using the previous checkpoint" in text
    assert (out / "checkpoints" / "damaged-00000004").is_dir()
    assert_same(tmp_path / "whole", out)


def test_where_all_checkpoints_are_damaged_nothing_is_started_again(tmp_path):
    out = stopped(tmp_path, small("mlp"))
    for name in ("00000002", "00000004"):
        damage(out / "checkpoints" / name / "tensors.safetensors", "flipped")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint is complete: .*00000004.*00000002.*does not have its checksum"
    ):
        training.train(small("mlp"), out=out, resume=True)


def test_other_trainings_are_not_gone_on_with(tmp_path):
    config = small("mlp")
    out = stopped(tmp_path, config)
    with pytest.raises(ValueError, match=r"optimizer\.lr is 0\.5, and the training to be resumed has 0\.02"):
        training.train(config.with_values({"optimizer.lr": 0.5}), out=out, resume=True)
    assert json.loads((out / "config.json").read_text()) == config.mapping()  # not the one that was refused
    with pytest.raises(FileExistsError, match=r"has a training already: resume it \(--resume\)"):
        training.train(config, out=out)
    notices = Notices()
    result = training.train(config.with_values({"steps": 8}), out=out, resume=True, observers=[notices])
    assert "steps was 6 and is 8 from here on" in notices.texts
    assert result.steps == 8
    assert [row.step for row in result.history.steps] == [2, 3, 4, 6, 8]
    with pytest.raises(ValueError, match="resume needs out"):
        training.train(config, resume=True)


def test_what_is_looked_at_may_change(tmp_path):
    config = small("mlp")
    out = stopped(tmp_path, config)
    notices = Notices()
    result = training.train(
        config.with_values({"evaluation.samples": 64, "evaluation.stops": [2]}), out=out, resume=True,
        observers=[notices],
    )  # fmt: skip
    assert "evaluation.samples was None and is 64 from here on" in notices.texts
    assert [list(row.stops) for row in result.history.evaluations] == [[1, 3], [2]]
    assert result.history.column("metric@2") == [None, result.history.evaluations[1].stops[2]]
    with pytest.raises(KeyError, match=r"name must be one of step, .*metric@2.*, got 'metric@5'"):
        result.history.column("metric@5")
    whole = training.train(config)
    for one, other in zip(result.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_altered_data_are_noticed(tmp_path, monkeypatch):
    config = small("mlp")
    out = stopped(tmp_path, config)
    from experiments.training.tasks import image_sources

    original = image_sources.synthetic_images

    def altered(split):
        found = original(split)
        found.images[0, 0, 0, 0] ^= 1
        return found

    monkeypatch.setattr(image_sources, "synthetic_images", altered)
    with pytest.raises(ValueError, match="'synthetic_images' is not what the training began with"):
        training.train(config, out=out, resume=True)


def test_resuming_where_there_is_nothing_begins_and_says_so(tmp_path):
    notices = Notices()
    training.train(small("mlp"), out=tmp_path / "out", resume=True, observers=[notices])
    training.train(small("mlp"), out=tmp_path / "whole")
    assert "starting from the beginning" in notices.texts[0]
    assert_same(tmp_path / "whole", tmp_path / "out")


def test_resuming_what_is_finished_measures_it_again(tmp_path):
    first = training.train(small("conv"), out=tmp_path)
    again = training.train(small("conv"), out=tmp_path, resume=True)
    assert again.test == first.test
    assert again.history == first.history
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_two_trainings_do_not_share_a_folder(tmp_path):
    class Nested(Observer):
        def advanced(self, step):
            training.train(small("mlp"), out=tmp_path, resume=True)

    with pytest.raises(RuntimeError, match="another process is training in"):
        training.train(small("mlp"), out=tmp_path, observers=[Nested()])
