"""Unknown keywords answer with the name that was probably meant."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, TypeVar

T = TypeVar("T")

# What other solver packages call these.
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
    """The TypeError for keyword ``got`` of ``where``, naming the nearest of ``known``."""
    known = list(known)
    meant = _ELSEWHERE.get(got.lower())
    if meant not in known:
        meant = next(iter(difflib.get_close_matches(got, known, n=1)), None)
    advice = f"did you mean {meant!r}?" if meant else f"it takes {', '.join(known)}"
    return TypeError(f"{where} got an unexpected keyword argument {got!r}: {advice}")


def suggests_keywords(cls: type[T]) -> type[T]:
    """Make a dataclass answer unknown keywords with the nearest of its fields."""
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
