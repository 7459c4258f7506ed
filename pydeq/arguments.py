"""Numbers that users pass: Python's own and numpy's scalars, checked and made Python's."""

from __future__ import annotations

import numbers
from typing import Any


def check_number(name: str, value: Any) -> float:
    """A number, as a float; it may be infinite or NaN.

    Raises:
        TypeError: If it is something else; booleans are no numbers.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def check_tolerance(name: str, value: Any) -> float:
    """A tolerance: a number, at least 0."""
    value = check_number(name, value)
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return value


def check_integer(name: str, value: Any, least: int | None = None) -> int:
    """An integer, at least ``least`` if given, as an int.

    Raises:
        TypeError: If it is something else; booleans are no integers.
        ValueError: If it is less.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {int(value)}")
    return int(value)


def set_fields(settings: Any, **values: Any) -> None:
    """Give fields of a frozen dataclass the values that checks have made of them."""
    for name, value in values.items():
        object.__setattr__(settings, name, value)


def check_max_steps(name: str, value: Any) -> int:
    """A number of evaluations, at least 1."""
    return check_integer(name, value, 1)
