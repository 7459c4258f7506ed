"""Optimizers from their configurations."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from experiments.training.configuration import OptimizerConfig


def build_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Make the optimizer of those ``parameters`` that require gradients."""
    decaying, constant = [], []
    for parameter in parameters:
        if parameter.requires_grad:
            (decaying if config.decay_vectors or parameter.dim() > 1 else constant).append(parameter)
    groups = [{"params": decaying, "weight_decay": config.weight_decay}]
    if constant:
        groups.append({"params": constant, "weight_decay": 0.0})
    betas = (config.betas[0], config.betas[1])
    if config.name == "sgd":
        nesterov = config.nesterov and config.momentum > 0.0
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov)
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=betas, eps=config.eps)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
