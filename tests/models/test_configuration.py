"""Configurations: what is refused, and what the refusal says."""

import builtins

import pytest

import pydeq
from pydeq import models
from pydeq.models.configuration import FOLDER, config_path, read_yaml

SMALL = """\
model: mdeq
channels: [8, 16]
groups: 4
classification: {classes: 3, channels: [2, 2], final: 8}
solver: {forward: broyden, max_steps: 7, rtol: 0}
"""


def write(tmp_path, text):
    path = tmp_path / "some.yaml"
    path.write_text(text)
    return path


def test_files_fill_the_dataclasses(tmp_path):
    pytest.importorskip("yaml")
    config = models.load_config(write(tmp_path, SMALL))
    assert config == models.MDEQConfig(
        channels=(8, 16),
        groups=4,
        classification=models.ClassificationConfig(classes=3, channels=(2, 2), final=8),
        solver=models.SolverConfig(forward="broyden", max_steps=7, rtol=0.0),
    )
    assert type(config.solver.rtol) is float
    model = models.build(tmp_path / "some.yaml")
    assert model.deq.solver == pydeq.Broyden()
    assert model.deq.max_steps == 7
    assert model.deq.adjoint.solver == pydeq.Anderson()


@pytest.mark.parametrize(
    ("before", "after", "error", "message"),
    [
        ("groups: 4", "group: 4", TypeError, "did you mean 'groups'"),
        ("max_steps: 7", "max_iter: 7", TypeError, "SolverConfig .* did you mean 'max_steps'"),
        ("classes: 3", "klasses: 3", TypeError, "ClassificationConfig .* did you mean 'classes'"),
        ("groups: 4", "groups: four", TypeError, "MDEQConfig.groups must be a whole number, got 'four'"),
        ("groups: 4", "groups: 4.0", TypeError, "MDEQConfig.groups must be a whole number"),
        ("groups: 4", "groups: true", TypeError, "MDEQConfig.groups must be a whole number"),
        ("rtol: 0", "rtol: small", TypeError, "SolverConfig.rtol must be a number, got 'small'"),
        ("groups: 4", "weight_norm: 1", TypeError, "MDEQConfig.weight_norm must be true or false, got 1"),
        ("[8, 16]", "8", TypeError, "MDEQConfig.channels must be a list, got 8"),
        ("[8, 16]", "[8, x]", TypeError, r"MDEQConfig.channels\[1\] must be a whole number, got 'x'"),
        ("[8, 16]", "[8, 18]", ValueError, "channels must be multiples of groups"),
        ("[8, 16]", "[]", ValueError, "channels must have an entry"),
        ("channels: [2, 2]", "channels: [2]", ValueError, "classification.channels must have an entry for each"),
        ("broyden", "newton", ValueError, "SolverConfig.forward must be one of 'anderson', 'broyden', 'picard'"),
        ("max_steps: 7", "max_steps: 0", ValueError, "max_steps must be at least 1, got 0"),
        ("max_steps: 7", "eval_max_steps: 0", ValueError, "eval_max_steps must be at least 1, got 0"),
        ("rtol: 0", "rtol: -1", ValueError, "rtol must be at least 0"),
        ("rtol: 0", "memory: 0", ValueError, "memory must be at least 1, got 0"),
        ("rtol: 0", "backward_memory: 0", ValueError, "backward_memory must be at least 1, got 0"),
        ("rtol: 0", "backward_max_steps: 0", ValueError, "backward_max_steps must be at least 1, got 0"),
        ("rtol: 0", "backward_rtol: .nan", ValueError, "backward_rtol must be at least 0, got nan"),
        ("rtol: 0", "backward: picard, backward_memory: 3", ValueError, "backward_memory must be left out for picard"),
        ("classes: 3", "classes: 0", ValueError, "classes must be at least 1, got 0"),
        ("channels: [2, 2]", "channels: [2, 0]", ValueError, r"channels must be at least 1 each, got \[2, 0\]"),
        ("groups: 4", "groups: 4\ndropout: 1.5", ValueError, r"dropout must be in \[0, 1\], got 1.5"),
        ("groups: 4", "groups: 4\nbatch_norm_momentum: -1", ValueError, "batch_norm_momentum must be in"),
        ("groups: 4", "groups: 4\ninit_std: 0", ValueError, "init_std must be above 0 and finite, got 0"),
        ("solver:", "segmentation: {classes: 2}\nsolver:", ValueError, "one head"),
        ("groups: 4", "penalty: 3", TypeError, "PenaltyConfig must be a mapping"),
        ("groups: 4", "penalty: {strength: -1}", ValueError, "strength must be finite and not negative"),
        ("model: mdeq", "model: medq", ValueError, "model must be one of .*mdeq.*, got 'medq'"),
        ("model: mdeq\n", "", ValueError, "model must be one of .*, got None"),
        ("groups: 4", "groups: 4\ngroups: 8", ValueError, "key 'groups' stands there twice"),
        ("[8, 16]", "[8, 16", ValueError, "not valid YAML"),
        ("channels: [8, 16]\n", "", TypeError, "channels"),
    ],
)
def test_mistakes_are_named(tmp_path, before, after, error, message):
    pytest.importorskip("yaml")
    assert before in SMALL
    path = write(tmp_path, SMALL.replace(before, after, 1))
    with pytest.raises(error, match=message) as raised:
        models.load_config(path)
    assert str(path) in str(raised.value)


def test_files_that_are_no_mapping_or_not_there(tmp_path):
    pytest.importorskip("yaml")
    with pytest.raises(ValueError, match="must be a mapping"):
        models.load_config(write(tmp_path, "- 1\n"))
    with pytest.raises(FileNotFoundError, match=r"no configuration file .*other\.yaml"):
        models.load_config(tmp_path / "other.yaml")
    with pytest.raises(ValueError, match="did you mean 'mdeq_cifar_tiny'"):
        models.load_config("mdeq_cifar_tinny")


def test_without_the_yaml_library_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *arguments):
        if name == "yaml":
            raise ModuleNotFoundError("No module named 'yaml'", name="yaml")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModuleNotFoundError, match="pip install PyYAML"):
        models.load_config("mdeq_cifar_tiny")
    models.ImplicitMLP(models.ImplicitMLPConfig(inputs=2, hidden=3, outputs=1))  # needs none


def test_keywords_in_python_are_checked_alike():
    with pytest.raises(TypeError, match="did you mean 'hidden'"):
        models.ImplicitMLPConfig(inputs=2, hiden=3, outputs=1)  # pyright: ignore
    with pytest.raises(TypeError, match="config must be a name, a path or the configuration"):
        models.build(models.SolverConfig())


def test_files_say_nothing_that_the_reader_makes_text_of():
    pytest.importorskip("yaml")
    for name in models.config_names():
        assert config_path(name) == FOLDER / f"{name}.yaml"
        assert read_yaml(config_path(name))["model"] in models.MODELS
