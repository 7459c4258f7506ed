"""The tasks, by the model that learns them."""

from __future__ import annotations

from experiments.training.configuration import TrainingConfig
from experiments.training.tasks.base import Score, Task
from experiments.training.tasks.classification import Classification
from experiments.training.tasks.language import LanguageModelling
from experiments.training.tasks.nodes import NodeClassification
from pydeq.models import ConvDEQConfig, DEQTransformerConfig, IGNNConfig, ImplicitMLPConfig, MDEQConfig


def task_of(config: TrainingConfig) -> type[Task]:
    """Return the task for a training's model.

    Raises:
        ValueError: If there is no task for it.
    """
    model = config.model
    if isinstance(model, MDEQConfig) and model.segmentation is not None:
        raise ValueError("model must classify: there is no training for segmentation")
    if isinstance(model, ConvDEQConfig | ImplicitMLPConfig | MDEQConfig):
        return Classification
    if isinstance(model, DEQTransformerConfig):
        return LanguageModelling
    if isinstance(model, IGNNConfig):
        return NodeClassification
    raise ValueError(f"model must be one with a task, got {type(model).__name__}")


__all__ = ["Classification", "LanguageModelling", "NodeClassification", "Score", "Task", "task_of"]
