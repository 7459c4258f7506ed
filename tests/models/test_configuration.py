"""Configurations: what is refused, and what the refusal says."""

import copy
import math
import subprocess
import sys

import pytest

import pydeq
from pydeq import models

SMALL = {
    "model": "mdeq",
    "channels": [8, 16],
    "groups": 4,
    "classification": {"classes": 3, "channels": [2, 2], "final": 8},
    "solver": {"forward": "broyden", "max_steps": 7, "rtol": 0},
}


def test_mappings_fill_the_dataclasses():
    config = models.config_from_mapping(SMALL)
    assert config == models.MDEQConfig(
        channels=(8, 16),
        groups=4,
        classification=models.ClassificationConfig(classes=3, channels=(2, 2), final=8),
        solver=models.SolverConfig(forward="broyden", max_steps=7, rtol=0.0),
    )
    assert type(config.solver.rtol) is float
    model = models.build(config)
    assert model.deq.solver == pydeq.Broyden()
    assert model.deq.max_steps == 7
    assert model.deq.adjoint.solver == pydeq.Anderson()


@pytest.mark.parametrize(
    ("where", "values", "error", "message"),
    [
        ("", {"group": 4}, TypeError, "did you mean 'groups'"),
        ("solver", {"max_iter": 7}, TypeError, "SolverConfig .* did you mean 'max_steps'"),
        ("classification", {"klasses": 3}, TypeError, "ClassificationConfig .* did you mean 'classes'"),
        ("", {"groups": "four"}, TypeError, "MDEQConfig.groups must be a whole number, got 'four'"),
        ("", {"groups": 4.0}, TypeError, "MDEQConfig.groups must be a whole number"),
        ("", {"groups": True}, TypeError, "MDEQConfig.groups must be a whole number"),
        ("solver", {"rtol": "small"}, TypeError, "SolverConfig.rtol must be a number, got 'small'"),
        ("", {"weight_norm": 1}, TypeError, "MDEQConfig.weight_norm must be true or false, got 1"),
        ("", {"channels": 8}, TypeError, "MDEQConfig.channels must be a list, got 8"),
        ("", {"channels": [8, "x"]}, TypeError, r"MDEQConfig.channels\[1\] must be a whole number, got 'x'"),
        ("", {"channels": [8, 18]}, ValueError, "channels must be multiples of groups"),
        ("", {"channels": []}, ValueError, "channels must have an entry"),
        ("classification", {"channels": [2]}, ValueError, "classification.channels must have an entry for each"),
        ("solver", {"forward": "newton"}, ValueError, "SolverConfig.forward must be one of 'anderson', 'broyden', 'pi"),
        ("solver", {"max_steps": 0}, ValueError, "max_steps must be at least 1, got 0"),
        ("solver", {"eval_max_steps": 0}, ValueError, "eval_max_steps must be at least 1, got 0"),
        ("solver", {"rtol": -1}, ValueError, "rtol must be at least 0"),
        ("solver", {"memory": 0}, ValueError, "memory must be at least 1, got 0"),
        ("solver", {"backward_memory": 0}, ValueError, "backward_memory must be at least 1, got 0"),
        ("solver", {"backward_max_steps": 0}, ValueError, "backward_max_steps must be at least 1, got 0"),
        ("solver", {"backward_rtol": math.nan}, ValueError, "backward_rtol must be at least 0, got nan"),
        (
            "solver", {"backward": "picard", "backward_memory": 3}, ValueError,
            "backward_memory must be left out for picard",
        ),
        ("classification", {"classes": 0}, ValueError, "classes must be at least 1, got 0"),
        ("classification", {"channels": [2, 0]}, ValueError, r"channels must be at least 1 each, got \[2, 0\]"),
        ("", {"dropout": 1.5}, ValueError, r"dropout must be in \[0, 1\], got 1.5"),
        ("", {"batch_norm_momentum": -1}, ValueError, "batch_norm_momentum must be in"),
        ("", {"init_std": 0}, ValueError, "init_std must be above 0 and finite, got 0"),
        ("", {"segmentation": {"classes": 2}}, ValueError, "one head"),
        ("", {"penalty": 3}, TypeError, "PenaltyConfig must be a mapping"),
        ("", {"penalty": {"strength": -1}}, ValueError, "strength must be finite and not negative"),
        ("", {"model": "medq"}, ValueError, "model must be one of .*mdeq.*, got 'medq'"),
        ("", {"model": None}, ValueError, "model must be one of .*, got None"),
    ],
)  # fmt: skip
def test_mistakes_are_named(where, values, error, message):
    mapping = copy.deepcopy(SMALL)
    (mapping[where] if where else mapping).update(values)
    with pytest.raises(error, match=message):
        models.config_from_mapping(mapping)


def test_a_field_that_is_missing_is_named():
    with pytest.raises(TypeError, match="channels"):
        models.config_from_mapping({"model": "mdeq"})


def test_a_name_that_is_missing_gets_the_nearest():
    with pytest.raises(ValueError, match="got 'mdeq_cifar_tinny': did you mean 'mdeq_cifar_tiny'"):
        models.load_config("mdeq_cifar_tinny")
    with pytest.raises(ValueError, match="there are deq_transformer_wt103_post_ln, "):
        models.build("xyz")


def test_the_models_need_nothing_but_torch():
    code = """
import sys
for name in ("yaml", "pydantic", "safetensors", "sklearn", "PIL", "matplotlib", "rich", "experiments"):
    sys.modules[name] = None
from pydeq import models
print(models.build("mdeq_cifar_tiny").parameter_count())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "158890\n", done.stderr


def test_keywords_in_python_are_checked_alike():
    with pytest.raises(TypeError, match="did you mean 'hidden'"):
        models.ImplicitMLPConfig(inputs=2, hiden=3, outputs=1)  # pyright: ignore
    with pytest.raises(TypeError, match="config must be a name or the configuration of a model, got SolverConfig"):
        models.build(models.SolverConfig())
