"""Training of the reference models, from a typed configuration to the trained parameters.

    result = pydeq.training.train("conv_digits", out="runs/conv_digits")

Import it as ``import pydeq.training`` or ``from pydeq import training``; ``python -m pydeq train`` is its command.
"""

from __future__ import annotations

from pydeq.training.checkpoint import CheckpointError
from pydeq.training.configuration import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    PretrainingConfig,
    ScheduleConfig,
    TrainingConfig,
    load_training_config,
    training_config_from_mapping,
    training_config_names,
)
from pydeq.training.history import Evaluation, EvaluationRow, History, Result, StepRow
from pydeq.training.observers import Observer
from pydeq.training.run import train

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "DataConfig",
    "Evaluation",
    "EvaluationConfig",
    "EvaluationRow",
    "History",
    "LoggingConfig",
    "Observer",
    "OptimizerConfig",
    "PretrainingConfig",
    "Result",
    "ScheduleConfig",
    "StepRow",
    "TrainingConfig",
    "load_training_config",
    "train",
    "training_config_from_mapping",
    "training_config_names",
]
