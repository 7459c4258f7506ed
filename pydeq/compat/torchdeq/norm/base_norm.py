"""Apply norms to the weights of a model, by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from pydeq.compat.torchdeq.norm.spectral_norm import SpectralNorm
from pydeq.compat.torchdeq.norm.weight_norm import WeightNorm
from pydeq.compat.torchdeq.utils.config import DEQConfig

__all__ = ["apply_norm", "register_norm", "register_norm_module", "remove_norm", "reset_norm"]

_norm_class: dict[str, Any] = {"weight_norm": WeightNorm, "spectral_norm": SpectralNorm}


def register_norm(norm_type: str, norm_class: Any) -> None:
    """Make a norm available as ``norm_type``.

    Its class has ``_target_modules``, a dict from module types to (names, dims), and a class method
    ``apply(module, deq_args=..., **norm_kwargs)``. The object that ``apply`` returns is called with the module to
    compute the weight again, and has a method ``remove(module)``.
    """
    _norm_class[norm_type] = norm_class


def register_norm_module(module_class: type, norm_type: str, names: Any = "weight", dims: Any = 0) -> None:
    """Make ``norm_type`` norm the weights ``names`` of modules of this class, along ``dims``."""
    _norm_class[norm_type]._target_modules[module_class] = (names, dims)


def apply_norm(
    model: nn.Module,
    norm_type: str = "weight_norm",
    prefix_filter_out: str | list[str] | None = None,
    filter_out: str | list[str] | None = None,
    args: Any = None,
    **norm_kwargs: Any,
) -> None:
    """Norm the weights of the linear and convolutional modules in ``model``.

    Args:
        model: Changed in place.
        norm_type: "weight_norm", "spectral_norm", "none" or a registered one.
        prefix_filter_out: Modules whose name begins with one of these are not normed.
        filter_out: Modules whose name contains one of these are not normed either.
        args: Options: ``norm_type``, ``norm_no_scale``, ``norm_target_norm``, ``norm_clip``, ``norm_clip_value``,
            ``sn_n_power_iters``; not modified.
        norm_kwargs: Options of the norm, or further options like those in ``args``.

    Raises:
        AssertionError: If the norm is unknown.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> cell = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> torchdeq.apply_norm(cell, "weight_norm")
        >>> [name for name, _ in cell.named_parameters()]
        ['0.bias', '0.weight_g', '0.weight_v']
    """
    config = DEQConfig(args)
    config.update(**norm_kwargs)
    norm_type = config.get("norm_type", norm_type)
    if norm_type == "none":
        return
    if norm_type not in _norm_class:
        raise AssertionError(f"norm_type must be none or one of {', '.join(_norm_class)}, got {norm_type!r}")
    norm = _norm_class[norm_type]
    own = norm_kwargs
    if norm in (WeightNorm, SpectralNorm):  # these norms read the other options from the configuration
        own = {key: value for key, value in norm_kwargs.items() if not key.startswith(("norm_", "sn_"))}
    prefixes, parts = _listed(prefix_filter_out), _listed(filter_out)
    for name, module in model.named_modules():
        if name.startswith(tuple(prefixes)) or any(part in name for part in parts):
            continue
        if type(module) in norm._target_modules and not hasattr(module, "_deq_norm"):
            module._deq_norm = norm.apply(module, deq_args=config, **own)  # pyright: ignore


def reset_norm(model: nn.Module) -> None:
    """Compute the normed weights of ``model`` again, with a graph. Call it once before each training step.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> cell = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> torchdeq.apply_norm(cell, "spectral_norm")
        >>> torchdeq.reset_norm(cell)
        >>> cell[0].weight.requires_grad
        True
    """
    for module in model.modules():
        if hasattr(module, "_deq_norm"):
            module._deq_norm(module)  # pyright: ignore


def remove_norm(model: nn.Module) -> None:
    """Make the normed weights of ``model`` plain parameters.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> cell = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> torchdeq.apply_norm(cell, "weight_norm")
        >>> torchdeq.remove_norm(cell)
        >>> [name for name, _ in cell.named_parameters()]
        ['0.bias', '0.weight']
    """
    for module in model.modules():
        if hasattr(module, "_deq_norm"):
            module._deq_norm.remove(module)  # pyright: ignore
            del module._deq_norm


def _listed(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())
