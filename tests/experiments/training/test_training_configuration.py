"""Configurations of trainings: what files may say, what is refused, and what the refusal says."""

import dataclasses
import re
from pathlib import Path

import pytest
from small_trainings import small

from experiments import training
from experiments.training.configuration import parse_values
from pydeq import models

pytest.importorskip("yaml")

FILE = """\
model: {config: mdeq_cifar_tiny, dropout: 0.5, solver: {max_steps: 9}}
data: {name: cifar10}
epochs: 3
optimizer: {name: sgd, lr: 0.1}
evaluation: {stops: [1, 2]}
jitter: [-2, 1]
"""


def write(tmp_path, text):
    path = tmp_path / "some.yaml"
    path.write_text(text)
    return path


def test_files_fill_the_dataclasses(tmp_path):
    config = training.load_training_config(write(tmp_path, FILE))
    tiny = models.load_config("mdeq_cifar_tiny")
    assert isinstance(config.model, models.MDEQConfig)
    assert config.model.channels == tiny.channels
    assert config.model.dropout == 0.5
    assert config.model.solver.max_steps == config.max_steps == 9
    assert config.model.solver.forward == "broyden"  # what is not said again stays
    assert config.optimizer == training.OptimizerConfig(name="sgd", lr=0.1)
    assert config.evaluation.stops == (1, 2)


def test_mappings_come_back_as_the_configuration_they_are_of():
    for name in ("mlp", "conv", "transformer", "ignn"):
        config = small(name)
        assert training.training_config_from_mapping(config.mapping()) == config


def test_values_by_path():
    config = small("conv")
    other = config.with_values({"model.solver.max_steps": 5, "penalty.strength": 2, "epochs": 4})
    assert other.max_steps == 5
    assert other.jacobian_penalty().strength == 2.0
    assert other.jacobian_penalty().frequency == config.jacobian_penalty().frequency
    assert (other.epochs, other.steps) == (4, None)
    assert config.max_steps == 8
    with pytest.raises(ValueError, match=r"model\.channels has no fields"):
        config.with_values({"model.channels.first": 3})
    with pytest.raises(TypeError, match="did you mean 'max_steps'"):
        config.with_values({"model.solver.max_step": 3})


def test_a_model_by_name_and_its_penalty():
    config = training.TrainingConfig(model="mdeq_cifar_large_reg", data={"name": "cifar10"}, epochs=1)  # pyright: ignore
    assert config.jacobian_penalty() == models.load_config("mdeq_cifar_large_reg").penalty
    weaker = config.with_values({"penalty.strength": 0.1, "penalty.probes": 1})
    assert weaker.jacobian_penalty() == dataclasses.replace(config.jacobian_penalty(), strength=0.1, probes=1)
    assert weaker.model == config.model
    none = training.load_training_config("mdeq_cifar_large_reg", {"penalty.strength": 0.0}).jacobian_penalty()
    assert none == dataclasses.replace(config.jacobian_penalty(), strength=0.0)


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("2E5", 2e5), ("1.5e+2", 150.0), ("+3e0", 3.0), ("7", 7.0)]
)
def test_numbers_as_everybody_writes_them(tmp_path, text, value):
    path = write(tmp_path, FILE.replace("lr: 0.1", f"lr: {text}"))
    assert training.load_training_config(path).optimizer.lr == value


def test_the_configuration_that_a_training_leaves_is_one(tmp_path):
    config = small("conv")
    training.train(config.with_values({"steps": 0}), out=tmp_path)
    assert training.load_training_config(tmp_path / "config.json", {"steps": 6}) == config


def test_models_in_files_beside_the_file(tmp_path):
    (tmp_path / "model.yaml").write_text("model: implicit_mlp\ninputs: 64\nhidden: 3\noutputs: 10\n")
    path = write(tmp_path, "model: model.yaml\ndata: {name: digits}\nsteps: 1\n")
    assert training.load_training_config(path).model.hidden == 3


def test_assignments():
    assert parse_values(["a.b=1e-3", "c=[1, 2]", "d=adam", "e=", "f={g: 1}", "h=true", "i=x=y"]) == {
        "a.b": 1e-3, "c": [1, 2], "d": "adam", "e": None, "f": {"g": 1}, "h": True, "i": "x=y",
    }  # fmt: skip
    with pytest.raises(ValueError, match="must be set as key=value, got 'lr'"):
        parse_values(["lr"])
    with pytest.raises(ValueError, match="not valid YAML"):
        parse_values(["lr=[1"])


