"""Checkpoints on the disk: what is written, kept, refused, and left when the disk is full."""

import errno
import json
import math
import os
import resource
import signal

import pytest
import torch
from small_trainings import small

from experiments import training
from experiments.training.checkpoint import CheckpointError, Checkpoints, read, save_tensors

pytest.importorskip("safetensors")


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(3, 4, generator=generator), "b": torch.arange(5), "empty": torch.empty(2, 0)}


STATE = {"step": 3, "history": [1.5, math.inf, None], "scaler": {"scale": 2.0, "bad": -math.inf}, "name": "x"}


def test_what_is_written_is_read(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    path = checkpoints.write(3, tensors(), STATE)
    found = read(path)
    assert found.state == STATE
    assert found.tensors.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert torch.equal(found.tensors[name], tensor)
        assert found.tensors[name].dtype == tensor.dtype
    json.loads((path / "state.json").read_text(), parse_constant=lambda word: pytest.fail(f"not JSON: {word}"))
    assert math.isnan(read(checkpoints.write(4, {}, {"loss": math.nan})).state["loss"])


def test_who_may_read_is_the_umasks_to_say(tmp_path):
    before = os.umask(0o027)
    try:
        path = Checkpoints(tmp_path / "checkpoints").write(3, tensors(), STATE)
        save_tensors(tmp_path / "model.safetensors", tensors())
    finally:
        os.umask(before)
    for file in (path / "tensors.safetensors", path / "state.json", tmp_path / "model.safetensors"):
        assert file.stat().st_mode & 0o777 == 0o640


def test_the_newest_ones_are_kept_and_what_was_left_half_done_is_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    (tmp_path / ".writing-00000001").mkdir()
    (tmp_path / ".removing-00000001").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    for step in (9, 10, 100):
        checkpoints.write(step, tensors(), {"step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000010", "00000100", "notes.txt"]
    assert checkpoints.newest(pytest.fail).state["step"] == 100
    assert Checkpoints(tmp_path / "nowhere").newest(pytest.fail) is None


@pytest.mark.parametrize("position", [0, 100, -1])
@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
def test_each_byte_counts(tmp_path, file, position):
    path = Checkpoints(tmp_path).write(1, tensors(), STATE)
    content = bytearray((path / file).read_bytes())
    content[position] ^= 4
    (path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match="00000001 is damaged"):
        read(path)


def test_other_formats_are_refused(tmp_path):
    from experiments.training.checkpoint import _checksum

    path = Checkpoints(tmp_path).write(1, tensors(), STATE)
    content = json.loads((path / "state.json").read_text()) | {"format": 99}
    content.pop("checksum")
    (path / "state.json").write_text(json.dumps({"checksum": _checksum(content)} | content))
    with pytest.raises(CheckpointError, match="its format is 99"):
        read(path)
    with pytest.raises(CheckpointError, match="of another version"):
        Checkpoints(tmp_path).newest(pytest.fail)
    assert path.is_dir()  # where it was


def test_what_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    from experiments.training import checkpoint

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    path = Checkpoints(tmp_path).write(1, tensors(), STATE)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "file_hash", refuse)
        with pytest.raises(CheckpointError, match=r"00000001 may not be read: .*Permission denied: .*tensors"):
            Checkpoints(tmp_path).newest(pytest.fail)
    assert Checkpoints(tmp_path).newest(pytest.fail).path == path


def full(*arguments, **keywords):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["save_file", "fsync", "replace", "mkdir"])
def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, place):
    import safetensors.torch

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    kept = checkpoints.write(1, tensors(), {"step": 1})
    with monkeypatch.context() as patch:
        owner = {"save_file": safetensors.torch, "mkdir": os}.get(place, os)
        patch.setattr(owner, place, full)
        with pytest.raises(CheckpointError, match=r"No space left on device.*the last good checkpoint is .*00000001"):
            checkpoints.write(2, tensors(1), {"step": 2})
    assert [path.name for path in checkpoints.folder.iterdir()] == ["00000001"]
    assert read(kept).state == {"step": 1}
    checkpoints.write(2, tensors(1), {"step": 2})  # once there is room
    assert checkpoints.newest(pytest.fail).state == {"step": 2}


