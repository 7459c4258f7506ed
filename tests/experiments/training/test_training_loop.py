"""The loop: what it learns from, what it measures, and what does not change what."""

import math

import pytest
import torch
from small_trainings import small
from torch.nn import functional

import pydeq
from experiments import data, training
from experiments.training import trainer as trainer_module
from experiments.training.distribution import Distribution
from experiments.training.history import History
from experiments.training.observers import Observer
from experiments.training.trainer import Trainer
from pydeq.testing import assert_close

MODELS = ["mlp", "conv", "transformer", "ignn"]


def trainer(config, observers=()):
    return Trainer(config, Distribution(config.strategy, config.device), observers, None)


def parameters(result):
    return torch.cat([p.detach().flatten() for p in result.model.parameters()])


@pytest.fixture
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("model", MODELS)
def test_every_task_learns(model):
    steps = 40
    config = small(model, steps=steps, evaluation__every_steps=20, evaluation__stops=[1, 8], jitter=[0, 0])
    result = training.train(config)
    first, last = result.history.steps[0], result.history.steps[-1]
    assert result.status == "finished"
    assert result.steps == steps
    assert last.loss < first.loss - 0.1
    assert [row.step for row in result.history.steps] == list(range(2, steps + 1, 2))
    assert [row.step for row in result.history.evaluations] == [20, 40]
    if model == "transformer":
        assert result.metric == "perplexity"
        assert result.test.metric == pytest.approx(math.exp(result.test.loss))
        assert result.test.metric < 13.0  # guessing gives 16
    else:
        assert result.metric == "accuracy"
        assert result.test.metric > 0.5  # guessing gives a quarter or a third
    assert 0.0 < result.test.radius <= result.test.radius_max
    assert result.history.column("metric@8")[-1] == pytest.approx(result.history.evaluations[-1].metric)
    assert set(result.test.stops) == set(result.test.stop_residuals) == {1, 8}
    assert result.test.stop_residuals[1] >= result.test.stop_residuals[8]


