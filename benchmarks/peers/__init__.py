"""The libraries that are compared, one file each. The others are compared with the first one of this list."""

from __future__ import annotations

import importlib

from benchmarks.peers.base import Layer, LayerSettings, Method, Outcome, Peer

NAMES = ("pydeq", "torchdeq")

__all__ = ["NAMES", "Layer", "LayerSettings", "Method", "Outcome", "Peer", "load"]


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
