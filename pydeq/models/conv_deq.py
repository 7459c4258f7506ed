"""A convolutional starter at one resolution, small enough to train anywhere.

    f(z, x) = GN(relu(z + GN(x + V * GN(relu(W * z)))))

Source: Kolter, Duvenaud and Johnson, Deep Implicit Layers, NeurIPS 2020 tutorial, chapter 4.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from pydeq.arguments import suggests_keywords
from pydeq.jacobian import JacobianPenalty
from pydeq.models.configuration import Config, check_at_least, check_unit_interval
from pydeq.models.equilibrium import EquilibriumModel, SolverConfig
from pydeq.nn import VariationalDropout2d, solve_scope


@suggests_keywords
@dataclass(frozen=True)
class ConvDEQConfig(Config):
    """A :class:`ConvDEQ`.

    Args:
        image_channels: Channels of the input.
        classes: Number of classes.
        channels: Channels of the state.
        inner: Channels inside the cell.
        groups: Groups of the group norms.
        stride: Stride of the stem: the state is smaller than the image by this factor.
        stem_channels: Channels of convolutions before the stem's last one, each with BN and ReLU. Without them the stem
            is one convolution of 3x3, which skips pixels if the stride is more than 3. With them each convolution of
            the stem has stride 2, so that the stride must be 2 to the power of their number.
        dropout: Probability that a channel is dropped in the cell; the mask is fixed during a solve.
        init_std: Standard deviation of the cell's initial weights.
        solver: How the equilibrium is solved.

    Examples:
        >>> from pydeq import models
        >>> models.ConvDEQConfig(image_channels=1, classes=10).channels
        48
    """

    image_channels: int
    classes: int
    channels: int = 48
    inner: int = 64
    groups: int = 8
    stride: int = 1
    stem_channels: tuple[int, ...] = ()
    dropout: float = 0.0
    init_std: float = 0.01
    solver: SolverConfig = field(default_factory=SolverConfig)

    def check(self) -> None:
        check_at_least(self, 1, "image_channels", "classes", "channels", "inner", "groups", "stride")
        for index, channels in enumerate(self.stem_channels):
            if channels < 1:
                raise ValueError(f"stem_channels[{index}] must be at least 1, got {channels}")
        halved = 2 ** (len(self.stem_channels) + 1)
        if self.stem_channels and self.stride != halved:
            raise ValueError(
                f"stride must be {halved} with {len(self.stem_channels)} stem_channels, since each convolution halves"
                f" the image, got {self.stride}"
            )
        check_unit_interval(self, "dropout")
        check_at_least(self, 0, "init_std")
        for name in ("channels", "inner"):
            if getattr(self, name) % self.groups:
                raise ValueError(f"{name} must be a multiple of groups, {self.groups}, got {getattr(self, name)}")


class ConvCell(nn.Module):
    """The cell f(z, x); z and x are (batch, channels, height, width)."""

    def __init__(self, config: ConvDEQConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(config.channels, config.inner, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(config.groups, config.inner)
        self.conv2 = nn.Conv2d(config.inner, config.channels, 3, padding=1, bias=False)
        self.dropout = VariationalDropout2d(config.dropout)
        self.norm2 = nn.GroupNorm(config.groups, config.channels)
        self.norm3 = nn.GroupNorm(config.groups, config.channels)
        nn.init.normal_(self.conv1.weight, std=config.init_std)
        nn.init.normal_(self.conv2.weight, std=config.init_std)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        y = self.norm1(functional.relu(self.conv1(z)))
        y = self.norm2(x + self.dropout(self.conv2(y)))
        return self.norm3(functional.relu(z + y))


class ConvDEQ(EquilibriumModel):
    """An image classifier around one convolutional equilibrium.

    Args:
        config: Sizes and options.

    Examples:
        >>> from pydeq import models
        >>> model = models.ConvDEQ(models.ConvDEQConfig(image_channels=1, classes=10, channels=8, inner=8))
        >>> model(torch.ones(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(self, config: ConvDEQConfig) -> None:
        super().__init__(ConvCell(config), config.solver)
        self.config = config
        widths = (config.image_channels, *config.stem_channels, config.channels)
        stride = 2 if config.stem_channels else config.stride
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=stride, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.stem = nn.Sequential(*layers[:-1])  # the injection has both signs
        self.norm = nn.BatchNorm2d(config.channels)
        self.classifier = nn.Linear(config.channels, config.classes)

    def forward(
        self,
        images: Tensor,
        *,
        return_solution: bool = False,
        layers: int | None = None,
        rtol: float | None = None,
        max_steps: int | None = None,
        penalty: JacobianPenalty | None = None,
    ) -> Any:
        """Classify images: the logits, (batch, classes).

        Args:
            images: (batch, image_channels, height, width).
            return_solution: Also return the :class:`pydeq.Solution`.
            layers: Apply the cell this many times instead of solving; see :meth:`EquilibriumModel.solve`.
            rtol: Relative tolerance of the solve; by default the configuration's.
            max_steps: Cap on the evaluations of the solve; by default the configuration's.
            penalty: A penalty to compute; the solution returns it.
        """
        if images.dim() != 4 or images.shape[1] != self.config.image_channels:
            raise ValueError(
                f"images must be of shape (batch, {self.config.image_channels}, height, width), got"
                f" {tuple(images.shape)}"
            )
        with solve_scope():
            x = self.stem(images)
            z0 = self.classifier.weight.new_zeros(x.shape)
            z, solution = self.solve(
                z0, x, return_solution=return_solution, layers=layers, rtol=rtol, max_steps=max_steps, penalty=penalty
            )
        logits = self.classifier(self.norm(z).mean((-2, -1)))
        return (logits, solution) if return_solution else logits
