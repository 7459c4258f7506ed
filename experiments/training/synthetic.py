"""Small computed data sets, for tests and to check that training works on a machine."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.data import Graph, Images


def synthetic_images(split: str, samples: int = 256, channels: int = 1, size: int = 8) -> Images:
    """Make images of four classes: one quadrant is brighter than the noise; uint8 (samples, channels, size, size)."""
    generator = torch.Generator("cpu").manual_seed({"train": 1, "test": 2}[split])
    labels = torch.randint(4, (samples,), generator=generator, device="cpu")
    images = torch.randint(
        0, 160, (samples, channels, size, size), generator=generator, dtype=torch.uint8, device="cpu"
    )
    half = size // 2
    for sample, label in enumerate(labels.tolist()):
        row, column = (label // 2) * half, (label % 2) * half
        images[sample, :, row : row + half, column : column + half] += 70
    return Images(images, labels, ("north-west", "north-east", "south-west", "south-east"))


def synthetic_text(vocabulary: int = 16) -> dict[str, Tensor]:
    """Make a Markov chain: in most places a token is the previous one plus 3."""
    splits = {}
    for seed, (split, length) in enumerate({"train": 4096, "valid": 512, "test": 512}.items()):
        generator = torch.Generator("cpu").manual_seed(seed)
        moves = torch.where(
            torch.rand(length, generator=generator, dtype=torch.float32, device="cpu") < 0.9,
            3,
            torch.randint(vocabulary, (length,), generator=generator, device="cpu"),
        )
        splits[split] = moves.cumsum(0) % vocabulary
    return splits


def synthetic_graph(nodes: int = 96, inputs: int = 8) -> Graph:
    """Make a graph of three communities, with most edges inside of them, and noisy features."""
    generator = torch.Generator("cpu").manual_seed(0)
    labels = torch.arange(nodes, device="cpu") % 3
    same = labels[:, None] == labels[None]
    linked = torch.rand(nodes, nodes, generator=generator, dtype=torch.float32, device="cpu") < torch.where(
        same, 0.15, 0.01
    )
    linked = (linked | linked.T) & ~torch.eye(nodes, dtype=torch.bool, device="cpu")
    centers = torch.randn(3, inputs, generator=generator, dtype=torch.float32, device="cpu")
    features = centers[labels] + 0.5 * torch.randn(
        nodes, inputs, generator=generator, dtype=torch.float32, device="cpu"
    )
    part = torch.arange(nodes, device="cpu") * 4 // nodes
    edges = linked.nonzero().T.contiguous()
    return Graph(features, labels, edges, part < 2, part == 2, part == 3, classes=3)
