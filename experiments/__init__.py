"""Training, data sets and the paper's experiments: programs on :mod:`pydeq`, run from a checkout.

    python -m experiments train conv_digits

    model = experiments.load("runs/conv_digits")

See docs/experiments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.training.run_folder import Run, load, load_run

__all__ = ["Run", "load", "load_run"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # imported when it is used: other commands need not wait for it
        from experiments.training import run_folder

        return getattr(run_folder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
