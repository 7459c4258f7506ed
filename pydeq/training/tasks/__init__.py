"""The tasks, by the model that learns them."""

from __future__ import annotations

from pydeq.models import ConvDEQConfig, ImplicitMLPConfig, MDEQConfig
from pydeq.training.configuration import TrainingConfig
from pydeq.training.distribution import Distribution
from pydeq.training.tasks.base import Score, Task
from pydeq.training.tasks.classification import Classification


def task_of(config: TrainingConfig) -> type[Task]:
    """The task that a training's model is for.

    Raises:
        ValueError: If there is none.
    """
    model = config.model
    if isinstance(model, MDEQConfig) and model.segmentation is not None:
        raise ValueError("model must classify: there is no training for segmentation")
    if isinstance(model, ConvDEQConfig | ImplicitMLPConfig | MDEQConfig):
        return Classification
    raise ValueError(f"model must be one with a task, got {type(model).__name__}")


__all__ = ["Classification", "Distribution", "Score", "Task", "task_of"]
