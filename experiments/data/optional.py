"""Packages that only some data sets need, and errors without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_MODULES = {"scikit-learn": "sklearn", "Pillow": "PIL"}


@contextmanager
def needs(package: str, purpose: str) -> Iterator[None]:
    """Context manager around the import of a package: without it, the error says how to install it.

    Raises:
        ModuleNotFoundError: If the package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = _MODULES[package]
        if error.name is None or error.name.partition(".")[0] != module:
            raise
        raise ModuleNotFoundError(
            f"{purpose} needs {package}, which is not installed: pip install {package}", name=module
        ) from error
