"""Every model, small and in float64, as contractive as an exact comparison needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pydeq import models

EXACT = {"rtol": 1e-12, "max_steps": 150, "backward": "broyden", "backward_rtol": 1e-12, "backward_max_steps": 150}


def transformer(*, seed: int = 0, **options: Any) -> models.DEQTransformerLM:
    torch.manual_seed(seed)
    sizes = {"vocabulary": 40, "d_model": 12, "d_inner": 20, "heads": 2, "d_head": 6, "cutoffs": (10, 20), "div": 2}
    config = models.DEQTransformerConfig(**(sizes | {"init_std": 0.25, "solver": EXACT} | options))
    return models.DEQTransformerLM(config).double()


def mdeq(channels: tuple[int, ...] = (8, 8), *, seed: int = 0, **options: Any) -> models.MDEQ:
    torch.manual_seed(seed)
    head = {"classification": {"classes": 5, "channels": [2] * len(channels), "final": 6}}
    if "segmentation" in options:
        head = {}
    sizes = {"image_channels": 2, "groups": 4, "expansion": 1, "post_affine": True, "solver": EXACT} | head
    model = models.MDEQ(models.MDEQConfig(channels=channels, **(sizes | options))).double()
    # Norms undo a small scale, so that a new cell does not contract; constant features under the varying ones do it.
    for block in model.deq.cell.blocks:
        torch.nn.init.constant_(block.norm1.weight, 0.2)
        torch.nn.init.constant_(block.norm1.bias, 1.0)
    for post in model.deq.cell.post:  # small compared with what it is added to
        torch.nn.init.constant_(post[1].weight, 0.3)
    return model


def mlp(*, seed: int = 0, **options: Any) -> models.ImplicitMLP:
    torch.manual_seed(seed)
    config = models.ImplicitMLPConfig(**({"inputs": 4, "hidden": 7, "outputs": 3, "solver": EXACT} | options))
    return models.ImplicitMLP(config).double()


def conv(*, seed: int = 0, gain: float = 0.3, **options: Any) -> models.ConvDEQ:
    torch.manual_seed(seed)
    sizes = {"image_channels": 2, "classes": 3, "channels": 8, "inner": 8, "groups": 4, "solver": EXACT}
    model = models.ConvDEQ(models.ConvDEQConfig(**(sizes | options))).double()
    torch.nn.init.constant_(model.deq.cell.norm3.weight, gain)
    return model


def ignn(*, seed: int = 0, **options: Any) -> models.IGNN:
    torch.manual_seed(seed)
    config = models.IGNNConfig(**({"inputs": 4, "hidden": 6, "outputs": 3, "bound": 0.8, "solver": EXACT} | options))
    return models.IGNN(config).double()


def graph(nodes: int, generator: torch.Generator) -> Tensor:
    """A ring with chords, both ways."""
    ring = torch.stack([torch.arange(nodes), (torch.arange(nodes) + 1) % nodes])
    chords = torch.randint(nodes, (2, nodes), generator=generator)
    edges = torch.cat([ring, chords], dim=1)
    return torch.cat([edges, edges.flip(0)], dim=1)


@dataclass(frozen=True)
class Case:
    """A model and a task for it.

    Args:
        make: make(**options) -> the model; options as of its configuration, and ``seed``.
        inputs: inputs(generator) -> positional arguments, float64 where they are floats.
        loss: loss(output) -> 0-d.
    """

    make: Callable[..., Any]
    inputs: Callable[[torch.Generator], tuple[Any, ...]]
    loss: Callable[[Any], Tensor]


def _images(generator: torch.Generator) -> tuple[Tensor]:
    return (torch.randn(4, 2, 6, 5, generator=generator, dtype=torch.float64),)


def _words(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    words = torch.randint(40, (3, 8), generator=generator)
    return words[:, :-1], words[:, 1:]


def _nodes(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(9, 4, generator=generator, dtype=torch.float64), graph(9, generator)


def _first_class(logits: Tensor) -> Tensor:
    return -logits.log_softmax(1)[:, 0].mean()


CASES = {
    "transformer, post-LN": Case(transformer, _words, lambda output: output.nll.mean()),
    "transformer, pre-LN": Case(
        lambda **options: transformer(pre_norm=True, **options), _words, lambda output: output.nll.mean()
    ),
    "mdeq": Case(mdeq, _images, _first_class),
    "mdeq, segmentation": Case(lambda **options: mdeq(segmentation={"classes": 3}, **options), _images, _first_class),
    "implicit mlp": Case(
        mlp, lambda generator: (torch.randn(5, 4, generator=generator, dtype=torch.float64),), _first_class
    ),
    "conv deq": Case(conv, _images, _first_class),
    "ignn": Case(ignn, _nodes, _first_class),
}
