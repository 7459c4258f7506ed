"""``DEQConfig``: options from namespaces, mappings and other objects."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from typing import Any


class DEQConfig:
    """Options by name, from a namespace, a mapping, another config, or the attributes of any object.

    The options are copied: updates here do not change the source.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> torchdeq.DEQConfig({"f_max_iter": 30}).get("f_max_iter")
        30
    """

    def __init__(self, config: Any = None) -> None:
        if config is None:
            options: Mapping[str, Any] = {}
        elif isinstance(config, Mapping):
            options = config
        elif isinstance(config, argparse.Namespace):
            options = vars(config)
        elif isinstance(config, DEQConfig):
            options = config.config
        else:
            warnings.warn(f"Unrecognized config type: {type(config)}. Its attributes are used.", stacklevel=2)
            options = vars(config)
        self.config: dict[str, Any] = dict(options)

    def get(self, key: str, default: Any = None) -> Any:
        """The option ``key``, or ``default`` if there is none."""
        return self.config.get(key, default)

    def update(self, **kwargs: Any) -> None:
        """Set options."""
        self.config.update(kwargs)

    def __repr__(self) -> str:
        return f"DEQConfig({self.config})"
