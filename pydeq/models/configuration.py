"""Configurations as data: typed dataclasses, and the YAML files that fill them.

A file names the model and gives the fields of its configuration, with nested configurations as mappings::

    model: mdeq
    channels: [24, 24]
    solver: {forward: broyden, max_steps: 18}

A key that is no field, or a value of another type, is an error that says where.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from pydeq.arguments import unknown_keyword

FOLDER = Path(__file__).parent / "configs"
"""Where the published configurations are."""


@dataclass(frozen=True)
class Config:
    """Base of configurations: frozen, each field of the type that it is annotated with.

    Lists become tuples, whole numbers floats and mappings nested configurations where the annotation says so.

    Raises:
        TypeError: If a value is of another type, or a keyword is unknown; naming the field.
    """

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in fields(self):
            name = f"{type(self).__name__}.{field.name}"
            object.__setattr__(self, field.name, _fit(getattr(self, field.name), hints[field.name], name))
        self.check()

    def check(self) -> None:
        """Raise ValueError where a value is out of range."""


def check_at_least(config: Config, least: float, *names: str) -> None:
    """Raise ValueError, naming it, where a field is below ``least`` or NaN; None will do."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def check_unit_interval(config: Config, *names: str) -> None:
    """Raise ValueError, naming it, where a field is not in [0, 1]."""
    for name in names:
        if not 0.0 <= getattr(config, name) <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {getattr(config, name)}")


def check_above_zero(config: Config, *names: str) -> None:
    """Raise ValueError, naming it, where a field is not above 0 or not finite; None will do."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0.0 < value < float("inf"):
            raise ValueError(f"{name} must be above 0 and finite, got {value}")


def _fit(value: Any, hint: Any, name: str) -> Any:
    """``value`` as the type ``hint``.

    Raises:
        TypeError: If it is of another type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (kind,) = (argument for argument in arguments if argument is not type(None))
        return _fit(value, kind, name)
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"{name} must be a list, got {value!r}")
        return tuple(_fit(entry, arguments[0], f"{name}[{i}]") for i, entry in enumerate(value))
    if is_dataclass(hint):
        return value if isinstance(value, typing.cast(type, hint)) else build_config(typing.cast(type, hint), value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        hint_name = {"int": "a whole number", "float": "a number", "bool": "true or false"}.get(hint.__name__, "text")
        raise TypeError(f"{name} must be {hint_name}, got {value!r}")
    return value


def build_config(kind: type, mapping: Any) -> Any:
    """A configuration of type ``kind`` from a mapping of its fields.

    Raises:
        TypeError: If a key is unknown (with the nearest name), missing, or of another type.
        ValueError: If a value is out of range.
    """
    if not isinstance(mapping, Mapping):
        raise TypeError(f"{kind.__name__} must be a mapping of its fields, got {mapping!r}")
    known = [field.name for field in fields(kind)]
    for key in mapping:
        if key not in known:
            raise unknown_keyword(kind.__name__, str(key), known)
    return kind(**mapping)


def config_names(folder: Path = FOLDER) -> list[str]:
    """The names of the configurations that come with the package."""
    return sorted(file.stem for file in folder.glob("*.yaml"))


def config_path(name: str | Path, folder: Path = FOLDER) -> Path:
    """The file of a configuration: a name of :func:`config_names`, or a path that ends in .yaml or .json.

    Raises:
        ValueError: If there is no such name, with the nearest one.
        FileNotFoundError: If there is no such file.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml", ".json"):  # JSON is YAML, too
        if not path.is_file():
            raise FileNotFoundError(f"no configuration file {path}")
        return path
    found = folder / f"{name}.yaml"
    if str(name) not in config_names(folder):
        import difflib

        nearest = difflib.get_close_matches(str(name), config_names(folder), n=1)
        advice = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(config_names(folder))}"
        raise ValueError(f"name must be that of a configuration or a .yaml file, got {str(name)!r}: {advice}")
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ModuleNotFoundError: Without PyYAML, with what to install.
        ValueError: If it is no YAML, no mapping, or a key stands there twice.
    """
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("configuration files need PyYAML: pip install PyYAML", name="yaml") from error

    class Loader(yaml.SafeLoader):
        """Refuses keys that stand there twice; the YAML library keeps the last one."""

    def construct_mapping(loader: Loader, node: yaml.MappingNode) -> dict[Any, Any]:
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{path}: key {key!r} stands there twice")
        return loader.construct_mapping(node, deep=True)

    # YAML 1.1, which the library reads, takes 1e-3 for text; 1.2 and everybody else for a number.
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, construct_mapping)
    try:
        with path.open(encoding="utf-8") as file:
            mapping = yaml.load(file, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(mapping, dict):
        raise ValueError(f"{path} must be a mapping with a key 'model', got {type(mapping).__name__}")
    return mapping
