"""The libraries that are compared, one file each. The others are compared with the first one of this list."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Collection

from benchmarks.peers.base import Layer, LayerSettings, Method, Outcome, Peer
from benchmarks.peers.contender import Claim, Contender, Counts

NAMES = ("pydeq", "torchdeq")

# By the module that has a library's contenders: how to install the library. The module cannot say so itself: without
# the library it cannot be imported.
REQUIREMENTS = {
    "pydeq": "",
    "loop": "",
    "deq": "",
    "torchdeq": "pip install torchdeq==0.1.0",
    "xitorch": "pip install xitorch==0.5.1",
    "scipy": "pip install scipy==1.17.1",
    "jaxopt": "pip install jax==0.10.2 jaxopt==0.8.5",
    "optimistix": "pip install jax==0.10.2 optimistix==0.1.0",
    "deepinv": "pip install --no-deps deepinv==0.5.0 tqdm",
    "petsc": "apt-get install python3-petsc4py, which needs the system's Python and numpy<2",
}

__all__ = [
    "NAMES",
    "REQUIREMENTS",
    "Claim",
    "Contender",
    "Counts",
    "Layer",
    "LayerSettings",
    "Method",
    "Outcome",
    "Peer",
    "contenders",
    "load",
]


def load() -> tuple[dict[str, Peer], list[str]]:
    """The peers that are installed, and a notice for each that is not."""
    found, notices = {}, []
    for name in NAMES:
        try:
            found[name] = importlib.import_module(f"benchmarks.peers.{name}").PEER
        except ModuleNotFoundError as error:
            if name == NAMES[0]:
                raise
            notices.append(f"{name} is left out, and every comparison with it: {error}")
    return found, notices


def contenders(names: Collection[str] | None = None) -> tuple[list[Contender], list[str]]:
    """The contenders of the libraries that are installed, and a notice for each library that is not.

    Args:
        names: The libraries, keys of ``REQUIREMENTS``; all by default.

    Raises:
        ValueError: If a name is unknown.
    """
    names = list(REQUIREMENTS) if names is None else list(names)
    if unknown := [name for name in names if name not in REQUIREMENTS]:
        raise ValueError(f"names must be among {', '.join(REQUIREMENTS)}, got {', '.join(unknown)}")
    found: list[Contender] = []
    notices = []
    for name in names:
        try:
            # Libraries that are no longer maintained warn when they are imported.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(f"benchmarks.peers.{name}")
        except ImportError as error:
            if not REQUIREMENTS[name]:
                raise
            notices.append(f"{name} is left out: {error} ({REQUIREMENTS[name]})")
        else:
            found.extend(module.CONTENDERS)
    return found, notices
