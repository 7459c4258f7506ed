"""Classification of the nodes of a graph."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from experiments import data
from experiments.training.configuration import TrainingConfig
from experiments.training.distribution import Distribution
from experiments.training.synthetic import synthetic_graph
from experiments.training.tasks.base import Score, Task, floating
from pydeq.models import IGNNConfig
from pydeq.solution import Solution


class NodeClassification(Task):
    """Classification of nodes by cross entropy, with the whole graph in each step; the metric is accuracy."""

    metric = "accuracy"
    steps_per_epoch = 1

    def __init__(self, config: TrainingConfig, distribution: Distribution) -> None:
        super().__init__(config, distribution)
        assert isinstance(config.model, IGNNConfig)
        if distribution.world > 1 or config.accumulation > 1:
            raise ValueError("a graph is one sample: it trains on one process, without accumulation")
        settings = config.data
        graph = synthetic_graph() if settings.name == "synthetic_graph" else data.load_graph(
            settings.name, settings.root
        )  # fmt: skip
        if settings.row_normalized:
            graph = graph.row_normalized()
        self.graph = graph
        for name, expected in (("inputs", graph.features.shape[1]), ("outputs", graph.classes)):
            got = getattr(config.model, name)
            if got != expected:
                raise ValueError(f"model.{name} must be that of {settings.name}, {expected}, got {got}")
        self.inputs = graph.features.to(**floating(self.device)), graph.edges.to(self.device)
        self.labels = graph.labels.to(self.device)
        self.masks = {
            "train": graph.train.to(self.device), "validation": graph.valid.to(self.device),
            "test": graph.test.to(self.device),
        }  # fmt: skip

    def parts(self, step: int) -> Sequence[str]:
        return ["train"]

    def loss(self, model: nn.Module, part: str, **options: Any) -> tuple[Tensor, Solution]:
        scores, solution = model(*self.inputs, return_solution=True, **options)
        mask = self.masks[part]
        return functional.cross_entropy(scores[mask], self.labels[mask]), solution

    def evaluate(self, model: nn.Module, split: str, **options: Any) -> Iterator[tuple[Score, Solution]]:
        scores, solution = model(*self.inputs, return_solution=True, **options)
        mask = self.masks[split]
        scores, labels = scores[mask], self.labels[mask]
        loss = functional.cross_entropy(scores, labels, reduction="sum")
        yield Score(loss, (scores.argmax(1) == labels).sum(), len(labels)), solution

    def probe(self, model: nn.Module, samples: int) -> None:
        model(*self.inputs)

    def measure(self, hits: float, loss: float, count: int) -> float:
        return hits / max(1, count)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        graph = self.graph
        for tensor in (graph.features, graph.labels, graph.edges, graph.train, graph.valid, graph.test):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()
