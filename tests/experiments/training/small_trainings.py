"""Trainings of a second or less, one for each task."""

from __future__ import annotations

from typing import Any

from experiments.training import TrainingConfig, training_config_from_mapping

MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"model": "implicit_mlp", "inputs": 64, "hidden": 12, "outputs": 4, "dropout": 0.1},
    "conv": {
        "model": "conv_deq", "image_channels": 1, "classes": 4, "channels": 8, "inner": 8, "groups": 4, "stride": 2,
        "dropout": 0.1,
    },
    "transformer": {
        "model": "deq_transformer_lm", "vocabulary": 16, "d_model": 12, "d_inner": 16, "heads": 2, "d_head": 6,
        "memory_length": 6, "dropout": 0.1, "init_std": 0.1,
    },
    "ignn": {"model": "ignn", "inputs": 8, "hidden": 6, "outputs": 3, "dropout": 0.1},
}  # fmt: skip

DATA: dict[str, dict[str, Any]] = {
    "mlp": {"name": "synthetic_images"},
    "conv": {"name": "synthetic_images", "augmentation": "crop", "padding": 1},
    "transformer": {"name": "synthetic_text", "length": 8},
    "ignn": {"name": "synthetic_graph"},
}


def small(model: str = "mlp", **values: Any) -> TrainingConfig:
    """A training of 6 steps with everything on; ``values`` are of other fields, by path, with __ for dots."""
    mapping: dict[str, Any] = {
        "model": MODELS[model] | {"solver": {"max_steps": 8, "backward_max_steps": 8}},
        "data": DATA[model],
        "steps": 6,
        "batch": 1 if model == "ignn" else 64,
        "optimizer": {"name": "adam", "lr": 0.02, "clip": 1.0},
        "schedule": {"name": "cosine", "warmup": 2},
        "pretraining": {"steps": 1, "layers": 2},
        "jitter": [-1, 1],
        "penalty": {"strength": 0.1, "frequency": 0.5, "pretraining_strength": 0.05},
        "evaluation": {"every_steps": 3, "stops": [1, 3], "radius_samples": 4, "radius_steps": 8},
        "checkpoint": {"every_steps": 2},
        "logging": {"every_steps": 2, "plot": False},
    }
    return training_config_from_mapping(mapping).with_values(
        {path.replace("__", "."): value for path, value in values.items()}
    )
