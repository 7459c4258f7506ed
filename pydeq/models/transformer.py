"""The deep equilibrium transformer for language.

One Transformer-XL block, applied until its output no longer changes:

    u = U e(tokens) + c                                    the injection, once per call
    h = LN(z + attention(z; u, memory))                    post-LN
    f(z) = LN(h + feedforward(h))

    h = z + attention(LN(z); u, LN(memory))                pre-LN
    f(z) = LN(h) + feedforward(LN(h))

without affine parameters in LN. Pre-LN adds to the normalized h, as the published models do: f is bounded then. The
memory holds the equilibria and injections of earlier tokens. Its keys and values, and the projected positions, do not
depend on z: they are computed once per call, outside the iterations.

Sources: Bai, Kolter and Koltun, Deep Equilibrium Models, NeurIPS 2019; Bai, Koltun and Kolter, Stabilizing Equilibrium
Models by Jacobian Regularization, ICML 2021.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, overload

import torch
from torch import Tensor, nn
from torch.nn import functional

from pydeq.arguments import check_integer, suggests_keywords
from pydeq.cell.torch_compile import uncompiled
from pydeq.jacobian import JacobianPenalty
from pydeq.models.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from pydeq.models.configuration import Config, check_above_zero, check_at_least, check_unit_interval
from pydeq.models.equilibrium import EquilibriumModel, PenaltyConfig, SolverConfig
from pydeq.models.generation import Decoder, check_sampling, continued_text, sample
from pydeq.models.relative_attention import RelativeAttention
from pydeq.nn import SequenceDropout, solve_scope, weight_norm
from pydeq.ops.capture import exporting
from pydeq.solution import Solution


@suggests_keywords
@dataclass(frozen=True)
class DEQTransformerConfig(Config):
    """A :class:`DEQTransformerLM`.

    Args:
        vocabulary: Words, sorted by falling frequency where there are cutoffs.
        d_model: Width of the state.
        d_inner: Width of the feedforward layer.
        heads: Attention heads.
        d_head: Width of a head.
        d_embed: Width of the embedding's vectors; d_model by default.
        cutoffs: First words of the second and later bands of the vocabulary; see :class:`pydeq.models.adaptive.Bands`.
        div: Each band's vectors are narrower than those of the previous band by this factor.
        tie_weights: Whether the softmax shares the embedding's vectors.
        tie_projections: Whether it also shares the projections of all bands except the first one.
        pre_norm: Pre-LN instead of post-LN.
        weight_norm: Whether the block's weights are normalized, one length per row.
        dropout: Probability that a feature of a sequence is dropped.
        attention_dropout: Probability that an attention weight is dropped.
        memory_length: Tokens remembered from call to call, at least 0.
        window: Tokens at this distance and beyond are not attended to.
        init_std: Standard deviation of the initial weights.
        solver: How the equilibrium is solved.
        penalty: The Jacobian penalty that it was published with.

    Examples:
        >>> from pydeq import models
        >>> models.DEQTransformerConfig(vocabulary=50, d_model=16, d_inner=32, heads=2, d_head=8).pre_norm
        False
    """

    vocabulary: int
    d_model: int
    d_inner: int
    heads: int
    d_head: int
    d_embed: int | None = None
    cutoffs: tuple[int, ...] = ()
    div: int = 1
    tie_weights: bool = True
    tie_projections: bool = False
    pre_norm: bool = False
    weight_norm: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    memory_length: int = 0
    window: int = 1000
    init_std: float = 0.01
    solver: SolverConfig = field(default_factory=SolverConfig)
    penalty: PenaltyConfig | None = None

    def check(self) -> None:
        check_at_least(self, 1, "vocabulary", "d_model", "d_inner", "heads", "d_head", "d_embed", "div", "window")
        check_at_least(self, 0, "memory_length")
        check_unit_interval(self, "dropout", "attention_dropout")
        check_above_zero(self, "init_std")
        if self.d_model % 2:
            raise ValueError(f"d_model must be even, for sines and cosines of positions, got {self.d_model}")
        if self.tie_projections and not self.tie_weights:
            raise ValueError("tie_projections needs tie_weights")


class Memory(NamedTuple):
    """The memory that one call leaves for the next; it has no graph.

    Attributes:
        states: Equilibria of the last tokens, (batch, M, d_model).
        injection: Injections of the same tokens, (batch, M, 3 * heads * d_head).

    Examples:
        >>> from pydeq import models
        >>> size = {"vocabulary": 50, "d_model": 16, "d_inner": 32, "heads": 2, "d_head": 8}
        >>> model = models.DEQTransformerLM(models.DEQTransformerConfig(**size, memory_length=3))
        >>> memory = model(torch.arange(10).view(2, 5), max_steps=5).memory
        >>> memory.states.shape
        torch.Size([2, 3, 16])
    """

    states: Tensor
    injection: Tensor


class LMOutput(NamedTuple):
    """The output of a :class:`DEQTransformerLM`.

    Attributes:
        nll: -log p(target) of each position, (batch, L); None without targets.
        hidden: The equilibrium, (batch, L, d_model), with dropout in training.
        memory: For the next call.

    Examples:
        >>> from pydeq import models
        >>> config = models.DEQTransformerConfig(vocabulary=50, d_model=16, d_inner=32, heads=2, d_head=8)
        >>> output = models.DEQTransformerLM(config)(torch.arange(10).view(2, 5), max_steps=5)
        >>> output.hidden.shape, output.nll is None
        (torch.Size([2, 5, 16]), True)
    """

    nll: Tensor | None
    hidden: Tensor
    memory: Memory


class Vocabulary(Protocol):
    """The tokens of a text, such as :class:`experiments.data.Vocabulary`."""

    def __len__(self) -> int:
        """Number of tokens."""
        ...

    def encode(self, text: str) -> Tensor:
        """Convert a text to tokens, int64, (length,)."""
        ...

    def decode(self, tokens: Tensor) -> str:
        """Convert tokens, (length,), to a text."""
        ...


class DEQTransformerCell(nn.Module):
    """The block f(z, injection, keys, values, positions, mask); see :class:`RelativeAttention` for its arguments."""

    def __init__(self, config: DEQTransformerConfig) -> None:
        super().__init__()
        c = config
        self.pre_norm = c.pre_norm
        self.attention = RelativeAttention(c.d_model, c.heads, c.d_head, c.dropout, c.attention_dropout, c.window)
        self.feedforward = nn.Sequential(
            nn.Linear(c.d_model, c.d_inner),
            nn.ReLU(inplace=True),
            SequenceDropout(c.dropout),
            nn.Linear(c.d_inner, c.d_model),
            SequenceDropout(c.dropout),
        )

    def context(self, injection: Tensor, memory: Memory) -> tuple[Tensor, ...]:
        """Compute the arguments of :meth:`forward` that do not depend on the state."""
        length, remembered = injection.shape[1], memory.states.shape[1]
        keys, values = self.remember(*memory)
        positions = self.attention.positions(remembered + length, memory.states)
        return injection, keys, values, positions, self.attention.mask(remembered, length, memory.states)

    def remember(self, states: Tensor, injection: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the keys and values of a memory; see :meth:`RelativeAttention.remember`."""
        return self.attention.remember(_layer_norm(states) if self.pre_norm else states, injection)

    def forward(self, z: Tensor, *context: Tensor) -> Tensor:
        if self.pre_norm:
            h = _layer_norm(z + self.attention(_layer_norm(z), *context))
            return h + self.feedforward(h)
        h = _layer_norm(z + self.attention(z, *context))
        return _layer_norm(h + self.feedforward(h))


