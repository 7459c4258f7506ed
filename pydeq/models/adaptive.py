"""Adaptive embedding and adaptive softmax: frequent words get many dimensions, rare ones few.

The vocabulary, sorted by frequency, is cut into bands [c_i, c_{i+1}). Band i has vectors of d_embed // div^i entries
and a projection P_i to the model's width:

    embedding:  e(w) = sqrt(d_model) P_i E_i[w - c_i]
    softmax:    log p(w | h) = log softmax(head(h))[w]                                  for the first band,
                log p(w | h) = log softmax(head(h))[band i] + log softmax(E_i P_i^T h + b_i)[w - c_i]  else,

where the head scores the words of the first band and one entry for each other band.

Sources: Grave, Joulin, Cisse, Grangier and Jegou, Efficient Softmax Approximation for GPUs, ICML 2017; Baevski and
Auli, Adaptive Input Representations for Neural Language Modeling, ICLR 2019.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class Bands(nn.Module):
    """The vectors of a vocabulary, in bands, and their projections.

    Args:
        vocabulary: Words, at least 1.
        d_embed: Width of the first band's vectors.
        d_model: Width that they are projected to.
        cutoffs: First words of the second and later bands, rising, within the vocabulary.
        div: Each band's vectors are narrower than those of the previous band by this factor. With 1 there are
            projections only if d_embed differs from d_model.
    """

    def __init__(self, vocabulary: int, d_embed: int, d_model: int, cutoffs: Sequence[int] = (), div: int = 1) -> None:
        super().__init__()
        self.ends = bounds(vocabulary, d_embed, cutoffs, div)
        self.tables = nn.ParameterList()
        for i, (begin, end) in enumerate(itertools.pairwise(self.ends)):
            self.tables.append(nn.Parameter(torch.empty(end - begin, d_embed // div**i)))
        self.projections = make_projections(d_embed, d_model, len(self.tables), div)

    def reset_parameters(self, std: float) -> None:
        """Draw all entries from N(0, std^2)."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=std)


def bounds(vocabulary: int, d_embed: int, cutoffs: Sequence[int], div: int) -> tuple[int, ...]:
    """Return 0, the cutoffs and the size of the vocabulary: the ends of the bands.

    Raises:
        ValueError: If the ends do not rise, or a band's vectors have no entries.
    """
    if div < 1:
        raise ValueError(f"div must be at least 1, got {div}")
    ends = (0, *cutoffs, vocabulary)
    if any(begin >= end for begin, end in itertools.pairwise(ends)):
        raise ValueError(f"cutoffs must rise from above 0 to below the vocabulary's {vocabulary}, got {list(cutoffs)}")
    if d_embed // div ** len(cutoffs) < 1:
        raise ValueError(f"d_embed must be at least div ** bands, {div ** len(cutoffs)}, got {d_embed}")
    return ends


