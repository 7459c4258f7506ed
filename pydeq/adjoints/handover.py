"""Hand a linearization from forward to backward, also through a checkpoint around the layer.

A checkpoint without reentrant autograd drops the saved tensors, and runs the whole forward again when backward asks for
one, once for each backward pass. A solve of the adjoint system makes many passes through the graph of one evaluation,
so it must not ask for the tensors of that graph. Instead, the second forward makes such a graph, too, and hands it over
as an attribute of a saved tensor: saved tensors come back from the second forward, and are freed once backward has run.
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
    """Get the linearization; None if the saved tensor came back as a copy, as from hooks that move it to the CPU.

    Raises:
        RuntimeError: Under compiled autograd, where its graph does not exist any more.
    """
    if in_compiled_autograd():
        raise RuntimeError(
            "compiled autograd has taken the cell's graph apart, which an adjoint solve goes through: leave"
            " torch._dynamo.config.compiled_autograd off (torch.compile of the whole step works without it), or use"
            " pydeq.JacobianFree() or pydeq.Unrolled()"
        )
    return getattr(courier, "linearization", None)
