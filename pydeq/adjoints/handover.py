"""Hand a linearization from forward to backward, also through a checkpoint around the layer.

A checkpoint with use_reentrant=False drops the saved tensors. If a backward pass needs one, the checkpoint runs the
whole forward again, once for each backward pass. A solve of the adjoint system makes many passes through the graph of
one evaluation, so it must not ask for the tensors of that graph. But the second forward makes this graph, too, and
passes it on as an attribute of a saved tensor. Saved tensors come back from the second forward, and are freed after
backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pydeq.cell.linearization import Linearization
from pydeq.cell.torch_compile import in_compiled_autograd


def hand_over(at: Linearization) -> Tensor:
    """Make a tensor that carries the linearization, to be saved for backward."""
    courier = torch.empty(0, device="cpu")
    courier.linearization = at  # pyright: ignore[reportAttributeAccessIssue]
    return courier


def take_over(courier: Tensor) -> Linearization | None:
    """Get the linearization; None if the saved tensor came back as a copy, for example from hooks that move it to the
    CPU.

    Raises:
        RuntimeError: Under compiled autograd, where the linearization's graph no longer exists.
    """
    if in_compiled_autograd():
        raise RuntimeError(
            "compiled autograd has taken the cell's graph apart, which an adjoint solve goes through: leave"
            " torch._dynamo.config.compiled_autograd off (torch.compile of the whole step works without it), or use"
            " pydeq.JacobianFree() or pydeq.Unrolled()"
        )
    return getattr(courier, "linearization", None)