def make_projections(d_embed: int, d_model: int, bands: int, div: int) -> nn.ParameterList:
    """Make the P_i, [d_model, d_embed // div^i] each; an empty list if all bands have the model's width."""
    needed = div > 1 or d_embed != d_model
    return nn.ParameterList(
        [nn.Parameter(torch.empty(d_model, d_embed // div**i)) for i in range(bands)] if needed else []
    )


class AdaptiveEmbedding(Bands):
    """Embedding of words; for the arguments see :class:`Bands`."""

    def __init__(self, vocabulary: int, d_embed: int, d_model: int, cutoffs: Sequence[int] = (), div: int = 1) -> None:
        super().__init__(vocabulary, d_embed, d_model, cutoffs, div)
        self.width, self.scale = d_model, d_model**0.5

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed tokens, integers (batch, length), as (batch, length, d_model)."""
        if len(self.tables) == 1:
            return self.scale * self._project(functional.embedding(tokens, self.tables[0]), 0)
        flat = tokens.flatten()
        rows = []
        order = []
        # Bands without a word are included, so that every parameter gets a gradient, as DDP expects.
        for i, (begin, end) in enumerate(itertools.pairwise(self.ends)):
            where = ((flat >= begin) & (flat < end)).nonzero()[:, 0]
            order.append(where)
            rows.append(self._project(functional.embedding(flat[where] - begin, self.tables[i]), i))
        back = torch.cat(order).argsort()
        return self.scale * torch.cat(rows)[back].view(*tokens.shape, self.width)

    def _project(self, vectors: Tensor, band: int) -> Tensor:
        return functional.linear(vectors, self.projections[band]) if len(self.projections) else vectors


class AdaptiveSoftmax(nn.Module):
    """Log-probabilities of words.

    Args:
        vocabulary, d_embed, d_model, cutoffs, div: See :class:`Bands`.
        tie_weights: Whether to use the vectors of the embedding that :meth:`forward` gets, instead of vectors of its
            own.
        tie_projections: The same for the projections of all bands except the first.
    """

    def __init__(
        self,
        vocabulary: int,
        d_embed: int,
        d_model: int,
        cutoffs: Sequence[int] = (),
        div: int = 1,
        tie_weights: bool = True,
        tie_projections: bool = False,
    ) -> None:
        super().__init__()
        self.ends = bounds(vocabulary, d_embed, cutoffs, div)
        self.tie_weights, self.tie_projections = tie_weights, tie_projections
        if not tie_weights:
            self.bands = Bands(vocabulary, d_embed, d_model, cutoffs, div)
        own = make_projections(d_embed, d_model, len(cutoffs) + 1, div)
        if tie_projections:
            own = own[:1]
        self.projections = own if tie_weights else nn.ParameterList()
        self.bias = nn.Parameter(torch.empty(vocabulary))
        self.band_vectors = nn.Parameter(torch.empty(len(cutoffs), d_embed))
        self.band_bias = nn.Parameter(torch.empty(len(cutoffs)))

    def reset_parameters(self, std: float) -> None:
        """Draw all entries from N(0, std^2); set biases to 0."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=std)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.band_bias)

    def forward(self, hidden: Tensor, targets: Tensor, embedding: Bands) -> Tensor:
        """Compute -log p(target | hidden) at each position.

        Args:
            hidden: (batch, length, d_model).
            targets: Words, integers (batch, length).
            embedding: The model's embedding, whose vectors and projections are used if they are tied.

        Returns:
            (batch, length), at least float32.
        """
        flat, words = hidden.flatten(0, -2), targets.flatten()
        head = self._head(flat, embedding)
        rows, order = [], []
        for i, (begin, end) in enumerate(itertools.pairwise(self.ends)):
            where = ((words >= begin) & (words < end)).nonzero()[:, 0]
            inside = (words[where] - begin)[:, None]
            if i == 0:
                found = head[where].gather(1, inside)[:, 0]
            else:
                found = self._tail(flat[where], i, embedding).gather(1, inside)[:, 0] + head[where, self._entry(i)]
            order.append(where)
            rows.append(found)
        return -torch.cat(rows)[torch.cat(order).argsort()].view(targets.shape)

    def log_probabilities(self, hidden: Tensor, embedding: Bands) -> Tensor:
        """Compute log p of every word, (..., vocabulary); for small vocabularies."""
        head = self._head(hidden, embedding)
        parts = [head[..., : self.ends[1]]]
        for i in range(1, len(self.ends) - 1):
            parts.append(self._tail(hidden, i, embedding) + head[..., self._entry(i), None])
        return torch.cat(parts, dim=-1)

    def _entry(self, band: int) -> int:
        return self.ends[1] + band - 1

    def _head(self, hidden: Tensor, embedding: Bands) -> Tensor:
        vectors, projected = self._vectors(hidden, 0, embedding)
        weight = torch.cat([vectors, self.band_vectors])
        bias = torch.cat([self.bias[: self.ends[1]], self.band_bias])
        return _log_softmax(functional.linear(projected, weight, bias))

    def _tail(self, hidden: Tensor, band: int, embedding: Bands) -> Tensor:
        vectors, projected = self._vectors(hidden, band, embedding)
        return _log_softmax(functional.linear(projected, vectors, self.bias[self.ends[band] : self.ends[band + 1]]))

    def _vectors(self, hidden: Tensor, band: int, embedding: Bands) -> tuple[Tensor, Tensor]:
        """Return the band's vectors, and ``hidden`` projected to their space."""
        source = embedding if self.tie_weights else self.bands
        if not len(source.projections):
            return source.tables[band], hidden
        tied = self.tie_projections and band > 0
        if tied:
            projection = embedding.projections[band]
        else:
            projection = (self.projections if self.tie_weights else source.projections)[band]
        return source.tables[band], functional.linear(hidden, projection.mT)


def _log_softmax(scores: Tensor) -> Tensor:
    return scores.log_softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