def _layer_norm(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:])


class DEQTransformerLM(EquilibriumModel):
    """A language model: it predicts the next word.

        model = DEQTransformerLM(config)
        (nll, hidden, memory), solution = model(tokens, targets, return_solution=True)
        text = model.eval().generate(tokens, 100)

    Args:
        config: Sizes and options.

    Examples:
        >>> from pydeq import models
        >>> config = models.DEQTransformerConfig(vocabulary=50, d_model=16, d_inner=32, heads=2, d_head=8)
        >>> tokens = torch.arange(10).view(2, 5)
        >>> models.DEQTransformerLM(config)(tokens, targets=tokens + 1, max_steps=5).nll.shape
        torch.Size([2, 5])
    """

    def __init__(self, config: DEQTransformerConfig) -> None:
        cell = DEQTransformerCell(config)
        super().__init__(cell, config.solver)
        self.config = config
        self.memory_length = config.memory_length
        """Tokens to remember. It may be set at any time, for example to evaluate with a longer memory."""
        self.generation_window = config.window
        """The window of :meth:`generate` by default. Distances beyond those of the training make poor text."""
        self.vocabulary: Vocabulary | None = None
        """Converts text to tokens and back, for :meth:`generate`. It may be set at any time."""
        bands = (config.vocabulary, config.d_embed or config.d_model, config.d_model, config.cutoffs, config.div)
        self.embedding = AdaptiveEmbedding(*bands)
        self.embedding_dropout = SequenceDropout(config.dropout)
        self.injection = nn.Linear(config.d_model, 3 * config.heads * config.d_head)
        self.output_dropout = SequenceDropout(config.dropout)
        self.softmax = AdaptiveSoftmax(*bands, config.tie_weights, config.tie_projections)
        self._reset_parameters(cell)

    def _reset_parameters(self, cell: DEQTransformerCell) -> None:
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        attention = cell.attention
        nn.init.normal_(attention.content_bias, std=std)
        nn.init.normal_(attention.position_bias, std=std)
        self.embedding.reset_parameters(std)
        self.softmax.reset_parameters(std)
        if self.config.weight_norm:
            first, second = (layer for layer in cell.feedforward if isinstance(layer, nn.Linear))
            for layer in (attention.qkv, attention.position, attention.output, first, second):
                weight_norm(layer, dim=0)

    def empty_memory(self, batch: int) -> Memory:
        """The memory before the first token."""
        states = self.injection.weight.new_empty(batch, 0, self.config.d_model)
        return Memory(states, states.new_empty(batch, 0, self.injection.out_features))

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        memory: Memory | None = None,
        *,
        return_solution: bool = False,
        layers: int | None = None,
        rtol: float | None = None,
        max_steps: int | None = None,
        penalty: JacobianPenalty | None = None,
    ) -> Any:
        """Compute the equilibrium of a segment of text, and the loss of its predictions.

        Args:
            tokens: Words, integers (batch, L).
            targets: The word after each token, integers (batch, L).
            memory: The memory returned for the preceding text.
            return_solution: Also return the :class:`pydeq.Solution`.
            layers: Apply the cell this many times instead of solving; see :meth:`EquilibriumModel.solve`.
            rtol: Relative tolerance of the solve; by default the configuration's.
            max_steps: Cap on the evaluations of the solve; by default the configuration's.
            penalty: A penalty to compute; the solution returns it.

        Returns:
            :class:`LMOutput`; with ``return_solution`` the pair (output, solution).

        Raises:
            TypeError, ValueError: If an argument is of the wrong type, shape or range.
        """
        self.check_words("tokens", tokens)
        if targets is not None:
            self.check_words("targets", targets)
            if targets.shape != tokens.shape:
                raise ValueError(
                    f"targets must have the shape of tokens, {tuple(tokens.shape)}, got {tuple(targets.shape)}"
                )
        batch, length = tokens.shape
        memory = self.empty_memory(batch) if memory is None else self._checked(memory, batch)
        with solve_scope():
            injection = self.inject(tokens)
            context = self.cell.context(injection, memory)
            z0 = self.injection.weight.new_zeros(batch, length, self.config.d_model)
            z, solution = self.solve(
                z0, *context, return_solution=return_solution, layers=layers, rtol=rtol, max_steps=max_steps,
                penalty=penalty,
            )  # fmt: skip
            hidden = self.output_dropout(z)
            nll = None if targets is None else self.softmax(hidden, targets, self.embedding)
        output = LMOutput(nll, hidden, self._remember(memory, z, injection))
        return (output, solution) if return_solution else output

    def inject(self, tokens: Tensor) -> Tensor:
        """Compute the injection of tokens, (batch, L, 3 * heads * d_head)."""
        return self.injection(self.embedding_dropout(self.embedding(tokens)))

    @property
    def cell(self) -> DEQTransformerCell:
        """The block, without a compiler around it."""
        cell = uncompiled(self.deq.cell)
        assert isinstance(cell, DEQTransformerCell)
        return cell

    def _checked(self, memory: Memory, batch: int) -> Memory:
        widths = (self.config.d_model, self.injection.out_features)
        for name, part, width in zip(Memory._fields, memory, widths, strict=True):
            if part.dim() != 3 or part.shape[0] != batch or part.shape[2] != width:
                raise ValueError(f"memory.{name} must be of shape ({batch}, M, {width}), got {tuple(part.shape)}")
        if memory.states.shape[1] != memory.injection.shape[1]:
            raise ValueError(
                f"memory.states and memory.injection must be of one length, got {memory.states.shape[1]} and"
                f" {memory.injection.shape[1]}"
            )
        return memory

    def _remember(self, memory: Memory, z: Tensor, injection: Tensor) -> Memory:
        def last(before: Tensor, now: Tensor) -> Tensor:
            both = torch.cat([before, now.detach().to(before.dtype)], dim=1)
            return both[:, both.shape[1] - min(self.memory_length, both.shape[1]) :].clone()

        with torch.no_grad():
            return Memory(last(memory.states, z), last(memory.injection, injection))

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """Compute log p of every next word, (batch, L, vocabulary); for small vocabularies."""
        return self.softmax.log_probabilities(hidden, self.embedding)

    def stream(
        self, tokens: Tensor, length: int, memory: Memory | None = None, **options: Any
    ) -> Iterator[tuple[LMOutput, Solution]]:
        """Read a long text in segments, without gradients; each segment gets the memory of the previous one.

            nll = torch.cat([output.nll for output, _ in model.eval().stream(tokens, 150)], dim=1)

        Args:
            tokens: Words, integers (batch, T); every word except the first is predicted from the words before it.
            length: Length of a segment, at least 1; the last one may be shorter.
            memory: The memory of the preceding text.
            options: ``rtol`` and ``max_steps``.

        Yields:
            The output and the solution of each segment.
        """
        if isinstance(length, bool) or not isinstance(length, int):
            raise TypeError(f"length must be an int, got {type(length).__name__}")
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.check_words("tokens", tokens)
        for begin in range(0, tokens.shape[1] - 1, length):
            segment = tokens[:, begin : begin + length + 1]
            with torch.no_grad():
                output, solution = self(segment[:, :-1], segment[:, 1:], memory, return_solution=True, **options)
            memory = output.memory
            yield output, solution

    @overload
    def generate(
        self, tokens: str, new_tokens: int, temperature: float = ..., top_k: int | None = ..., *,
        generator: torch.Generator | None = ..., window: int | None = ..., rtol: float | None = ...,
        max_steps: int | None = ..., suppress: Sequence[int] = ...,
    ) -> str: ...  # fmt: skip

    @overload
    def generate(
        self, tokens: Tensor, new_tokens: int, temperature: float = ..., top_k: int | None = ..., *,
        generator: torch.Generator | None = ..., window: int | None = ..., rtol: float | None = ...,
        max_steps: int | None = ..., suppress: Sequence[int] = ...,
    ) -> Tensor: ...  # fmt: skip

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor | str,
        new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        *,
        generator: torch.Generator | None = None,
        window: int | None = None,
        rtol: float | None = None,
        max_steps: int | None = None,
        suppress: Sequence[int] = (),
    ) -> Tensor | str:
        """Continue a text, word by word.

        The keys and values of earlier tokens are kept, and each step solves for one token; see
        :class:`pydeq.models.generation.Decoder`.

        Args:
            tokens: The beginning: words, integers (batch, L), or a text, if the model has a ``vocabulary``.
            new_tokens: Number of words to add.
            temperature: Below 1 for more probable words, above 1 for less probable ones; 0 for always the most probable
                one.
            top_k: Draw from only the k most probable words.
            generator: Random numbers, on the model's device; torch's own by default.
            window: Tokens at this distance and beyond are not attended to; by default ``generation_window``.
            rtol: Relative tolerance of the solves; by default the model's.
            max_steps: Cap on the evaluations of each solve; by default the model's.
            suppress: Words that are never drawn. For a text, the vocabulary's unknown word ``unk`` is one of them, if
                it has one.

        Returns:
            The beginning and the new words, (batch, L + new_tokens), or a text that begins with the given one.

        Raises:
            TypeError, ValueError: If an argument is of the wrong type, shape or range, or the model is in training
                mode.
        """
        if isinstance(tokens, str):
            if self.vocabulary is None:
                raise TypeError("tokens must be integers (batch, L): this model has no vocabulary to read a text with")
            words = self.vocabulary.encode(tokens)[None].to(self.injection.weight.device)
            unknown = getattr(self.vocabulary, "unk", None)
            continued = self.generate(
                words, new_tokens, temperature, top_k, generator=generator, window=window, rtol=rtol,
                max_steps=max_steps, suppress=suppress if unknown is None else (*suppress, unknown),
            )  # fmt: skip
            return continued_text(self.vocabulary, tokens, words[0], continued[0])
        check_integer("new_tokens", new_tokens, 0)
        check_sampling(temperature, top_k)
        known = self.config.vocabulary if self.vocabulary is None else len(self.vocabulary)
        suppressed = sorted({check_integer("suppress", word, 0) for word in suppress if word < known})
        if len(suppressed) == known:
            raise ValueError(f"suppress must leave a word to draw, got all {known}")
        decoder = Decoder(self, window=window, rtol=rtol, max_steps=max_steps)
        self.check_words("tokens", tokens)
        parts = [tokens]
        with solve_scope():  # for all words, so that normalized weights are computed once
            for _ in range(new_tokens):
                scores = decoder.read(parts[-1])
                if self.vocabulary is not None:  # a model may have room for more words
                    scores = scores[:, : len(self.vocabulary)]
                scores[:, suppressed] = -torch.inf
                parts.append(sample(scores, temperature, top_k, generator).to(tokens.dtype))
        return torch.cat(parts, dim=1)

    def check_words(self, name: str, words: Tensor) -> None:
        """Check integers (batch, length) in the vocabulary.

        Raises:
            TypeError, ValueError: If they are of the wrong type, shape or range; the message has the ``name``.
        """
        if not isinstance(words, Tensor) or words.dtype not in (torch.int64, torch.int32):
            got = words.dtype if isinstance(words, Tensor) else type(words).__name__
            raise TypeError(f"{name} must be a tensor of integers, got {got}")
        if words.dim() != 2 or words.shape[1] < 1:
            raise ValueError(
                f"{name} must be of shape (batch, length), with a length of at least 1, got {tuple(words.shape)}"
            )
        if not exporting() and words.numel() and not words.is_meta:
            vocabulary = self.config.vocabulary
            low, high = (int(bound) for bound in torch.aminmax(words))
            if low < 0 or high >= vocabulary:
                raise ValueError(f"{name} must be in [0, {vocabulary}), got {low if low < 0 else high}")
