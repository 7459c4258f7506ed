"""Language modelling."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from experiments import data
from experiments.training.configuration import TrainingConfig
from experiments.training.distribution import Distribution
from experiments.training.synthetic import synthetic_text
from experiments.training.tasks.base import Score, Task
from pydeq.models import DEQTransformerConfig, Memory
from pydeq.solution import Solution


class Segment(NamedTuple):
    """A part of a step.

    Args:
        tokens, targets: (rows, length).
        rows: Indices of its rows among this rank's.
    """

    tokens: Tensor
    targets: Tensor
    rows: slice


class LanguageModelling(Task):
    """Prediction of the next word of a text; the metric is perplexity.

    The training text is cut into as many rows as a batch has. They are read in parallel, segment by segment, each with
    the memory of the previous one. An epoch begins without memory.
    """

    metric = "perplexity"

    def __init__(self, config: TrainingConfig, distribution: Distribution) -> None:
        super().__init__(config, distribution)
        assert isinstance(config.model, DEQTransformerConfig)
        share, length = self.share(config.batch, "rows"), config.data.length
        self.splits, vocabulary, self.vocabulary = _load(config)
        if vocabulary > config.model.vocabulary:
            raise ValueError(
                f"model.vocabulary must be at least that of {config.data.name}, {vocabulary}, got"
                f" {config.model.vocabulary}"
            )
        rows = _rows(self.splits["train"], config.batch)
        self.steps_per_epoch = (rows.shape[1] - 1) // length
        if not self.steps_per_epoch:
            raise ValueError(
                f"batch must leave rows of at least {length + 1} tokens, of {rows.numel()} in all, got {config.batch}"
            )
        self.rows = rows[distribution.rank * share : (distribution.rank + 1) * share]
        self.memory: Memory | None = None
        self._next: list[Memory] = []

    def parts(self, step: int) -> Sequence[Segment]:
        position = step % self.steps_per_epoch
        if self._next:
            self.memory = Memory(*(torch.cat(pieces) for pieces in zip(*self._next, strict=True)))
            self._next = []
        if position == 0:
            self.memory = None
        length = self.config.data.length
        words = self.rows[:, position * length : (position + 1) * length + 1].to(self.device)
        size = len(words) // self.config.accumulation
        places = [slice(begin, begin + size) for begin in range(0, len(words), size)]
        return [Segment(words[rows, :-1], words[rows, 1:], rows) for rows in places]

    def loss(self, model: nn.Module, part: Segment, **options: Any) -> tuple[Tensor, Solution]:
        memory = None if self.memory is None else Memory(*(each[part.rows] for each in self.memory))
        output, solution = model(part.tokens, part.targets, memory, return_solution=True, **options)
        self._next.append(output.memory)
        nll = output.nll
        return nll.to(torch.promote_types(nll.dtype, torch.float32)).mean(), solution

    def evaluate(self, model: nn.Module, split: str, **options: Any) -> Iterator[tuple[Score, Solution]]:
        tokens = self.splits["test" if split == "test" else "valid"]
        if split != "test":
            tokens = tokens[: self.config.evaluation.samples]
        memory: Memory | None = None
        with self._remembering(model):
            for words in self._segments(tokens):
                output, solution = model(words[:, :-1], words[:, 1:], memory, return_solution=True, **options)
                memory = output.memory
                loss = output.nll.double().sum()
                yield Score(loss, loss, output.nll.numel()), solution

    def probe(self, model: nn.Module, samples: int) -> None:
        words = next(self._segments(self.splits["valid"]))[:samples]
        model(words[:, :-1], words[:, 1:])

    def _segments(self, tokens: Tensor) -> Iterator[Tensor]:
        """Yield the segments of this rank's rows of a text, each with one token of the next; there may be no rows."""
        batch, length = self.config.evaluation.batch or self.config.batch, self.config.data.length
        rows = _rows(tokens, max(1, min(batch, len(tokens) // 2)))
        rows = rows.tensor_split(self.distribution.world)[self.distribution.rank].to(self.device)
        for begin in range(0, rows.shape[1] - 1, length):
            yield rows[:, begin : begin + length + 1]

    def _remembering(self, model: nn.Module) -> _MemoryLength:
        inner = getattr(model, "module", model)
        return _MemoryLength(inner, self.config.data.test_memory)

    def measure(self, hits: float, loss: float, count: int) -> float:
        return math.exp(min(loss / max(1, count), 700.0))

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for tokens in self.splits.values():
            digest.update(str(len(tokens)).encode())
            digest.update(tokens.contiguous().numpy().data)
        return digest.hexdigest()

    def state(self) -> dict[str, Tensor]:
        if not self._next:
            return {} if self.memory is None else self.memory._asdict()
        return {
            name: torch.cat(pieces) for name, pieces in zip(Memory._fields, zip(*self._next, strict=True), strict=True)
        }

    def load(self, state: dict[str, Tensor]) -> None:
        self.memory = Memory(**state)


class _MemoryLength:
    """Context manager in which a model remembers ``length`` tokens; None for no change."""

    def __init__(self, model: Any, length: int | None) -> None:
        self.model, self.length, self.before = model, length, model.memory_length

    def __enter__(self) -> None:
        if self.length is not None:
            self.model.memory_length = self.length

    def __exit__(self, *exception: object) -> None:
        self.model.memory_length = self.before


def _load(config: TrainingConfig) -> tuple[dict[str, Tensor], int, data.Vocabulary | None]:
    """Load the splits, the size of the vocabulary, and the vocabulary of a text."""
    settings = config.data
    if settings.name == "synthetic_text":
        return synthetic_text(), 16, None
    text = data.load_text(
        settings.name, settings.root, settings.level, settings.vocabulary_size, lowercase=settings.lowercase
    )
    return {"train": text.train, "valid": text.valid, "test": text.test}, text.vocabulary.size, text.vocabulary


def _rows(tokens: Tensor, batch: int) -> Tensor:
    """Cut a text into rows of equal length, (batch, length), without the rest at its end."""
    length = len(tokens) // batch
    return tokens[: batch * length].view(batch, length)