@pytest.mark.parametrize("model", MODELS)
def test_the_same_seed_gives_the_same_numbers_and_another_one_others(model):
    one, two, other = (training.train(small(model, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(parameters(one), parameters(two))
    assert not torch.equal(parameters(one), parameters(other))
    assert [row.loss for row in one.history.steps] == [row.loss for row in two.history.steps]


def test_torchs_generators_are_left_as_they_were():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    training.train(small())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("model", MODELS)
def test_looking_does_not_change_what_is_learned(model):
    seldom = training.train(small(model, evaluation__every_steps=6, logging__every_steps=6))
    often = training.train(
        small(model, evaluation__every_steps=1, evaluation__stops=[1, 2, 5], evaluation__radius_samples=0)
    )
    assert torch.equal(parameters(seldom), parameters(often))
    assert len(often.history.evaluations) == 6
    assert often.history.evaluations[-1].radius is None
    assert often.history.evaluations[-1].loss == seldom.history.evaluations[-1].loss


def test_steps_are_as_the_recipe_says():
    """Shallow steps call the cell ``layers`` times, others as often as their cap allows; penalties are where drawn."""
    seen = []
    config = small("conv", steps=8, pretraining__steps=3, pretraining__layers=4, model__solver__rtol=0.0,
                   jitter=[-2, 1], logging__every_steps=1, penalty__frequency=0.4)  # fmt: skip
    each = trainer(config)
    original = each.model.forward

    def watch(images, **options):
        if each.model.training:
            seen.append(options)
        return original(images, **options)

    each.model.forward = watch
    rows = each.run().history.steps
    for step, (options, row) in enumerate(zip(seen, rows, strict=True)):
        penalty = each.penalties.penalty(step, 0)
        assert options["penalty"] == penalty
        assert (row.penalty > 0.0) == (penalty is not None)
        assert row.strength == (0.05 if step < 3 else 0.1)
        if step < 3:
            assert options["layers"] == row.nfe == 4
            assert row.backward_nfe is None
        else:
            assert 6 <= options["max_steps"] == row.nfe <= 9
            assert 1 <= row.backward_nfe <= 8
    assert len({options.get("max_steps") for options in seen}) > 2
    assert len({row.penalty > 0.0 for row in rows}) == 2


@pytest.mark.parametrize("model", ["mlp", "transformer"])
def test_accumulated_parts_are_the_whole_batch(model, double):
    """Without what differs from part to part: dropout, probes, and how often a spectral norm's estimate moves."""
    tight = {
        "optimizer.name": "sgd",
        "model.solver.rtol": 1e-12, "model.solver.max_steps": 80, "model.solver.backward_rtol": 1e-12,
        "model.solver.backward_max_steps": 80, "penalty.strength": 0.0, "penalty.pretraining_strength": 0.0,
        "model.dropout": 0.0,
    }  # fmt: skip
    tight |= (
        {"model.bound": None} if model == "mlp" else {"pretraining.steps": 6}
    )  # a new transformer has no fixed point
    whole, parts = (training.train(small(model, jitter=[0, 0], accumulation=n).with_values(tight)) for n in (1, 4))
    size, condition = len(parameters(whole)), 1e-9 / torch.finfo(torch.float64).eps
    assert_close(parameters(parts), parameters(whole), size=size, condition=condition)
    for one, other in zip(whole.history.steps, parts.history.steps, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-8)


def test_evaluations_are_what_the_model_gives():
    config = small("conv", evaluation__batch=50)  # 256 test images: the last batch is smaller
    result = training.train(config)
    model = result.model.eval()
    images, labels, _ = vars(training.synthetic.synthetic_images("test")).values()
    statistics = data.statistics(training.synthetic.synthetic_images("train"))
    x = data.normalize(images, statistics.mean, statistics.std)
    with torch.no_grad():
        for stop, expected in [(None, result.test.metric), *result.test.stops.items()]:
            logits = model(x, max_steps=stop)
            hits = int((logits.argmax(1) == labels).sum())
            assert abs(hits / 256 - expected) <= 1 / 256  # batches of another size round otherwise
        assert float(functional.cross_entropy(model(x), labels)) == pytest.approx(result.test.loss, rel=1e-3)
    residual = float(model(x, return_solution=True)[1].relative_residual.mean())
    assert result.test.residual == pytest.approx(residual, rel=1e-2)
    solved = model(x[:4], return_solution=True)[1]
    exact = pydeq.jacobian_spectrum(model.deq.cell, solved.image, model.stem(x[:4])).abs()[:, 0]
    assert result.test.radius_max == pytest.approx(float(exact.max()), rel=0.25)  # eight products


@pytest.mark.filterwarnings("ignore::pydeq.ConvergenceWarning")
@pytest.mark.parametrize(("eval_max_steps", "own"), [(None, 8), (3, 3)])
def test_a_stop_that_is_the_models_own_cap_is_not_solved_again(monkeypatch, eval_max_steps, own):
    config = small("conv", evaluation__stops=[3, 8], model__solver__rtol=1e-12)
    config = config.with_values({"model.solver.eval_max_steps": eval_max_steps})
    each, runs = trainer(config), []
    run = each.evaluate._run
    monkeypatch.setattr(each.evaluate, "_run", lambda split, stop: runs.append(stop) or run(split, stop))
    found = each.evaluate("test")
    assert runs == [None, 11 - own]  # the other one of 3 and 8
    assert found.nfe == own
    assert found.stop_residuals[own] == found.residual
    with each.evaluate._looking():  # in evaluation mode
        for stop in (3, 8):
            assert found.stop_residuals[stop] == run("test", stop)[3]
    assert found.stop_residuals[3] != found.stop_residuals[8]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("model", ["conv", "transformer"])
def test_mixed_precision(model, amp):
    config = small(model, steps=20, pretraining__steps=2)
    result, full = training.train(config.with_values({"amp": amp})), training.train(config)
    assert result.history.steps[-1].loss == pytest.approx(full.history.steps[-1].loss, rel=0.15)
    scale = result.history.steps[-1].loss_scale
    assert (scale is None) == (amp == "bf16")
    assert all(p.dtype == torch.float32 for p in result.model.parameters())


def test_an_overflow_of_fp16_skips_the_step_and_lowers_the_scale():
    each = trainer(small("conv", amp="fp16", pretraining__steps=0))
    each.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = [p.detach().clone() for p in each.model.parameters()]
    each.wrapped.train()
    each._update(0)
    assert all(torch.equal(p, b) for p, b in zip(each.model.parameters(), before, strict=True))
    assert each.scaler.get_scale() == 2.0**39
    assert each.means.take(each.distribution)["gradient_norm"] is None  # infinite: no norm to speak of


def test_clipping_and_decay_reach_the_optimizer():
    loose, tight = (training.train(small(optimizer__name="sgd", optimizer__clip=c)) for c in (None, 1e-6))
    assert loose.history.steps[0].gradient_norm is None
    assert tight.history.steps[0].gradient_norm > 1e-3
    start = torch.cat([p.detach().flatten() for p in trainer(small()).model.parameters()])
    assert (parameters(tight) - start).abs().max() < 1e-6
    assert (parameters(loose) - start).abs().max() > 1e-3


class Spy(Observer):
    """Remembers what it was told."""

    def __init__(self):
        self.told = []

    def noticed(self, text):
        self.told.append(text)

    def ended(self, status, test):
        self.told.append((status, test))


@pytest.mark.parametrize(("amp", "fast", "said"), [("bf16", False, 1), ("bf16", True, 0), ("none", False, 0)])
def test_slow_bfloat16_is_said(monkeypatch, amp, fast, said):
    monkeypatch.setattr(trainer_module, "has_fast_bfloat16", lambda device: fast)
    spy = Spy()
    training.train(small(amp=amp, steps=1), observers=[spy])
    assert sum("this CPU has no fast bfloat16" in str(each) for each in spy.told) == said


def test_a_training_that_diverges_ends_and_says_so(tmp_path):
    config = small("mlp", optimizer__name="sgd", optimizer__lr=3e38, optimizer__clip=None, steps=30,
                   model__bound=None, schedule__warmup=0, checkpoint__every_steps=1)  # fmt: skip
    spy = Spy()
    result = training.train(config, out=tmp_path, observers=[spy])
    assert result.status == "diverged"
    assert result.test is None
    assert result.steps < 30
    assert not math.isfinite(result.history.steps[-1].loss)
    assert "the loss is not finite at step" in spy.told[0]
    assert spy.told[-1] == ("diverged", None)
    assert not (tmp_path / "model.safetensors").exists()
    from experiments.training.checkpoint import read

    kept = sorted((tmp_path / "checkpoints").iterdir())
    for tensors in (read(path).tensors for path in kept):
        assert all(t.isfinite().all() for name, t in tensors.items() if name.endswith("means"))


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite_spoils_no_checkpoint(tmp_path, clip):
    """The loss of the last step is good, what it makes of the parameters is not."""

    class Spoiling(Spy):
        def advanced(self, step):
            if step == 3:
                parameter = each.parameters[0]
                parameter.register_hook(lambda gradient: gradient * math.nan)

    spy = Spoiling()
    config = small("mlp", steps=4, evaluation__every_steps=4, optimizer__clip=clip)
    each = Trainer(config, Distribution("none", "cpu"), [spy], tmp_path)
    result = each.run()
    assert result.status == "diverged"
    assert math.isfinite(result.history.steps[-1].loss)
    assert "parameters are not finite at step 4" in spy.told[0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000002"]
    assert not (tmp_path / "model.safetensors").exists()


def test_a_part_is_held_out_for_validation():
    config = small("mlp", data__holdout=56, batch=50, steps=4)
    each = trainer(config)
    source = each.task.source
    assert len(source.validation.labels) == 56
    assert len(source.train.labels) == 200
    assert len(source.test.labels) == 256
    rows = torch.cat([source.train.images, source.validation.images]).flatten(1)
    everything = training.synthetic.synthetic_images("train").images.flatten(1)
    assert torch.equal(rows.unique(dim=0), everything.unique(dim=0))
    result = each.run()
    assert result.test.loss != result.history.evaluations[-1].loss


def test_epochs_pass_over_all_samples_once():
    config = small("mlp", epochs=2, batch=32)
    each = trainer(config)
    assert each.steps == 16
    seen = [torch.cat([part.images for part in each.task.parts(step)]).flatten(1) for step in range(16)]
    everything = training.synthetic.synthetic_images("train").images.flatten(1)
    for epoch in (seen[:8], seen[8:]):
        assert torch.equal(torch.cat(epoch).unique(dim=0), everything.unique(dim=0))
    assert not torch.equal(seen[0], seen[8])


@pytest.mark.filterwarnings("ignore:the forward solve of a pydeq.DEQ")
def test_text_is_read_in_order_with_its_memory():
    config = small("transformer", batch=4, accumulation=2)
    each = trainer(config)
    tokens = each.task.splits["train"][: 4 * 1024].view(4, 1024)
    each.wrapped.train()
    memories = []
    for step in range(3):
        parts = each.task.parts(step)
        assert torch.equal(torch.cat([part.tokens for part in parts]), tokens[:, 8 * step : 8 * step + 8])
        assert torch.equal(torch.cat([part.targets for part in parts]), tokens[:, 8 * step + 1 : 8 * step + 9])
        memories.append(each.task.memory)
        for part in parts:
            each.task.loss(each.wrapped, part)
    assert memories[0] is None
    assert memories[1].states.shape == memories[2].states.shape == (4, 6, 12)
    assert not torch.equal(memories[1].states, memories[2].states)
    assert each.task.steps_per_epoch == 127
    each.task.parts(127)
    assert each.task.memory is None


def test_a_longer_memory_in_evaluation():
    lengths = set()
    each = trainer(small("transformer", data__test_memory=11, evaluation__batch=4))
    original = each.model.forward

    def watch(tokens, targets=None, memory=None, **options):
        if not each.model.training and memory is not None:
            lengths.add(memory.states.shape[1])
        return original(tokens, targets, memory, **options)

    each.model.forward = watch
    each.run()
    assert lengths == {8, 11}  # a segment, then as much as may be
    assert each.model.memory_length == 6


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        ("mlp", {"batch": 512}, "batch must be at most the 256 training samples, got 512"),
        ("mlp", {"model.outputs": 3}, "model must have 4 classes for synthetic_images, got 3"),
        ("mlp", {"data.holdout": 256}, "data.holdout must be below the 256 samples, got 256"),
        ("mlp", {"data.name": "digitz"}, "data.name must be one of digits, .*, image_folder, .* got 'digitz'"),
        ("mlp", {"device": "cuda"}, "device must be cpu or auto"),
        ("mlp", {"strategy": "ddp"}, "needs torchrun"),
        ("transformer", {"model.vocabulary": 8}, "model.vocabulary must be at least that of synthetic_text, 16, got 8"),
        ("transformer", {"batch": 1024}, "batch must leave rows of at least 9 tokens"),
        ("ignn", {"model.inputs": 9}, "model.inputs must be that of synthetic_graph, 8, got 9"),
        ("ignn", {"batch": 2, "accumulation": 2}, "a graph is one sample"),
        ("mlp", {"data.name": "imagenet"}, "data.root must be the folder"),
        ("mlp", {"data.name": "imagenet", "data.holdout": 2}, "data.holdout must be left out for folders"),
        ("conv", {"data.name": "imagenet"}, "data.augmentation must be random_resized or none, got 'crop'"),
    ],
)
def test_what_does_not_fit_is_named(model, values, message):
    if values.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=message):
        training.train(small(model).with_values(values))


def test_segmentation_has_no_training():
    config = training.TrainingConfig(model="mdeq_cityscapes_small", data={"name": "digits"}, steps=1)  # pyright: ignore
    with pytest.raises(ValueError, match="there is no training for segmentation"):
        training.train(config)


def test_histories_come_back_from_their_mappings():
    history = training.train(small()).history
    assert History.of(history.mapping()) == history
    flat = history.evaluations[0].flat()
    assert list(flat)[:3] == ["step", "epoch", "seconds"]
    assert flat["metric@1"] == history.evaluations[0].stops[1]
    assert flat["residual@3"] == history.evaluations[0].stop_residuals[3]
    test = training.Evaluation(1.0, 0.5, 3.0, 0.1, stops={2: 0.25}, stop_residuals={2: 0.2}, converged=1.0).flat()
    assert test == {
        "loss": 1.0, "metric": 0.5, "nfe": 3.0, "residual": 0.1, "radius": None, "radius_max": None, "converged": 1.0,
        "metric@2": 0.25, "residual@2": 0.2,
    }  # fmt: skip


def test_images_in_folders(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for split, count in (("train", 24), ("val", 9)):
        found = training.synthetic.synthetic_images({"train": "train", "val": "test"}[split])
        for i in range(count):
            folder = tmp_path / split / str(int(found.labels[i]))
            folder.mkdir(parents=True, exist_ok=True)
            pixels = found.images[i].expand(3, 8, 8).permute(1, 2, 0).contiguous().numpy()
            image.fromarray(pixels).save(folder / f"{i}.png")
    values = {
        "data.name": "image_folder", "data.root": str(tmp_path), "data.size": 8, "data.augmentation": "random_resized",
        "model.image_channels": 3, "batch": 8, "epochs": 2, "evaluation.every_steps": 3, "evaluation.batch": 4,
    }  # fmt: skip
    config = small("conv").with_values(values)
    result, again = training.train(config), training.train(config)
    assert result.steps == 6
    assert torch.equal(parameters(result), parameters(again))
    assert result.test.loss > 0.0
    other = training.train(config.with_values({"data.workers": 1}))
    assert torch.equal(parameters(other), parameters(result))


@pytest.mark.parametrize("model", ["conv", "transformer"])
def test_a_state_dict_carries_all_of_a_training(model):
    config = small(model, amp="fp16")
    first, second = trainer(config), trainer(config)
    first.wrapped.train()
    second.wrapped.train()
    with first._quiet():
        for step in range(3):
            first._update(step)
            first.step += 1
        state = first.state_dict()
        first._update(3)
        expected = {name: tensor.clone() for name, tensor in first.model.state_dict().items()}
        torch.manual_seed(99)
        second.load_state_dict(state)
        assert second.step == 3
        second._update(3)
    for name, tensor in second.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert second.scaler.state_dict() == first.scaler.state_dict()
    assert torch.equal(second.means.sums, first.means.sums)
