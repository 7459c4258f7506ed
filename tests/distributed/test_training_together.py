"""Trainings on two processes: the losses of one."""

import sys
from pathlib import Path

import pytest
import torch
from world import SIZE

from experiments import training
from experiments.training.checkpoint import read
from pydeq.testing import assert_close

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))
from small_trainings import small

# Solved so well that when a solve ends makes no difference, and without what each rank draws for itself.
EXACT = {
    "model.solver.rtol": 1e-12, "model.solver.max_steps": 80, "model.solver.backward_rtol": 1e-12,
    "model.solver.backward_max_steps": 80, "model.dropout": 0.0, "penalty.strength": 0.0,
    "penalty.pretraining_strength": 0.0, "optimizer.name": "sgd", "evaluation.every_steps": 3,
    "evaluation.radius_steps": 40,
}  # fmt: skip
CONDITION = 1e-8 / torch.finfo(torch.float64).eps


def exact(model):
    """A small training to compare to the last digits; a new transformer has no fixed point, so it stays shallow."""
    more = {
        # The last batch has one sample, and a rank none. A spectral norm's estimate moves with each part of a step.
        "mlp": {"evaluation.batch": 51, "model.bound": None},
        "conv": {},
        "transformer": {"pretraining.steps": 6, "evaluation.stops": [1], "model.solver.max_steps": 2},
    }
    return small(model, jitter=[0, 0]).with_values(EXACT | more[model])


def train(rank, mapping, out=None, resume=False):
    """Losses, evaluations and parameters, in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        result = training.train(training.training_config_from_mapping(mapping), out=out, resume=resume)
    finally:
        torch.set_default_dtype(before)
    parameters = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in result.model.parameters()]
    rows = [[row.loss, row.residual, row.gradient_norm] for row in result.history.steps]
    seen = [
        torch.tensor([each.loss, each.metric, each.radius, each.radius_max, *each.stops.values()], dtype=torch.float64)
        for each in [*result.history.evaluations, result.test]
    ]
    return (
        torch.tensor(rows, dtype=torch.float64),
        torch.stack(seen),
        torch.cat([p.detach().flatten() for p in parameters]),
    )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("model", ["mlp", "conv", "transformer"])
def test_two_processes_give_the_losses_of_one(world, model, strategy):
    config = exact(model)
    rows, seen, parameters = train(0, config.mapping())
    assert rows[-1, 0] != rows[0, 0]
    for accumulation in (1, 2) if model == "mlp" else (1,):
        other = config.with_values({"strategy": strategy, "accumulation": accumulation})
        for each in world.run(train, other.mapping()):
            assert_close(each[0][:, 0], rows[:, 0], size=64, condition=CONDITION)
            assert_close(each[0][:, 2], rows[:, 2], size=64, condition=CONDITION)
            assert_close(each[2], parameters, size=64, condition=CONDITION)
            assert_close(each[1][:, :2], seen[:, :2], size=64, condition=CONDITION)
            assert_close(each[1][:, 4:], seen[:, 4:], size=64, condition=CONDITION)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("model", ["conv", "transformer"])
def test_two_processes_go_on_where_they_were(world, tmp_path, model, strategy):
    """With dropout, penalties, a clipped gradient; to the last bit, and rank 0 alone writes."""
    config = small(model, strategy=strategy)
    short = config.with_values({"steps": 4, "schedule.name": "constant"})
    full = config.with_values({"schedule.name": "constant"})  # a cosine of 4 steps is not the beginning of one of 6
    whole = world.run(train, full.mapping(), str(tmp_path / "constant"))
    assert torch.equal(whole[0][2], whole[1][2])
    assert whole[0][0][-1, 0] == whole[1][0][-1, 0]
    world.run(train, short.mapping(), str(tmp_path / "parts"))
    parts = world.run(train, full.mapping(), str(tmp_path / "parts"), True)
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[2], other[2])
    saved = [read(tmp_path / name / "checkpoints" / "00000006").tensors for name in ("constant", "parts")]
    assert saved[0].keys() == saved[1].keys()
    for name, tensor in saved[0].items():
        assert torch.equal(tensor, saved[1][name]), name
    assert not torch.equal(saved[0]["rank0.rng.cpu"], saved[0]["rank1.rng.cpu"])
    # One process goes on with what two have saved, and says that it is alone.
    notices = []

    class Notices(training.Observer):
        def noticed(self, text):
            notices.append(text)

    alone = config.with_values({"steps": 8, "strategy": "none", "schedule.name": "constant"})
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        result = training.train(alone, out=tmp_path / "parts", resume=True, observers=[Notices()])
    finally:
        torch.set_default_dtype(before)
    assert result.steps == 8
    assert "the training had 2 processes and has 1 from here on" in notices


def fail(rank, mapping, out):
    """The disk of rank 0 is full."""
    import safetensors.torch

    def full(tensors, path, about):
        raise OSError(28, "No space left on device")

    original, safetensors.torch.save_file = safetensors.torch.save_file, full
    try:
        with pytest.raises(training.CheckpointError, match=r"could not be written: .*No space left on device"):
            training.train(training.training_config_from_mapping(mapping), out=out)
    finally:
        safetensors.torch.save_file = original


def test_a_full_disk_ends_all_ranks(world, tmp_path):
    world.run(fail, small("mlp", strategy="ddp").mapping(), str(tmp_path / "out"))


def refuse(rank, mapping, message):
    with pytest.raises(ValueError, match=message):
        training.train(training.training_config_from_mapping(mapping))


def test_what_two_processes_cannot_share(world):
    world.run(refuse, small("mlp", strategy="ddp", batch=63).mapping(), "batch must be a multiple of 2, 2 processes")
    world.run(refuse, small("ignn", strategy="ddp").mapping(), "a graph is one sample: it trains on one process")


def test_the_world_is_of_two():
    assert SIZE == 2  # what the messages above say