def test_without_a_checkpoint_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="there is no checkpoint yet"):
        Checkpoints(tmp_path).write(2, tensors(), {})
    with pytest.raises(CheckpointError, match=r"model\.safetensors could not be written: .*No space left"):
        save_tensors(tmp_path / "model.safetensors", tensors())
    assert not list(tmp_path.iterdir())


def test_a_file_that_the_system_cuts_off_is_no_checkpoint(tmp_path):
    """Not simulated: the kernel refuses to write more than some kilobytes, in the middle of the tensors."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(1, tensors(), {"step": 1})
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"00000002 could not be written: .*the last good checkpoint is"):
            checkpoints.write(2, {"large": torch.zeros(10_000)}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]
    assert checkpoints.newest(pytest.fail).state == {"step": 1}


def test_a_training_on_a_full_disk_ends_and_can_be_resumed(tmp_path, monkeypatch):
    import safetensors.torch

    config, written, original = small("mlp"), [], safetensors.torch.save_file

    def filling(tensors, path, about):
        written.append(path)
        if len(written) == 4:  # after two checkpoints and the parameters of an evaluation
            full()
        original(tensors, path, about)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", filling)
        with pytest.raises(CheckpointError, match=r"No space left on device.*the last good checkpoint is .*00000004"):
            training.train(config, out=tmp_path / "full")
    result = training.train(config, out=tmp_path / "full", resume=True)
    whole = training.train(config, out=tmp_path / "whole")
    for one, other in zip(result.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["steps.csv", "evaluations.csv", "training.png", "config.json", "result.json"])
def test_each_file_on_a_full_disk_ends_the_training_and_is_named(tmp_path, name):
    """Not simulated: what is written to /dev/full does not fit."""
    if name == "training.png":
        pytest.importorskip("matplotlib")

    class Filling(training.Observer):
        """Puts a full disk in the place of a file, or of what is moved there."""

        def advanced(self, step):
            if step == 3 and name != "config.json":
                place = tmp_path / (f".{name}.writing" if name == "result.json" else name)
                place.unlink(missing_ok=True)
                place.symlink_to("/dev/full")

    if name == "config.json":
        (tmp_path / f".{name}.writing").symlink_to("/dev/full")
    last = "there is no checkpoint yet" if name == "config.json" else "the last good checkpoint is .*0000000[26]"
    with pytest.raises(CheckpointError, match=f"{name} could not be written: .*No space left on device.*; {last}"):
        training.train(small("mlp", logging__plot=name == "training.png"), out=tmp_path, observers=[Filling()])
    (tmp_path / name).unlink(missing_ok=True)
    assert training.train(small("mlp"), out=tmp_path, resume=True).status == "finished"  # once there is room


def test_logs_for_tensorboard_on_a_full_disk_end_the_training(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    monkeypatch.setattr(SummaryWriter, "flush", full)
    with pytest.raises(CheckpointError, match=r"tensorboard could not be written: .*No space left on device"):
        training.train(small("mlp", logging__tensorboard=True), out=tmp_path)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    training.train(small("transformer", steps=4), out=tmp_path)
    import pickle

    def refuse(*arguments, **keywords):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    training.train(small("transformer", steps=6), out=tmp_path, resume=True)


def test_without_the_library_the_error_says_what_to_install(tmp_path, monkeypatch):
    import builtins

    real = builtins.__import__

    def missing(name, *arguments):
        if name.startswith("safetensors"):
            raise ModuleNotFoundError("No module named 'safetensors'", name="safetensors")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModuleNotFoundError, match="pip install safetensors"):
        training.train(small("mlp"), out=tmp_path)
    assert training.train(small("mlp")).status == "finished"  # needs none
