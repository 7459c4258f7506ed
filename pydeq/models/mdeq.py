"""Multiscale deep equilibrium models for images.

The state is a tuple of feature maps, one per resolution, each half as high and wide as the one before. One evaluation
is a residual block at each resolution, then a fusion of all resolutions:

    y_i = GN3(relu(GN2(drop(W2 relu(GN1(W1 z_i))) + x_i) + z_i))          x_0 the injection, x_i = 0 else
    f_i(z) = GN(P_i relu(sum_j R_ij(y_j)))

R_ij is the identity for i = j, a chain of strided 3x3 convolutions with GN down, and a 1x1 convolution with GN and
nearest interpolation up.

Sources: Bai, Koltun and Kolter, Multiscale Deep Equilibrium Models, NeurIPS 2020; Stabilizing Equilibrium Models by
Jacobian Regularization, ICML 2021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from pydeq.arguments import suggests_keywords
from pydeq.jacobian import JacobianPenalty
from pydeq.models.configuration import Config, check_above_zero, check_at_least, check_unit_interval
from pydeq.models.equilibrium import EquilibriumModel, PenaltyConfig, SolverConfig
from pydeq.models.image_heads import ClassificationHead, SegmentationHead
from pydeq.nn import VariationalDropout2d, solve_scope, weight_norm


@suggests_keywords
@dataclass(frozen=True)
class ClassificationConfig(Config):
    """A :class:`ClassificationHead`.

    Args:
        classes: Number of classes.
        channels: Inner channels of the bottleneck of each resolution.
        final: Channels before the pooling.

    Examples:
        >>> from pydeq import models
        >>> models.load_config("mdeq_cifar_tiny").classification
        ClassificationConfig(classes=10, channels=(8, 16), final=200)
    """

    classes: int
    channels: tuple[int, ...]
    final: int

    def check(self) -> None:
        check_at_least(self, 1, "classes", "final")
        if any(width < 1 for width in self.channels):
            raise ValueError(f"channels must be at least 1 each, got {list(self.channels)}")


@suggests_keywords
@dataclass(frozen=True)
class SegmentationConfig(Config):
    """A :class:`SegmentationHead`.

    Args:
        classes: Number of classes.
        kernel: Size of the last convolution, odd.

    Examples:
        >>> from pydeq import models
        >>> models.load_config("mdeq_cityscapes_small").segmentation
        SegmentationConfig(classes=19, kernel=1)
    """

    classes: int
    kernel: int = 1

    def check(self) -> None:
        check_at_least(self, 1, "classes")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")


@suggests_keywords
@dataclass(frozen=True)
class MDEQConfig(Config):
    """An :class:`MDEQ`.

    Args:
        channels: Channels of each resolution, the finest first.
        classification: The head of a classifier; exactly one of ``classification`` and ``segmentation``.
        segmentation: The head for segmentation.
        image_channels: Channels of the input.
        downsamplings: How many times the stem halves the image before the finest resolution.
        project_injection: Whether a 1x1 convolution with BN and ReLU follows the stem.
        expansion: Channels inside a block, as a multiple of the resolution's.
        groups: Groups of the group norms; the norms after the fusion have half as many.
        block_affine: Whether the norms of blocks have affine parameters.
        fusion_affine: Whether the norms of the fusion have affine parameters.
        post_affine: Whether the norms after the fusion have affine parameters.
        weight_norm: Whether the convolutions of blocks and after the fusion are normalized, one length per filter.
        dropout: Probability that a channel is dropped in a block.
        batch_norm_momentum: Momentum of the batch norms of stem and head.
        init_std: Standard deviation of the initial convolutions.
        solver: How the equilibrium is solved.
        penalty: The Jacobian penalty that it was published with.

    Examples:
        >>> from pydeq import models
        >>> head = models.ClassificationConfig(classes=10, channels=(4, 8), final=32)
        >>> models.MDEQConfig(channels=(8, 16), classification=head).expansion
        5
    """

    channels: tuple[int, ...]
    classification: ClassificationConfig | None = None
    segmentation: SegmentationConfig | None = None
    image_channels: int = 3
    downsamplings: int = 0
    project_injection: bool = False
    expansion: int = 5
    groups: int = 8
    block_affine: bool = True
    fusion_affine: bool = True
    post_affine: bool = False
    weight_norm: bool = True
    dropout: float = 0.0
    batch_norm_momentum: float = 0.1
    init_std: float = 0.01
    solver: SolverConfig = field(default_factory=SolverConfig)
    penalty: PenaltyConfig | None = None

    def check(self) -> None:
        if not self.channels:
            raise ValueError("channels must have an entry for each resolution, got none")
        check_at_least(self, 1, "image_channels", "expansion", "groups")
        check_at_least(self, 0, "downsamplings")
        check_unit_interval(self, "dropout", "batch_norm_momentum")
        check_above_zero(self, "init_std")
        for width in self.channels:
            if width < 1 or width % self.groups:
                raise ValueError(f"channels must be multiples of groups, {self.groups}, got {list(self.channels)}")
        if (self.classification is None) == (self.segmentation is None):
            raise ValueError("there must be one head: either classification or segmentation")
        if self.classification is not None and len(self.classification.channels) != len(self.channels):
            raise ValueError(
                f"classification.channels must have an entry for each of {len(self.channels)} resolutions, got"
                f" {list(self.classification.channels)}"
            )


class ResidualBlock(nn.Module):
    """GN3(relu(GN2(drop(W2 relu(GN1(W1 z))) + x) + z)) at one resolution."""

    def __init__(self, channels: int, config: MDEQConfig) -> None:
        super().__init__()
        inner, affine = config.expansion * channels, config.block_affine
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(config.groups, inner, affine=affine)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.dropout = VariationalDropout2d(config.dropout)
        self.norm2 = nn.GroupNorm(config.groups, channels, affine=affine)
        self.norm3 = nn.GroupNorm(config.groups, channels, affine=affine)

    def forward(self, z: Tensor, injection: Tensor | None = None) -> Tensor:
        """Apply the block: z and injection, (batch, channels, height, width) -> the same shape."""
        y = self.dropout(self.conv2(functional.relu(self.norm1(self.conv1(z)), inplace=True)))
        if injection is not None:
            y = y + injection
        return self.norm3(functional.relu(self.norm2(y) + z, inplace=True))


class Downsample(nn.Sequential):
    """Map resolution ``source`` to the coarser ``target``: a strided 3x3 convolution and GN for each halving."""

    def __init__(self, config: MDEQConfig, source: int, target: int) -> None:
        layers: list[nn.Module] = []
        width = config.channels[source]
        for i in range(source, target):
            last = i == target - 1
            out = config.channels[target] if last else width
            layers += [
                nn.Conv2d(width, out, 3, stride=2, padding=1, bias=False),
                nn.GroupNorm(config.groups, out, affine=config.fusion_affine),
            ]
            if not last:
                layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class Upsample(nn.Sequential):
    """Map resolution ``source`` to the finer ``target``: a 1x1 convolution and GN, before the interpolation."""

    def __init__(self, config: MDEQConfig, source: int, target: int) -> None:
        out = config.channels[target]
        super().__init__(
            nn.Conv2d(config.channels[source], out, 1, bias=False),
            nn.GroupNorm(config.groups, out, affine=config.fusion_affine),
        )


class MDEQCell(nn.Module):
    """The multiscale f(z, injection); z is a tuple of (batch, channels_i, height_i, width_i)."""

    def __init__(self, config: MDEQConfig) -> None:
        super().__init__()
        resolutions = range(len(config.channels))
        self.blocks = nn.ModuleList(ResidualBlock(width, config) for width in config.channels)
        # fusion[i][j] maps resolution j to i; j = i is the identity.
        self.fusion = nn.ModuleList(
            nn.ModuleList(
                nn.Identity() if i == j else Upsample(config, j, i) if j > i else Downsample(config, j, i)
                for j in resolutions
            )
            for i in resolutions
        )
        self.post = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 1, bias=False),
                nn.GroupNorm(max(1, config.groups // 2), width, affine=config.post_affine),
            )
            for width in config.channels
        )

    def forward(self, z: tuple[Tensor, ...], injection: Tensor) -> tuple[Tensor, ...]:
        y = [block(part, None if i else injection) for i, (block, part) in enumerate(zip(self.blocks, z, strict=True))]
        return tuple(self.post[i](self._fused(y, i)) for i in range(len(y)))

    def _fused(self, y: list[Tensor], target: int) -> Tensor:
        total = y[target]
        paths = self.fusion[target]
        assert isinstance(paths, nn.ModuleList)
        for source, path in enumerate(paths):
            if source == target:
                continue
            part = path(y[source])
            if source > target:
                part = functional.interpolate(part, size=total.shape[-2:])
            total = total + part
        return functional.relu(total)

    def normalized_layers(self) -> list[nn.Module]:
        """The convolutions that get weight norm: all except the convolutions of the fusion."""
        blocks = [conv for block in self.blocks for conv in block.children() if isinstance(conv, nn.Conv2d)]
        return blocks + [layer[0] for layer in self.post if isinstance(layer, nn.Sequential)]


class MDEQ(EquilibriumModel):
    """A multiscale deep equilibrium model.

        logits, solution = MDEQ(config)(images, return_solution=True)

    Args:
        config: Sizes and options.

    Examples:
        >>> from pydeq import models
        >>> head = models.ClassificationConfig(classes=10, channels=(4, 8), final=32)
        >>> model = models.MDEQ(models.MDEQConfig(channels=(8, 16), classification=head))
        >>> model(torch.ones(2, 3, 16, 16), max_steps=5).shape
        torch.Size([2, 10])
    """

    def __init__(self, config: MDEQConfig) -> None:
        cell = MDEQCell(config)
        super().__init__(cell, config.solver)
        self.config = config
        momentum, width = config.batch_norm_momentum, config.channels[0]
        layers: list[nn.Module] = []
        for i in range(max(2, config.downsamplings)):
            layers += [
                nn.Conv2d(
                    width if i else config.image_channels, width, 3, padding=1, bias=False,
                    stride=2 if i < config.downsamplings else 1,
                ),
                nn.BatchNorm2d(width, momentum=momentum),
                nn.ReLU(inplace=True),
            ]  # fmt: skip
        if config.project_injection:
            layers += [
                nn.Conv2d(width, width, 1, bias=False),
                nn.BatchNorm2d(width, momentum=momentum),
                nn.ReLU(inplace=True),
            ]
        self.stem = nn.Sequential(*layers)
        if config.classification is not None:
            head = config.classification
            self.head = ClassificationHead(config.channels, head.channels, head.final, head.classes, momentum)
        elif config.segmentation is not None:
            self.head = SegmentationHead(
                config.channels, config.segmentation.classes, config.segmentation.kernel, momentum
            )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=config.init_std)
                if module.bias is not None:
                    nn.init.normal_(module.bias, std=config.init_std)
        if config.weight_norm:
            for layer in cell.normalized_layers():
                weight_norm(layer, dim=0)

    def state_shapes(self, height: int, width: int) -> tuple[tuple[int, int, int], ...]:
        """Compute (channels, height, width) of each resolution for an image of this height and width."""
        shapes = []
        for i, channels in enumerate(self.config.channels):
            for _ in range(1 if i else self.config.downsamplings):
                height, width = (height + 1) // 2, (width + 1) // 2  # the output size of a strided 3x3 convolution
            shapes.append((channels, height, width))
        return tuple(shapes)

    def state_size(self, height: int, width: int) -> int:
        """Number of entries of the state per image."""
        return sum(math.prod(shape) for shape in self.state_shapes(height, width))

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
        """Classify images, or their pixels.

        Args:
            images: (batch, image_channels, height, width).
            return_solution: Also return the :class:`pydeq.Solution`, whose states are tuples of resolutions.
            layers: Apply the cell this many times instead of solving; see :meth:`EquilibriumModel.solve`.
            rtol: Relative tolerance of the solve; by default the configuration's.
            max_steps: Cap on the evaluations of the solve; by default the configuration's.
            penalty: A penalty to compute; the solution returns it.

        Returns:
            Logits, (batch, classes); for segmentation (batch, classes, height, width) of the finest resolution. With
            ``return_solution`` the pair (logits, solution).

        Raises:
            ValueError: If the images have another shape.
        """
        z, solution = self.equilibrium(
            images, return_solution=return_solution, layers=layers, rtol=rtol, max_steps=max_steps, penalty=penalty
        )
        logits = self.head(z)
        return (logits, solution) if return_solution else logits

    def equilibrium(self, images: Tensor, **options: Any) -> tuple[Sequence[Tensor], Any]:
        """Solve for the equilibrium: its resolutions and the solution. Options: see :meth:`EquilibriumModel.solve`."""
        if images.dim() != 4 or images.shape[1] != self.config.image_channels:
            raise ValueError(
                f"images must be of shape (batch, {self.config.image_channels}, height, width), got"
                f" {tuple(images.shape)}"
            )
        weight = self.stem[0].weight
        assert isinstance(weight, Tensor)
        with solve_scope():
            injection = self.stem(images)
            shapes = self.state_shapes(images.shape[2], images.shape[3])
            z0 = tuple(weight.new_zeros(images.shape[0], *shape) for shape in shapes)
            return self.solve(z0, injection, **options)