@pytest.mark.parametrize(
    ("before", "after", "error", "message"),
    [
        ("epochs: 3", "epoch: 3", TypeError, "TrainingConfig .* did you mean 'epochs'"),
        ("epochs: 3", "epochs: 3\nsteps: 4", ValueError, "either epochs or steps, got 3 and 4"),
        ("epochs: 3\n", "", ValueError, "either epochs or steps, got None and None"),
        ("epochs: 3", "epochs: -1", ValueError, "epochs must be at least 1"),
        ("lr: 0.1", "learning_rate: 0.1", TypeError, "OptimizerConfig .* did you mean 'lr'"),
        ("lr: 0.1", "lr: 0", ValueError, "lr must be above 0 and finite, got 0"),
        ("lr: 0.1", "lr: 1e-3x", TypeError, "OptimizerConfig.lr must be a number, got '1e-3x'"),
        ("lr: 0.1", "momentum: 1.0", ValueError, "momentum must be in"),
        ("lr: 0.1", "betas: [0.9]", ValueError, "betas must be two numbers"),
        ("lr: 0.1", "clip: 0", ValueError, "clip must be above 0"),
        ("name: sgd", "name: lamb", ValueError, "OptimizerConfig.name must be one of 'adam', 'adamw', 'sgd'"),
        ("name: cifar10", "nam: cifar10", TypeError, "DataConfig .* did you mean 'name'"),
        ("name: cifar10", "name: cifar10, augmentation: mixup", ValueError, "DataConfig.augmentation must be one of"),
        ("stops: [1, 2]", "stops: [0, 2]", ValueError, "stops must be different numbers of at least 1"),
        ("stops: [1, 2]", "stops: [2, 2]", ValueError, "stops must be different numbers"),
        ("stops: [1, 2]", "every_steps: 1, every_epochs: 1", ValueError, "exclude each other"),
        ("jitter: [-2, 1]", "jitter: [2, 1]", ValueError, "jitter must be a pair"),
        ("jitter: [-2, 1]", "jitter: [-9, 1]", ValueError, "jitter must leave at least 1 evaluation of .* 9"),
        ("jitter: [-2, 1]", "batch: 7\naccumulation: 2", ValueError, "batch must be a multiple of accumulation, 2"),
        ("jitter: [-2, 1]", "strategy: fsdp2\namp: fp16", ValueError, "amp must be none or bf16 with fsdp2"),
        ("jitter: [-2, 1]", "penalty: {gamma: 1}", TypeError, "PenaltyConfig .* did you mean 'strength'"),
        ("config: mdeq_cifar_tiny", "config: mdeq_cifar_tinny", ValueError, "did you mean 'mdeq_cifar_tiny'"),
        ("config: mdeq_cifar_tiny", "config: 3", TypeError, "model.config must be the name of a configuration, got 3"),
        ("dropout: 0.5", "dropuot: 0.5", TypeError, "MDEQConfig .* did you mean 'dropout'"),
        (
            "model: {config: mdeq_cifar_tiny, dropout: 0.5, solver: {max_steps: 9}}",
            "model: [1]",
            TypeError,
            "model must",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, before, after, error, message):
    assert before in FILE
    path = write(tmp_path, FILE.replace(before, after, 1))
    with pytest.raises(error, match=message) as raised:
        training.load_training_config(path)
    assert str(path) in str(raised.value)


def test_the_documented_configuration_is_one(tmp_path):
    document = (Path(__file__).parents[3] / "docs" / "experiments" / "training.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", document, re.DOTALL)
    config = training.load_training_config(write(tmp_path, text))
    assert (config.epochs, config.jitter, config.amp) == (50, (-2, 1), "bf16")
    for name in training.training_config_names():
        assert f"`{name}`" in document


def test_names_that_are_not_there():
    with pytest.raises(ValueError, match="did you mean 'conv_digits'"):
        training.load_training_config("conv_digit")
    with pytest.raises(FileNotFoundError, match=r"no configuration file .*nowhere\.yaml"):
        training.load_training_config("nowhere.yaml")
    with pytest.raises(TypeError, match="model must be the configuration of a model, got SolverConfig"):
        training.TrainingConfig(model=models.SolverConfig(), data=training.DataConfig("digits"), steps=1)


def test_an_error_names_the_value_that_was_set_or_the_file(tmp_path):
    with pytest.raises(TypeError, match=r"^--set penalty\.strenght: PenaltyConfig .* did you mean 'strength'"):
        training.load_training_config("conv_digits", {"optimizer.lr": 0.1, "penalty.strenght": 1, "batch": 8})
    with pytest.raises(ValueError, match=r"^--set epochs: epochs must be at least 1, got 0"):
        training.load_training_config("conv_digits", {"epochs": 0})
    assert training.load_training_config("conv_digits", {"steps": 0}).epochs is None
    path = write(tmp_path, FILE.replace("lr: 0.1", "lrr: 0.1"))
    with pytest.raises(TypeError, match=rf"^{re.escape(str(path))}: OptimizerConfig .* 'lrr'"):
        training.load_training_config(path, {"batch": 8})
