"""The configurations that come with the package: all are read and build, the small ones train."""

import dataclasses

import pytest
import torch

from experiments import data, training
from pydeq import models

pytest.importorskip("yaml")

PUBLISHED = {
    # optimizer, learning rate, weight decay, length, batch, shallow steps and layers, jitter
    "mdeq_cifar_tiny": ("adam", 1e-3, 2.5e-6, ("epochs", 50), 128, (3_000, 10), (0, 0)),
    "mdeq_cifar_large": ("adam", 1e-3, 0.0, ("epochs", 220), 128, (20_000, 10), (0, 0)),
    "mdeq_cifar_large_reg": ("adam", 1e-3, 0.0, ("epochs", 220), 96, (16_000, 8), (-2, 1)),
    "mdeq_imagenet_small": ("sgd", 0.05, 5e-5, ("epochs", 100), 128, (510_000, 5), (0, 0)),
    "mdeq_imagenet_small_reg": ("sgd", 0.04, 2e-5, ("epochs", 100), 128, (510_000, 5), (-2, 1)),
    "mdeq_imagenet_large": ("sgd", 0.05, 1e-4, ("epochs", 100), 128, (510_000, 4), (0, 0)),
    "mdeq_imagenet_large_reg": ("sgd", 0.05, 1e-4, ("epochs", 100), 128, (510_000, 4), (-2, 1)),
    "mdeq_imagenet_xl": ("sgd", 0.05, 1e-4, ("epochs", 100), 256, (510_000, 4), (0, 0)),
    "deq_transformer_wt103_post_ln": ("adam", 2.5e-4, 0.0, ("steps", 300_000), 56, (32_000, 2), (0, 0)),
    "deq_transformer_wt103_post_ln_reg": ("adam", 2.5e-4, 0.0, ("steps", 300_000), 56, (32_000, 2), (-2, 0)),
    "deq_transformer_wt103_pre_ln_reg": ("adam", 2.5e-4, 0.0, ("steps", 300_000), 56, (32_000, 2), (0, 0)),
}
SMALL = ("conv_digits", "mdeq_digits", "conv_cifar10_small", "transformer_shakespeare_small", "ignn_cora")


def test_all_are_here():
    assert set(training.training_config_names()) == {*PUBLISHED, *SMALL}


@pytest.mark.parametrize("name", training.training_config_names())
def test_each_is_read_and_builds(name):
    config = training.load_training_config(name)
    assert training.training_config_from_mapping(config.mapping()) == config
    with torch.device("meta"):
        model = models.build(config.model)
    assert model.deq.max_steps == config.max_steps
    penalty = config.jacobian_penalty()
    assert (penalty is not None) == (name.endswith("_reg") or (name in SMALL and name != "ignn_cora"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_the_published_ones(name):
    config = training.load_training_config(name)
    optimizer, lr, decay, (unit, length), batch, shallow, jitter = PUBLISHED[name]
    assert config.model == models.load_config(name)
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.weight_decay) == (optimizer, lr, decay)
    assert getattr(config, unit) == length
    assert (config.batch, config.jitter) == (batch, jitter)
    assert (config.pretraining.steps, config.pretraining.layers) == shallow
    assert config.schedule.name == "cosine"
    language = name.startswith("deq_transformer")
    assert config.schedule.floor == (0.0 if language else 1e-6)
    assert config.schedule.warmup == (16_000 if language else 0)
    assert config.optimizer.clip == (0.25 if language else None)
    assert config.data.length == (150 if language else 64)
    if optimizer == "sgd":
        assert config.optimizer.nesterov
        assert config.optimizer.momentum == 0.9


def stand_in(monkeypatch):
    """Data of the right shapes, for sets that are not on every machine; digits are."""
    generator = torch.Generator().manual_seed(0)
    load = data.load_images

    def images(name, split, root=None):
        if name != "cifar10":
            return load(name, split, root)
        pixels = torch.randint(256, (64, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return data.Images(pixels, torch.arange(64) % 10, tuple("0123456789"))

    def text(*arguments, **options):
        tokens = [torch.randint(100, (n,), generator=generator) for n in (32 * 200, 4000, 4000)]
        return data.Text(*tokens, vocabulary=data.Vocabulary(tuple(map(chr, range(100))), "char"))

    def graph(name, root=None):
        nodes = 60
        edges = torch.randint(nodes, (2, 100), generator=generator)
        masks = [torch.arange(nodes) % 3 == k for k in range(3)]
        features = torch.rand(nodes, 1433, generator=generator)
        return data.Graph(features, torch.arange(nodes) % 7, torch.cat([edges, edges.flip(0)], 1), *masks, classes=7)

    monkeypatch.setattr(data, "load_images", images)
    monkeypatch.setattr(data, "load_text", text)
    monkeypatch.setattr(data, "load_graph", graph)


@pytest.mark.parametrize("name", SMALL)
def test_small_ones_train(name, monkeypatch):
    if name in ("conv_digits", "mdeq_digits"):
        pytest.importorskip("sklearn")
    stand_in(monkeypatch)
    config = training.load_training_config(name).with_values(
        {"steps": 2, "pretraining.steps": 1, "evaluation.samples": 64, "evaluation.stops": [1, 2],
         "evaluation.radius_samples": 1, "evaluation.radius_steps": 2, "logging.every_steps": 1}
    )  # fmt: skip
    if name in ("conv_digits", "mdeq_digits", "conv_cifar10_small"):
        config = config.with_values({"data.test_samples": 32, "batch": 16})
    elif name == "transformer_shakespeare_small":
        config = config.with_values({"batch": 4, "evaluation.batch": 4})
    result = training.train(config)
    assert result.status == "finished"
    assert [row.step for row in result.history.steps] == [1, 2]
    assert result.test is not None
    assert all(value > 0.0 for value in (result.test.loss, result.test.nfe, result.test.radius))
    assert set(result.test.stops) == {1, 2}


def test_documented_fields_are_all_fields():
    for kind in (
        training.TrainingConfig, training.DataConfig, training.OptimizerConfig, training.ScheduleConfig,
        training.PretrainingConfig, training.EvaluationConfig, training.CheckpointConfig, training.LoggingConfig,
    ):  # fmt: skip
        for field in dataclasses.fields(kind):
            assert field.name in (kind.__doc__ or ""), f"{kind.__name__}.{field.name}"
