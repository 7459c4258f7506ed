"""Training of the reference models, from a typed configuration to the trained parameters.

    from experiments import training

    result = training.train("conv_digits", out="runs/conv_digits")

``python -m experiments train`` is its command.
"""

from __future__ import annotations

from experiments.training.checkpoint import CheckpointError
from experiments.training.config_files import training_config_names
from experiments.training.configuration import (
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
)
from experiments.training.history import Evaluation, EvaluationRow, History, Result, StepRow
from experiments.training.observers import Observer
from experiments.training.run import train
from experiments.training.run_folder import Run, load, load_run

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
    "Run",
    "ScheduleConfig",
    "StepRow",
    "TrainingConfig",
    "load",
    "load_run",
    "load_training_config",
    "train",
    "training_config_from_mapping",
    "training_config_names",
]
