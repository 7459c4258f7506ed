"""Running means over training steps, kept on the device so that no step waits for them."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.training.distribution import Distribution

NAMES = ("loss", "penalty", "nfe", "residual", "backward_nfe", "backward_residual", "gradient_norm")


class RunningMeans:
    """Sums and counts of some quantities.

    Args:
        device: Where they are added up.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, len(NAMES), dtype=torch.float64, device=device)

    def add(self, **values: Tensor | float) -> None:
        """One more observation of each quantity that is named."""
        for name, value in values.items():
            index = NAMES.index(name)
            self.sums[0, index] += value.detach() if isinstance(value, Tensor) else value
            self.sums[1, index] += 1

    def take(self, distribution: Distribution) -> dict[str, float | None]:
        """The means over all ranks, None where nothing was seen; begins anew."""
        sums, counts = distribution.sum(self.sums).tolist()
        self.sums = torch.zeros_like(self.sums)
        return {name: total / n if n else None for name, total, n in zip(NAMES, sums, counts, strict=True)}

    def finite(self, distribution: Distribution) -> bool:
        """Whether no loss since the last :meth:`take` was infinite or NaN, on any rank."""
        return bool(distribution.sum(self.sums)[0, NAMES.index("loss")].isfinite())
