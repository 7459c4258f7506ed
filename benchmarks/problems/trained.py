"""Trained cells from the classifier of digits, with a batch to measure them on."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

import pydeq
from benchmarks.problems.convolution import ConvCell
from benchmarks.problems.digits import Classifier, load_digits

CHANNELS, BATCH, RATE, STRENGTH = 16, 64, 2e-2, 0.5


@dataclass(frozen=True)
class Trained:
    """A trained model and a batch it has not seen.

    Args:
        key: For names of figures.
        title: For readers.
        model: In float32.
        images, labels: [B, 1, 8, 8] and [B].
    """

    key: str
    title: str
    model: Classifier
    images: Tensor
    labels: Tensor

    @property
    def cell(self) -> ConvCell:
        return self.model.cell


@cache
def trained(epochs: int, penalized: bool, batch: int = 64, seed: int = 0) -> Trained:
    """Train on digits with Adam, exact gradients and, if asked for, the Jacobian penalty on every step."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # A cap on products is part of the recipe.
        warnings.simplefilter("ignore", pydeq.ConvergenceWarning)
        torch.manual_seed(seed)
        digits, model = load_digits(), Classifier(CHANNELS)
        adjoint = pydeq.Implicit(rtol=1e-3, max_steps=15)
        deq = pydeq.DEQ(model.cell, adjoint=adjoint, rtol=1e-3, max_steps=20)
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
        steps = epochs * (len(digits.images) // BATCH)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for epoch in range(epochs):
            for images, labels in digits.batches(BATCH, epoch, seed):
                logits, z, x = model(images, deq)
                loss = functional.cross_entropy(logits, labels)
                if penalized:
                    loss = loss + STRENGTH * pydeq.jacobian_penalty(model.cell, z.detach(), x)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
    name = "penalty" if penalized else "plain"
    title = f"digits cell, trained {'with' if penalized else 'without'} penalty"
    return Trained(name, title, model, digits.test_images[:batch], digits.test_labels[:batch])
