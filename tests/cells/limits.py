"""What torch itself cannot do with a cell, for each column of the matrix; docs/cells.md shows it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn


class Limit(NamedTuple):
    """The error of plain torch for a cell in a column of the matrix.

    Args:
        error: Type of the exception.
        message: A regular expression for its text.
        note: Text for the table.
    """

    error: type[Exception]
    message: str
    note: str


FUSED = Limit(
    RuntimeError,
    "derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward is not implemented",
    "pytorch#116350",
)
ONCE = Limit(RuntimeError, "marked with @once_differentiable", "as declared")
NO_CAST = "torch's operator takes no mixed types: cast in the cell"
_SETUP = Limit(RuntimeError, "it must override the setup_context staticmethod", "needs setup_context and vmap")
_MIXED = Limit(RuntimeError, "index_add_.*must have the same scalar type", NO_CAST)

ONCE_DIFFERENTIABLE = "a custom autograd.Function that is once_differentiable"

# By column, then by the name of the case.
LIMITS: dict[str, dict[str, Limit]] = {
    "second derivatives": {
        "nn.MultiheadAttention": FUSED,
        "nn.TransformerEncoderLayer": FUSED,
        "nn.TransformerDecoderLayer with a memory": FUSED,
        "F.scaled_dot_product_attention, causal": FUSED,
        "F.scaled_dot_product_attention with a padding mask": FUSED,
        "attention with fewer heads for keys (GQA)": FUSED,
        "a looped transformer's block: sandwiched RMSNorm, SwiGLU, input by an adapter": FUSED,
        ONCE_DIFFERENTIABLE: ONCE,
    },
    "bf16 autocast": {
        "messages along edges by index_add, a graph as one sample": _MIXED,
        "nodes and edges, a dict": _MIXED,
        "graph attention by scatter, a graph as one sample": Limit(RuntimeError, "Expected self.dtype to be", NO_CAST),
        "a sparse matrix, the nodes of one graph as the batch": Limit(
            RuntimeError, "expected scalar type Float but found BFloat16", NO_CAST
        ),
    },
    "torch.func": {
        "torch.utils.checkpoint inside": Limit(
            RuntimeError, "don't yet support saved tensor hooks", "torch.func takes no checkpoints"
        ),
        "a custom autograd.Function": _SETUP,
        ONCE_DIFFERENTIABLE: _SETUP,
    },
}


def lstm_limit() -> Limit | None:
    """The limit of nn.LSTM under autocast on a processor without AVX-512, where oneDNN has no LSTM in bfloat16."""
    error = "could not create a primitive descriptor for the LSTM"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        try:
            nn.LSTM(2, 2)(torch.zeros(1, 1, 2))
        except RuntimeError as raised:
            if error in str(raised):
                return Limit(RuntimeError, error, "only where the processor has it")
            raise
    return None


# What the penalty cannot do in a mode, by mode: what its error says.
REFUSED: dict[str, dict[str, str]] = {
    "jvp": {
        "convolutions with BatchNorm in training mode": "changes buffers, .* use mode='vjp' or 'difference'",
        "a sparse matrix, the nodes of one graph as the batch": "without a forward-mode derivative: use mode='vjp' or",
        "torch.utils.checkpoint inside": "torch.utils.checkpoint, .* use mode='vjp' or 'difference'",
        "a custom autograd.Function": "without setup_context: use mode='vjp' or 'difference'",
        ONCE_DIFFERENTIABLE: "without setup_context: use mode='vjp' or 'difference'",
        "the gradient of an energy, by torch.autograd.grad": "calls torch.autograd.grad .*use mode='vjp' or",
        "an implicit layer inside: a linear system": "torch.linalg.solve's forward-mode .*: use mode='vjp' or",
    }
}
