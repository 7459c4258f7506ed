"""Generation of text, one equilibrium for each new token.

With causal attention, the equilibrium of token i depends on the tokens up to i only:

    z_i = f(z_i; u_i, (k_j, v_j) for j < i),    k_j, v_j from z_j and u_j

So a new token leaves the equilibria of the earlier ones as they are. Their keys and values are kept, and a step solves
for one token. The model's window bounds how many are kept.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pydeq.arguments import check_integer, check_number
from pydeq.nn import solve_scope
from pydeq.solution import Solution

if TYPE_CHECKING:
    from pydeq.models.transformer import DEQTransformerLM, Vocabulary


class Decoder:
    """Reads a text piece by piece, and predicts the next word after each piece; without gradients.

        decoder = Decoder(model.eval())
        scores = decoder.read(prompt)             # (batch, vocabulary)
        scores = decoder.read(scores.argmax(1, keepdim=True))

    Args:
        model: A language model in evaluation mode.
        window: Tokens at this distance and beyond are not attended to; by default the model's ``generation_window``.
        rtol: Relative tolerance of the solves; by default the model's.
        max_steps: Cap on the evaluations of each solve; by default the model's.

    Attributes:
        nfe: Evaluations of f so far.
        token_evaluations: The same, each counted as often as it has tokens in a row of the batch.
        solution: The solution of the last piece.

    Raises:
        TypeError, ValueError: If an argument is of the wrong type or range, or the model is in training mode.
    """

    def __init__(
        self, model: DEQTransformerLM, *, window: int | None = None, rtol: float | None = None,
        max_steps: int | None = None,
    ) -> None:  # fmt: skip
        if model.training:
            raise ValueError("generation needs the model in evaluation mode: call model.eval() first")
        self.model = model
        self.window = model.generation_window if window is None else check_integer("window", window, 1)
        self.options: dict[str, Any] = {"rtol": rtol, "max_steps": max_steps}
        self.nfe = self.token_evaluations = 0
        self.solution: Solution | None = None
        self._keys: Tensor | None = None  # [batch, heads, M, d_head]
        self._values: Tensor | None = None
        self._positions: Tensor | None = None  # [heads, length, d_head], distances falling to 0

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """Read the next tokens.

        Args:
            tokens: Words, integers (batch, L), after those that were read before.

        Returns:
            log p of each word to come next, (batch, vocabulary), at least float32.

        Raises:
            TypeError, ValueError: If tokens are of the wrong type, shape or range.
        """
        model, cell = self.model, self.model.cell
        model.check_words("tokens", tokens)
        batch, length = tokens.shape
        if self._keys is not None and len(self._keys) != batch:
            raise ValueError(f"tokens must have as many rows as those read before, {len(self._keys)}, got {batch}")
        with solve_scope():
            injection = model.inject(tokens)
            z0 = injection.new_zeros(batch, length, model.config.d_model, dtype=model.injection.weight.dtype)
            if self._keys is None or self._values is None:
                self._keys, self._values = cell.remember(z0[:, :0], injection[:, :0])
            remembered = self._keys.shape[2]
            z, solution = model.solve(
                z0, injection, self._keys, self._values, self._projected_positions(remembered + length, z0),
                cell.attention.mask(remembered, length, z0, self.window), **self.options,
            )  # fmt: skip
            keys, values = cell.remember(z, injection)
            self._keys, self._values = self._kept(self._keys, keys), self._kept(self._values, values)
            self.solution = solution
            self.nfe += solution.nfe
            self.token_evaluations += solution.nfe * length
            return model.log_probabilities(z[:, -1])

    def _projected_positions(self, length: int, like: Tensor) -> Tensor:
        known = self._positions
        if known is None or known.shape[1] < length:
            # They do not depend on the text: compute some more than are needed now.
            ahead = min(2 * length, max(length, self.window))
            known = self._positions = self.model.cell.attention.positions(ahead, like)
        return known[:, known.shape[1] - length :]

    def _kept(self, before: Tensor, new: Tensor) -> Tensor:
        """Keys or values that a later token may attend to."""
        both = torch.cat([before.to(new.dtype), new], dim=2)
        return both[:, :, max(0, both.shape[2] - (self.window - 1)) :]


def sample(scores: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Draw one word of each row.

    Args:
        scores: log p, (batch, vocabulary).
        temperature: Divides log p; 0 takes the most probable word, and so does a tiny one.
        top_k: Draw from only the k most probable words.
        generator: Random numbers; torch's own by default.

    Returns:
        (batch, 1), int64.
    """
    if temperature == 0.0:
        return scores.argmax(1, keepdim=True)
    if top_k is not None:
        least = scores.topk(min(top_k, scores.shape[1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    # The largest score becomes 0, and the temperature a number of their dtype: then no quotient is NaN.
    limits = torch.finfo(scores.dtype)
    temperature = min(max(temperature, limits.tiny), limits.max)
    scaled = (scores - scores.amax(1, keepdim=True)) / temperature
    return torch.multinomial(scaled.softmax(1), 1, generator=generator)


def check_sampling(temperature: float, top_k: int | None) -> None:
    """Check the arguments of :func:`sample`.

    Raises:
        TypeError, ValueError: If one is of the wrong type or out of range.
    """
    if not 0.0 <= check_number("temperature", temperature) < math.inf:
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    if top_k is not None:
        check_integer("top_k", top_k, 1)


def continued_text(vocabulary: Vocabulary, prompt: str, words: Tensor, continued: Tensor) -> str:
    """Join a prompt, as it was given, and the text of the words that follow it.

    Args:
        vocabulary: Decodes words.
        prompt: The prompt.
        words: Its words, (length,).
        continued: Its words and the new ones, (longer,).
    """
    # Decode both together, since a space between two words belongs to neither of them.
    beginning, whole = vocabulary.decode(words), vocabulary.decode(continued)
    if not whole.startswith(beginning):
        return prompt + vocabulary.decode(continued[len(words) :])
    end = whole[len(beginning) :]
    if prompt[-1:].isspace() and not beginning[-1:].isspace():  # words are joined by a space, which the prompt has
        end = end.removeprefix(" ")
    return prompt + end
