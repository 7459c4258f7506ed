"""Read configurations from YAML and JSON files, and values from the command line."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from pydeq.models.configuration import unknown_name

FOLDER = Path(__file__).parent / "configs"
"""The training configurations that come with this package."""

SUFFIXES = (".yaml", ".yml", ".json")


def training_config_names() -> list[str]:
    """The names of the training configurations that come with this package."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def describe_config(name: str) -> str:
    """The comment in the first line of a training configuration that comes with this package."""
    return config_path(name).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def config_path(name: str | Path) -> Path:
    """The file of a training configuration.

    Args:
        name: One of :func:`training_config_names`, or a path that ends in .yaml, .yml or .json.

    Raises:
        ValueError: If there is no such name, with the nearest one.
        FileNotFoundError: If there is no such file.
    """
    path = Path(name)
    if path.suffix in SUFFIXES:
        if not path.is_file():
            raise FileNotFoundError(f"no configuration file {path}")
        return path
    if str(name) not in training_config_names():
        raise unknown_name("that of a configuration or a .yaml or .json file", str(name), training_config_names())
    return FOLDER / f"{name}.yaml"


def read_mapping(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML or JSON file.

    Raises:
        ModuleNotFoundError: For YAML without PyYAML.
        ValueError: If the file is not valid, is not a mapping, or has a key twice; the message names the file.
    """
    text = path.read_text(encoding="utf-8")
    try:
        mapping = json.loads(text, object_pairs_hook=_mapping) if path.suffix == ".json" else parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(mapping, dict):
        raise ValueError(f"{path} must be a mapping with a key 'model', got {type(mapping).__name__}")
    return mapping


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ModuleNotFoundError: Without PyYAML.
        ValueError: If the text is not valid YAML, or a mapping has a key twice.
    """
    loader = _loader()
    import yaml

    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from error


def _mapping(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A mapping of pairs, each key once."""
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"key {key!r} appears twice")
    return dict(pairs)


@cache
def _loader() -> Any:
    """PyYAML's safe loader, but a duplicate key is an error, and 1e-3 is a number as in YAML 1.2."""
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("configuration files need PyYAML: pip install PyYAML", name="yaml") from error

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            return _mapping(self.construct_pairs(node, deep=True))

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    return Loader
