"""Running means over training steps, on the device, so that no step waits for them."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.training.distribution import Distribution

# New names go to the end: the sums of older checkpoints are then shorter, and the rest is zero.
NAMES = (
    "loss", "penalty", "nfe", "residual", "backward_nfe", "backward_residual", "gradient_norm", "converged",
    "backward_converged",
)  # fmt: skip


class RunningMeans:
    """Sums and counts of the quantities in :data:`NAMES`.

    Args:
        device: Device of the sums.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, len(NAMES), dtype=torch.float64, device=device)

    def add(self, **values: Tensor | float) -> None:
        """Add one observation of each of these quantities."""
        for name, value in values.items():
            index = NAMES.index(name)
            self.sums[0, index] += value.detach() if isinstance(value, Tensor) else value
            self.sums[1, index] += 1

    def take(self, distribution: Distribution) -> dict[str, float | None]:
        """Return the means over all ranks, None for quantities without observations, and start again from zero."""
        sums, counts = distribution.sum(self.sums).tolist()
        self.sums = torch.zeros_like(self.sums)
        return {name: total / n if n else None for name, total, n in zip(NAMES, sums, counts, strict=True)}

    def widened(self, sums: Tensor) -> Tensor:
        """The ``sums`` of a checkpoint, perhaps of an earlier version with fewer :data:`NAMES`."""
        return torch.nn.functional.pad(sums, (0, len(NAMES) - sums.shape[1]))

    def finite(self, distribution: Distribution) -> bool:
        """Whether all losses since the last :meth:`take` were finite, on all ranks."""
        return bool(distribution.sum(self.sums)[0, NAMES.index("loss")].isfinite())
