"""The implicit graph network: an equilibrium of messages, so information travels any distance in the graph.

    Z = relu(A Z W^T + A X U^T + b),    A = D^(-1/2) (E + I) D^(-1/2)

for a graph with edges E, a loop at each node, and degrees D. The largest eigenvalue of A is 1. So there is one
equilibrium if ||W||_inf < 1: each row of W is scaled down to an l1 norm of at most ``bound``.

A graph is one sample: its nodes depend on each other, so they stop together. A batch of graphs is one graph without
edges between them.

Source: Gu, Chang, Zhu, Sojoudi and El Ghaoui, Implicit Graph Neural Networks, NeurIPS 2020.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pydeq.arguments import suggests_keywords
from pydeq.jacobian import JacobianPenalty
from pydeq.models.configuration import Config, check_at_least, check_unit_interval
from pydeq.models.equilibrium import EquilibriumModel, SolverConfig
from pydeq.nn import VariationalDropout, solve_scope
from pydeq.ops.capture import exporting


@suggests_keywords
@dataclass(frozen=True)
class IGNNConfig(Config):
    """An :class:`IGNN`.

    Args:
        inputs: Size of a node's features.
        hidden: Size of its state.
        outputs: Size of its scores.
        bound: Upper bound of ||W||_inf, below 1.
        dropout: Probability that an entry of the equilibrium is dropped before the output.
        solver: How the equilibrium is solved.

    Examples:
        >>> from pydeq import models
        >>> models.IGNNConfig(inputs=4, hidden=8, outputs=3).bound
        0.95
    """

    inputs: int
    hidden: int
    outputs: int
    bound: float = 0.95
    dropout: float = 0.0
    solver: SolverConfig = field(default_factory=SolverConfig)

    def check(self) -> None:
        check_at_least(self, 1, "inputs", "hidden", "outputs")
        check_unit_interval(self, "dropout")
        if not 0.0 < self.bound < 1.0:
            raise ValueError(f"bound must be in (0, 1), got {self.bound}")


class IGNNCell(nn.Module):
    """relu(A z W^T + injection), z (1, nodes, hidden)."""

    def forward(
        self, z: Tensor, injection: Tensor, W: Tensor, sources: Tensor, targets: Tensor, weights: Tensor
    ) -> Tensor:
        return functional.relu(_propagate(functional.linear(z, W), sources, targets, weights) + injection)


class IGNN(EquilibriumModel):
    """An implicit graph network that scores nodes.

    Args:
        config: Sizes and options.

    Examples:
        >>> from pydeq import models
        >>> model = models.IGNN(models.IGNNConfig(inputs=4, hidden=8, outputs=3))
        >>> edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> model(torch.ones(3, 4), edges).shape
        torch.Size([3, 3])
    """

    def __init__(self, config: IGNNConfig) -> None:
        super().__init__(IGNNCell(), config.solver)
        self.config = config
        self.recurrent = nn.Parameter(torch.empty(config.hidden, config.hidden))
        nn.init.uniform_(self.recurrent, -(config.hidden**-0.5), config.hidden**-0.5)
        self.injection = nn.Linear(config.inputs, config.hidden, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.hidden))
        self.dropout = VariationalDropout(config.dropout)
        self.output = nn.Linear(config.hidden, config.outputs)

    def bounded_weight(self) -> Tensor:
        """W, with each row scaled down to an l1 norm of at most ``bound``."""
        norms = self.recurrent.abs().sum(dim=1, keepdim=True)
        return self.recurrent * (self.config.bound / norms.clamp(min=self.config.bound))

    def forward(
        self,
        features: Tensor,
        edges: Tensor,
        *,
        return_solution: bool = False,
        layers: int | None = None,
        rtol: float | None = None,
        max_steps: int | None = None,
        penalty: JacobianPenalty | None = None,
    ) -> Any:
        """Score the nodes of a graph.

        Args:
            features: Features of the nodes, (nodes, inputs).
            edges: Pairs (from, to), integers (2, edges); an undirected edge must be given in both directions.
            return_solution: Also return the :class:`pydeq.Solution`, of a batch of one.
            layers: Apply the cell this many times instead of solving; see :meth:`EquilibriumModel.solve`.
            rtol: Relative tolerance of the solve; by default the configuration's.
            max_steps: Cap on the evaluations of the solve; by default the configuration's.
            penalty: A penalty to compute; the solution returns it.

        Returns:
            (nodes, outputs); with ``return_solution`` the pair (scores, solution).

        Raises:
            TypeError, ValueError: If an argument is of the wrong type, shape or range.
        """
        if features.dim() != 2 or features.shape[1] != self.config.inputs:
            raise ValueError(f"features must be of shape (nodes, {self.config.inputs}), got {tuple(features.shape)}")
        sources, targets, weights = normalized_edges(edges, features.shape[0], features.dtype)
        with solve_scope():
            z0 = self.bias.new_zeros(1, features.shape[0], self.config.hidden)
            injection = _propagate(self.injection(features)[None], sources, targets, weights) + self.bias
            z, solution = self.solve(
                z0, injection, self.bounded_weight(), sources, targets, weights, return_solution=return_solution,
                layers=layers, rtol=rtol, max_steps=max_steps, penalty=penalty,
            )  # fmt: skip
            scores = self.output(self.dropout(z[0]))
        return (scores, solution) if return_solution else scores


def normalized_edges(edges: Tensor, nodes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the entries of A: sources, targets and weights.

    Args:
        edges: Pairs (from, to), integers (2, edges).
        nodes: Number of nodes.
        dtype: Dtype of the weights.
    """
    if not isinstance(edges, Tensor) or edges.dtype != torch.int64:
        raise TypeError(f"edges must be a tensor of int64, got {getattr(edges, 'dtype', type(edges).__name__)}")
    if edges.dim() != 2 or edges.shape[0] != 2:
        raise ValueError(f"edges must be of shape (2, edges), got {tuple(edges.shape)}")
    if not exporting() and edges.numel() and (int(edges.min()) < 0 or int(edges.max()) >= nodes):
        raise ValueError(f"edges must name nodes in [0, {nodes}), got {int(edges.min())} to {int(edges.max())}")
    loops = torch.arange(nodes, device=edges.device)
    sources, targets = torch.cat([edges[0], loops]), torch.cat([edges[1], loops])
    ones = torch.ones(sources.shape[0], dtype=dtype, device=edges.device)
    # In a directed graph both ends have their own degree: A's largest singular value is then still at most 1.
    outgoing = torch.zeros(nodes, dtype=dtype, device=edges.device).index_add(0, sources, ones)
    incoming = torch.zeros(nodes, dtype=dtype, device=edges.device).index_add(0, targets, ones)
    return sources, targets, (outgoing[sources] * incoming[targets]).rsqrt()


def _propagate(x: Tensor, sources: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Compute A x, (1, nodes, features)."""
    messages = x.index_select(1, sources) * weights[:, None].to(x.dtype)
    return torch.zeros_like(x).index_add(1, targets, messages)
