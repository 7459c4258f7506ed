"""Reference models on :class:`pydeq.DEQ`, and their published configurations.

    model = pydeq.models.build("mdeq_cifar_tiny")
    logits, solution = model(images, return_solution=True, penalty=pydeq.JacobianPenalty(0.5))

Import it as ``import pydeq.models`` or ``from pydeq import models``.
"""

from __future__ import annotations

from typing import Any

from pydeq.models.configuration import Config, build_config, unknown_name
from pydeq.models.conv_deq import ConvDEQ, ConvDEQConfig
from pydeq.models.equilibrium import EquilibriumModel, PenaltyConfig, SolverConfig
from pydeq.models.ignn import IGNN, IGNNConfig
from pydeq.models.implicit_mlp import ImplicitMLP, ImplicitMLPConfig
from pydeq.models.mdeq import MDEQ, ClassificationConfig, MDEQConfig, SegmentationConfig
from pydeq.models.published import PUBLISHED
from pydeq.models.transformer import DEQTransformerConfig, DEQTransformerLM, LMOutput, Memory

MODELS: dict[str, tuple[type[Config], type[EquilibriumModel]]] = {
    "conv_deq": (ConvDEQConfig, ConvDEQ),
    "deq_transformer_lm": (DEQTransformerConfig, DEQTransformerLM),
    "ignn": (IGNNConfig, IGNN),
    "implicit_mlp": (ImplicitMLPConfig, ImplicitMLP),
    "mdeq": (MDEQConfig, MDEQ),
}
"""The configuration and the class of each model, by its name, the value of a mapping's key ``model``."""


def config_from_mapping(mapping: dict[str, Any]) -> Config:
    """Build a configuration from a mapping: the key ``model`` and the fields of that model's configuration.

    Raises:
        TypeError: If a key is unknown (the message gives the nearest name) or missing, or a value has another type.
        ValueError: If the model is unknown, or a value is out of range.

    Examples:
        >>> from pydeq import models
        >>> models.config_from_mapping({"model": "implicit_mlp", "inputs": 3, "hidden": 16, "outputs": 2}).hidden
        16
    """
    model = mapping.get("model")
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    return build_config(MODELS[model][0], {key: value for key, value in mapping.items() if key != "model"})


def config_names() -> list[str]:
    """The names of the published configurations.

    Examples:
        >>> from pydeq import models
        >>> [name for name in models.config_names() if "cifar" in name]
        ['mdeq_cifar_large', 'mdeq_cifar_large_reg', 'mdeq_cifar_tiny']
    """
    return sorted(PUBLISHED)


def load_config(name: str) -> Config:
    """Return a published configuration.

    Args:
        name: One of :func:`config_names`.

    Raises:
        ValueError: If there is no configuration of that name; the message gives the nearest one.

    Examples:
        >>> from pydeq import models
        >>> models.load_config("mdeq_cifar_tiny").channels
        (24, 24)
    """
    if name not in PUBLISHED:
        raise unknown_name("that of a published configuration", name, config_names())
    return PUBLISHED[name]


def build(config: Config | str) -> EquilibriumModel:
    """Build the model of a configuration, with new parameters.

    Args:
        config: A configuration, or the name of a published one.

    Raises:
        TypeError: If ``config`` is not the configuration of a model.
        ValueError: If there is no configuration of that name.

    Examples:
        >>> from pydeq import models
        >>> models.build("mdeq_cifar_tiny").parameter_count()
        158890
    """
    found = load_config(config) if isinstance(config, str) else config
    for kind, model in MODELS.values():
        if isinstance(found, kind):
            return model(found)  # pyright: ignore[reportCallIssue, reportArgumentType]
    raise TypeError(f"config must be a name or the configuration of a model, got {type(found).__name__}")


__all__ = [
    "IGNN",
    "MDEQ",
    "MODELS",
    "ClassificationConfig",
    "Config",
    "ConvDEQ",
    "ConvDEQConfig",
    "DEQTransformerConfig",
    "DEQTransformerLM",
    "EquilibriumModel",
    "IGNNConfig",
    "ImplicitMLP",
    "ImplicitMLPConfig",
    "LMOutput",
    "MDEQConfig",
    "Memory",
    "PenaltyConfig",
    "SegmentationConfig",
    "SolverConfig",
    "build",
    "config_from_mapping",
    "config_names",
    "load_config",
]
