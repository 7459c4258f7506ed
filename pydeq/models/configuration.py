"""Configurations as typed dataclasses that check their values.

A configuration can also be built from a mapping of the fields, with nested configurations as mappings::

    build_config(MDEQConfig, {"channels": [24, 24], "solver": {"forward": "broyden", "max_steps": 18}})

An unknown key, or a value of another type, raises an error that names it.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from pydeq.arguments import unknown_keyword


@dataclass(frozen=True)
class Config:
    """Base class of configurations: frozen, with fields of the annotated types.

    Following the annotation, a list becomes a tuple, a whole number a float, and a mapping a nested configuration.

    Raises:
        TypeError: If a value has another type, or a keyword is unknown. The message names the field.

    Examples:
        >>> from pydeq import models
        >>> models.ImplicitMLPConfig(inputs=3, hidden="16", outputs=2)
        Traceback (most recent call last):
            ...
        TypeError: ImplicitMLPConfig.hidden must be a whole number, got '16'
    """

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in fields(self):
            name = f"{type(self).__name__}.{field.name}"
            object.__setattr__(self, field.name, _fit(getattr(self, field.name), hints[field.name], name))
        self.check()

    def check(self) -> None:
        """Raise ValueError if a value is out of range."""


def check_at_least(config: Config, least: float, *names: str) -> None:
    """Raise ValueError if one of these fields is below ``least`` or NaN; None is allowed."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def check_unit_interval(config: Config, *names: str) -> None:
    """Raise ValueError if one of these fields is not in [0, 1]."""
    for name in names:
        if not 0.0 <= getattr(config, name) <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {getattr(config, name)}")


def check_above_zero(config: Config, *names: str) -> None:
    """Raise ValueError if one of these fields is not above 0 and finite; None is allowed."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0.0 < value < float("inf"):
            raise ValueError(f"{name} must be above 0 and finite, got {value}")


def _fit(value: Any, hint: Any, name: str) -> Any:
    """Convert ``value`` to the type ``hint``.

    Raises:
        TypeError: If it has another type.
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
    """Build a configuration of type ``kind`` from a mapping of its fields.

    Raises:
        TypeError: If a key is unknown (the message gives the nearest name) or missing, or a value has another type.
        ValueError: If a value is out of range.
    """
    if not isinstance(mapping, Mapping):
        raise TypeError(f"{kind.__name__} must be a mapping of its fields, got {mapping!r}")
    known = [field.name for field in fields(kind)]
    for key in mapping:
        if key not in known:
            raise unknown_keyword(kind.__name__, str(key), known)
    return kind(**mapping)


def unknown_name(what: str, got: str, known: Iterable[str]) -> ValueError:
    """Make the ValueError for a name that is none of ``known``; it gives the nearest one.

    Args:
        what: What the name must be.
        got: The name.
        known: All names.
    """
    known = list(known)
    nearest = difflib.get_close_matches(got, known, n=1)
    advice = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(known)}"
    return ValueError(f"name must be {what}, got {got!r}: {advice}")
