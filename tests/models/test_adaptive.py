"""Adaptive embedding and softmax against one full table."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pydeq.models.adaptive import AdaptiveEmbedding, AdaptiveSoftmax

VOCABULARY, D_MODEL = 23, 8


def make(cutoffs, div, d_embed=8, **tying):
    embedding = AdaptiveEmbedding(VOCABULARY, d_embed, D_MODEL, cutoffs, div).double()
    softmax = AdaptiveSoftmax(VOCABULARY, d_embed, D_MODEL, cutoffs, div, **tying).double()
    for parameter in [*embedding.parameters(), *softmax.parameters()]:
        torch.nn.init.normal_(parameter)
    return embedding, softmax


def full_table(embedding):
    """[vocabulary, d_model]: each word's vector, projected."""
    projections = embedding.projections or [torch.eye(D_MODEL).double()] * len(embedding.tables)
    return torch.cat([table @ p.T for table, p in zip(embedding.tables, projections, strict=True)])


BANDS = st.sampled_from([((), 1), ((5,), 1), ((5, 12), 1), ((5, 12), 2), ((5, 6, 22), 2), ((), 2)])


@given(bands=BANDS, seed=st.integers(0, 9), shape=st.tuples(st.integers(0, 3), st.integers(1, 6)))
def test_embedding_is_a_lookup_in_the_projected_table(bands, seed, shape):
    torch.manual_seed(seed)
    embedding, _ = make(*bands)
    tokens = torch.randint(VOCABULARY, shape)
    torch.testing.assert_close(embedding(tokens), D_MODEL**0.5 * full_table(embedding)[tokens], rtol=1e-12, atol=1e-12)


@given(bands=BANDS, tie_weights=st.booleans(), seed=st.integers(0, 9))
def test_probabilities_sum_to_one_and_nll_picks_from_them(bands, tie_weights, seed):
    torch.manual_seed(seed)
    embedding, softmax = make(*bands, tie_weights=tie_weights)
    hidden, targets = torch.randn(2, 7, D_MODEL).double(), torch.randint(VOCABULARY, (2, 7))
    log_p = softmax.log_probabilities(hidden, embedding)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(2, 7).double(), rtol=1e-12, atol=0.0)
    nll = softmax(hidden, targets, embedding)
    torch.testing.assert_close(nll, -log_p.gather(-1, targets[..., None])[..., 0], rtol=1e-12, atol=1e-12)


def test_probabilities_are_by_band_and_then_by_word():
    torch.manual_seed(0)
    embedding, softmax = make((5, 12), 2)
    h = torch.randn(D_MODEL).double()
    scores = [
        table @ (projection.T @ h) + softmax.bias[begin:end]
        for table, projection, begin, end in zip(
            embedding.tables, softmax.projections, (0, 5, 12), (5, 12, VOCABULARY), strict=True
        )
    ]
    entries = softmax.band_vectors @ (softmax.projections[0].T @ h) + softmax.band_bias
    head = torch.cat([scores[0], entries]).log_softmax(0)
    expected = torch.cat([head[:5], head[5] + scores[1].log_softmax(0), head[6] + scores[2].log_softmax(0)])
    torch.testing.assert_close(softmax.log_probabilities(h, embedding), expected, rtol=1e-12, atol=1e-12)


def test_tying():
    torch.manual_seed(0)
    hidden, targets = torch.randn(1, 50, D_MODEL).double(), torch.randint(VOCABULARY, (1, 50))

    def reaches(**tying):
        embedding, softmax = make((5, 12), 2, **tying)
        softmax(hidden, targets, embedding).sum().backward()
        assert all(parameter.grad is not None for parameter in softmax.parameters())
        return [parameter.grad is not None for parameter in (*embedding.tables, *embedding.projections)]

    assert reaches(tie_weights=False) == [False] * 6
    assert reaches() == [True] * 3 + [False] * 3
    assert reaches(tie_projections=True) == [True] * 3 + [False, True, True]


def test_bands_without_words_get_gradients():
    embedding, softmax = make((5, 12), 2)
    tokens = torch.zeros(1, 2, dtype=torch.long)
    softmax(embedding(tokens), tokens, embedding).sum().backward()
    assert all(parameter.grad is not None for parameter in (*embedding.parameters(), *softmax.parameters()))


@pytest.mark.parametrize(
    ("cutoffs", "div", "d_embed", "message"),
    [
        ((5, 5), 1, 8, "cutoffs must rise"),
        ((30,), 1, 8, "cutoffs must rise"),
        ((0,), 1, 8, "cutoffs must rise"),
        ((5, 12), 3, 8, "d_embed must be at least div"),
        ((5,), 0, 8, "div must be at least 1"),
    ],
)
def test_bad_bands(cutoffs, div, d_embed, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveEmbedding(VOCABULARY, d_embed, D_MODEL, cutoffs, div)
