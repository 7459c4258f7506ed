"""How a linearization gets to backward, also through a checkpoint around the layer.

A checkpoint that does not use reentrant autograd gives up what is saved for backward, and runs the whole forward again
where that is asked for, once for each backward pass through autograd. A solve of the adjoint system makes many passes
through the graph of one evaluation. So it must not ask there: the run again has made such a graph, too, and hands it
over. It travels on a tensor that is saved, since that is what comes back from the run again, and what is let go once
backward has run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pydeq.cell.linearization import Linearization
from pydeq.cell.torch_compile import in_compiled_autograd


def hand_over(at: Linearization) -> Tensor:
    """A tensor to save for backward."""
    courier = torch.empty(0, device="cpu")
    courier.linearization = at  # pyright: ignore[reportAttributeAccessIssue]
    return courier


def take_over(courier: Tensor) -> Linearization | None:
    """The linearization; None where what was saved came back as a copy, as from hooks that move it to the CPU.

    Raises:
        RuntimeError: Where its graph is no longer there.
    """
    if in_compiled_autograd():
        raise RuntimeError(
            "compiled autograd has taken the cell's graph apart, which an adjoint solve goes through: leave"
            " torch._dynamo.config.compiled_autograd off (torch.compile of the whole step works without it), or use"
            " pydeq.JacobianFree() or pydeq.Unrolled()"
        )
    return getattr(courier, "linearization", None)
