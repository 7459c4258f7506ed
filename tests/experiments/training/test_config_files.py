"""Configuration files: YAML and JSON, and what is refused in them."""

import sys

import pytest

from experiments.training import load_training_config
from experiments.training.config_files import FOLDER, config_path, parse_yaml, read_mapping, training_config_names

CONTENT = {"a": [1, 2], "b": {"c": "text", "d": None}, "e": 0.001, "f": True}


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.mark.parametrize("name", ["some.yaml", "some.yml"])
def test_yaml(write, name):
    pytest.importorskip("yaml")
    assert read_mapping(write(name, "a: [1, 2]\nb: {c: text, d: null}\ne: 1e-3\nf: true\n")) == CONTENT


def test_json_needs_no_library(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    path = write("some.json", '{"a": [1, 2], "b": {"c": "text", "d": null}, "e": 1e-3, "f": true}')
    assert read_mapping(path) == CONTENT


def test_without_the_yaml_library_the_error_says_what_to_install(monkeypatch):
    from experiments.training import config_files

    monkeypatch.setitem(sys.modules, "yaml", None)
    config_files._loader.cache_clear()
    with pytest.raises(ModuleNotFoundError, match="pip install PyYAML"):
        load_training_config("conv_digits")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("some.yaml", "a: 1\na: 2\n", "key 'a' appears twice"),
        ("some.yaml", "b: {a: 1, a: 2}\n", "key 'a' appears twice"),
        ("some.json", '{"b": {"a": 1, "a": 2}}', "key 'a' appears twice"),
        ("some.yaml", "a: [1\n", "not valid YAML"),
        ("some.json", '{"a": 1', "delimiter"),
        ("some.yaml", "- 1\n", "must be a mapping with a key 'model', got list"),
        ("some.json", "3", "must be a mapping with a key 'model', got int"),
    ],
)
def test_files_that_are_refused_are_named(write, name, text, message):
    pytest.importorskip("yaml")
    path = write(name, text)
    with pytest.raises(ValueError, match=message) as raised:
        read_mapping(path)
    assert str(raised.value).count(str(path)) == 1


def test_paths_and_names(tmp_path):
    for name in training_config_names():
        assert config_path(name) == FOLDER / f"{name}.yaml"
    with pytest.raises(FileNotFoundError, match=r"no configuration file .*other\.yaml"):
        config_path(tmp_path / "other.yaml")
    with pytest.raises(ValueError, match="did you mean 'conv_digits'"):
        config_path("conv_digit")


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("-2E+5", -2e5), ("+1.5e2", 150.0), ("e3", "e3")])
def test_numbers_with_exponents(text, value):
    pytest.importorskip("yaml")
    assert parse_yaml(text) == value
    assert parse_yaml(f"[{text}]") == [value]
