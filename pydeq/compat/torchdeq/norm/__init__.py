"""Normed weights, computed once per training step."""

from pydeq.compat.torchdeq.norm.base_norm import (
    apply_norm,
    register_norm,
    register_norm_module,
    remove_norm,
    reset_norm,
)

__all__ = ["apply_norm", "register_norm", "register_norm_module", "remove_norm", "reset_norm"]
