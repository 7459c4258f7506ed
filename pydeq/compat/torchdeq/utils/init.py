"""Initial states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def mixed_init(z_shape: Sequence[int], device: Any = None) -> Tensor:
    """Standard normal entries, each of them zero with probability 1/2; shape ``z_shape``.

    Source: Anil et al., Path Independent Equilibrium Models Can Better Exploit Test-Time Computation, NeurIPS 2022.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> torchdeq.mixed_init((2, 8)).shape
        torch.Size([2, 8])
    """
    z = torch.randn(*z_shape, device=device)
    return z * torch.zeros_like(z).bernoulli_(0.5)
