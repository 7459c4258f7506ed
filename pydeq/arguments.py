"""Checks of arguments, and hints for unknown keywords, for all public functions."""

from __future__ import annotations

import difflib
import functools
import inspect
import itertools
import numbers
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

_LIBRARIES = tuple(f"{Path(path).parent}{os.sep}" for path in (__file__, torch.__file__))


def check_number(name: str, value: Any) -> float:
    """Check a number and return it as a float; it may be infinite or NaN.

    Raises:
        TypeError: If it is not a number; a bool is not one.
    """
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def check_tolerance(name: str, value: Any) -> float:
    """Check a tolerance, a number of at least 0."""
    value = check_number(name, value)
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return value


def check_integer(name: str, value: Any, least: int | None = None) -> int:
    """Check an integer, of at least ``least`` if given, and return it as an int.

    Raises:
        TypeError: If it is not an int; a bool is not one.
        ValueError: If it is less.
    """
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {int(value)}")
    return int(value)


def shown(value: Any) -> str:
    """The text of a wrong argument in an error message: a class given in place of an instance is called that."""
    return f"the class {value.__name__}, not an instance" if isinstance(value, type) else repr(value)


def callable_name(function: Callable[..., Any]) -> str:
    """The name of a function, or of the class of a callable object.

    The repr is not used: that of a bound method shows the object it belongs to, which may in turn show the method.
    """
    if isinstance(function, functools.partial):
        return f"partial({callable_name(function.func)})"
    return getattr(function, "__name__", None) or type(function).__name__


def warn_user(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the user's code that led here: the innermost line outside of pydeq and torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_code.co_filename.startswith(_LIBRARIES) and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)


def set_fields(settings: Any, **values: Any) -> None:
    """Set fields of a frozen dataclass to their checked values."""
    for name, value in values.items():
        object.__setattr__(settings, name, value)


def check_max_steps(name: str, value: Any) -> int:
    """Check a number of evaluations, at least 1."""
    return check_integer(name, value, 1)


def check_norm(norm: Any) -> Literal["all", "parts"]:
    """Check the name of the norm of residuals."""
    if norm not in ("all", "parts"):
        raise ValueError(f"norm must be 'all' or 'parts', got {norm!r}")
    return norm


def check_states_at(value: Sequence[int]) -> tuple[int, ...]:
    """Check numbers of evaluations, at least 1 and increasing."""
    if type(value) is tuple and not value:
        return value
    if not isinstance(value, list | tuple | range):
        raise TypeError(f"states_at must be a list of ints, got {type(value).__name__}")
    counts = tuple(check_max_steps(f"states_at[{i}]", count) for i, count in enumerate(value))
    if any(b <= a for a, b in itertools.pairwise(counts)):
        raise ValueError(f"states_at must increase, got {list(counts)}")
    return counts


T = TypeVar("T")

# Names in other solver packages, and ours.
_ELSEWHERE = {
    "max_iter": "max_steps",
    "maxiter": "max_steps",
    "max_iters": "max_steps",
    "max_iterations": "max_steps",
    "f_max_iter": "max_steps",
    "threshold": "max_steps",
    "tol": "rtol",
    "f_tol": "rtol",
    "eps": "rtol",
    "m": "memory",
    "history": "memory",
    "lbfgs_thres": "memory",
    "lam": "ridge",
    "beta": "damping",
    "tau": "damping",
    "f_solver": "solver",
    "ift": "adjoint",
    "vecs": "probes",
    "gamma": "strength",
    "jac_loss_weight": "strength",
    "jac_loss_freq": "frequency",
    "jac_incremental": "every",
    "jac_stop_epoch": "stop",
    "f_max_iter_eval": "eval_max_steps",
    "learning_rate": "lr",
    "wd": "weight_decay",
}


def unknown_keyword(where: str, got: str, known: Iterable[str]) -> TypeError:
    """Make the TypeError for keyword ``got`` of ``where``; it suggests the nearest keyword of ``known``."""
    known = list(known)
    meant = _ELSEWHERE.get(got.lower())
    if meant not in known:
        meant = next(iter(difflib.get_close_matches(got, known, n=1)), None)
    advice = f"did you mean {meant!r}?" if meant else f"it takes {', '.join(known)}"
    return TypeError(f"{where} got an unexpected keyword argument {got!r}: {advice}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest of the known names, if one is near, whatever the case."""
    by_lower = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f": did you mean {by_lower[near[0]]!r}?" if near else ""


def keywords_for(
    where: str,
    fn: Callable[..., Any],
    given: dict[str, Any],
    known: Collection[str],
    advice: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Check the keywords that ``where`` passes on to ``fn``, and return them.

    If fn takes any keyword, a name that looks like a misspelt keyword of ``where`` still raises.

    Args:
        given: The keywords that ``where`` got and does not take itself.
        known: The keywords that ``where`` takes.
        advice: Messages for keywords that users often pass to ``where`` by mistake.

    Raises:
        TypeError: If fn does not take a keyword; the message names the nearest one that is taken.
    """
    if given:
        names, takes_any = _parameters(fn)
        for name in given:
            if name in names:
                continue
            if advice and name in advice:
                raise TypeError(f"{where} does not take {name}: {advice[name]}")
            if not takes_any or _resembles(name, known):
                raise unknown_keyword(where, name, [*known, *names])
    return given


def check_context(fn: Callable[..., Any], context: Sequence[Any], keywords: Mapping[str, Any]) -> None:
    """Raise an error that tells the order of arguments, if fn cannot be called with a state and these arguments.

    For calls of fn that have failed: it looks at fn's signature, which takes long.
    """
    try:
        signature = _signature(fn)
    except (TypeError, ValueError):  # fn has no signature
        return
    try:
        signature.bind(None, *context, **keywords)
    except TypeError as error:
        raise TypeError(
            f"fn was called with z and {len(context)} of context: {error}. Pass z0 first, then what fn takes after z"
        ) from None


def _signature(fn: Callable[..., Any]) -> inspect.Signature:
    fn = getattr(fn, "_orig_mod", fn)  # a module wrapped by torch.compile takes any argument
    fn = getattr(fn, "_torchdynamo_orig_callable", fn)
    if isinstance(fn, nn.Module):
        fn = fn.forward
    return inspect.signature(fn)


def _parameters(fn: Callable[..., Any]) -> tuple[list[str], bool]:
    """The names of fn's arguments after the first one, and whether it takes any keyword."""
    try:
        _, *rest = _signature(fn).parameters.values()
    except (TypeError, ValueError):  # fn has no signature, or takes no arguments
        return [], True
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [x.name for x in rest if x.kind in named], any(x.kind is inspect.Parameter.VAR_KEYWORD for x in rest)


def _resembles(name: str, known: Collection[str]) -> bool:
    return _ELSEWHERE.get(name.lower()) in known or bool(difflib.get_close_matches(name, known, n=1, cutoff=0.8))


def suggests_keywords(cls: type[T]) -> type[T]:
    """Make a dataclass name the nearest of its fields when it gets an unknown keyword."""
    original = cls.__init__
    known = [field.name for field in fields(cls) if field.init]  # pyright: ignore[reportArgumentType]

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in known:
                raise unknown_keyword(cls.__name__, name, known)
        original(self, *args, **kwargs)

    cls.__init__ = init
    return cls
