"""The smallest model: z = tanh(W z + U x + b), and a linear map of the equilibrium."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pydeq.arguments import suggests_keywords
from pydeq.jacobian import JacobianPenalty
from pydeq.models.configuration import Config, check_above_zero, check_at_least, check_unit_interval
from pydeq.models.equilibrium import EquilibriumModel, SolverConfig
from pydeq.nn import VariationalDropout, solve_scope, spectral_norm


@suggests_keywords
@dataclass(frozen=True)
class ImplicitMLPConfig(Config):
    """An :class:`ImplicitMLP`.

    Args:
        inputs: Size of the input.
        hidden: Size of the state.
        outputs: Size of the output.
        bound: Upper bound of the spectral norm of W; below 1 there is one equilibrium for each input. None leaves
            W free.
        dropout: Probability that an entry of the state is dropped; the mask is fixed during a solve.
        solver: How the equilibrium is solved.

    Examples:
        >>> from pydeq import models
        >>> models.ImplicitMLPConfig(inputs=3, hidden=16, outputs=2).bound
        0.9
    """

    inputs: int
    hidden: int
    outputs: int
    bound: float | None = 0.9
    dropout: float = 0.0
    solver: SolverConfig = field(default_factory=SolverConfig)

    def check(self) -> None:
        check_at_least(self, 1, "inputs", "hidden", "outputs")
        check_unit_interval(self, "dropout")
        check_above_zero(self, "bound")


class ImplicitMLPCell(nn.Module):
    """The cell f(z, injection) = tanh(W drop(z) + injection)."""

    def __init__(self, config: ImplicitMLPConfig) -> None:
        super().__init__()
        self.recurrent = nn.Linear(config.hidden, config.hidden, bias=False)
        self.dropout = VariationalDropout(config.dropout)
        if config.bound is not None:
            spectral_norm(self.recurrent, bound=config.bound, clip=True)

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        return torch.tanh(self.recurrent(self.dropout(z)) + injection)


class ImplicitMLP(EquilibriumModel):
    """An implicit multilayer perceptron.

    Args:
        config: Sizes and options.

    Source: El Ghaoui, Gu, Travacca, Askari and Tsai, Implicit Deep Learning, SIAM J. Math. Data Science 3, 2021.

    Examples:
        >>> from pydeq import models
        >>> model = models.ImplicitMLP(models.ImplicitMLPConfig(inputs=3, hidden=16, outputs=2))
        >>> model(torch.ones(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(self, config: ImplicitMLPConfig) -> None:
        super().__init__(ImplicitMLPCell(config), config.solver)
        self.config = config
        self.injection = nn.Linear(config.inputs, config.hidden)
        self.output = nn.Linear(config.hidden, config.outputs)

    def forward(
        self,
        x: Tensor,
        *,
        return_solution: bool = False,
        layers: int | None = None,
        rtol: float | None = None,
        max_steps: int | None = None,
        penalty: JacobianPenalty | None = None,
    ) -> Any:
        """Map x to the outputs, (batch, outputs).

        Args:
            x: The input, (batch, inputs).
            return_solution: Also return the :class:`pydeq.Solution`.
            layers: Apply the cell this many times instead of solving; see :meth:`EquilibriumModel.solve`.
            rtol: Relative tolerance of the solve; by default the configuration's.
            max_steps: Cap on the evaluations of the solve; by default the configuration's.
            penalty: A penalty to compute; the solution returns it.
        """
        if x.dim() != 2 or x.shape[1] != self.config.inputs:
            raise ValueError(f"x must be of shape (batch, {self.config.inputs}), got {tuple(x.shape)}")
        with solve_scope():
            z0 = self.injection.weight.new_zeros(x.shape[0], self.config.hidden)
            z, solution = self.solve(
                z0, self.injection(x), return_solution=return_solution, layers=layers, rtol=rtol,
                max_steps=max_steps, penalty=penalty,
            )  # fmt: skip
        y = self.output(z)
        return (y, solution) if return_solution else y
