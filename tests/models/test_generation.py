"""Generated text: one solve for each new token gives the scores of solving the whole text again, for far less."""

import pytest
import torch
from small_models import EXACT, transformer

from pydeq.models.generation import Decoder, sample
from pydeq.nn.normalization import WeightNorm


@pytest.fixture(params=[False, True], ids=["post-LN", "pre-LN"])
def pre_norm(request):
    return request.param


def words(*shape, seed=0):
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(seed))


def scores_of_a_full_solve(model, text, **options):
    """log p of the word after the text, by solving for all of its tokens; and the evaluations of tokens."""
    with torch.no_grad():
        output, solution = model(text, return_solution=True, **options)
        return model.log_probabilities(output.hidden[:, -1]), solution.nfe * text.shape[1]


@pytest.mark.parametrize("window", [5, 1000])
def test_pieces_of_any_length_have_the_scores_of_the_whole(pre_norm, window):
    model, text = transformer(pre_norm=pre_norm, window=window).eval(), words(2, 20)
    decoder, end = Decoder(model), 0
    for length in (4, 1, 1, 7, 1, 2, 1, 3):
        end += length
        found = decoder.read(text[:, end - length : end])
        assert decoder.solution.converged.all()
        expected, _ = scores_of_a_full_solve(model, text[:, :end])
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    assert decoder._keys.shape[2] == min(end, window - 1)  # what no later token sees is not kept


def test_a_window_of_one_keeps_nothing(pre_norm):
    model, text = transformer(pre_norm=pre_norm).eval(), words(2, 3)
    decoder = Decoder(model, window=1)
    for i in range(3):
        found = decoder.read(text[:, i : i + 1])
        torch.testing.assert_close(found, scores_of_a_full_solve(model, text[:, i : i + 1])[0], rtol=1e-8, atol=1e-8)
    assert decoder._keys.shape[2] == 0


def test_another_window_is_that_of_another_model():
    model, other, text = transformer().eval(), transformer(window=3).eval(), words(2, 9)
    other.load_state_dict(model.state_dict())
    decoder = Decoder(model, window=3)
    decoder.read(text[:, :5])
    found = decoder.read(text[:, 5:])
    torch.testing.assert_close(found, scores_of_a_full_solve(other, text)[0], rtol=1e-8, atol=1e-8)


def test_it_is_what_a_stream_with_memory_finds(pre_norm):
    model, text = transformer(pre_norm=pre_norm, memory_length=20).eval(), words(2, 13)
    decoder = Decoder(model)
    for i, (output, _) in enumerate(model.stream(text, 4)):
        found = decoder.read(text[:, 4 * i : 4 * i + 4])
        torch.testing.assert_close(found, model.log_probabilities(output.hidden[:, -1]), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rtol", [1e-3, 1e-5])
@pytest.mark.parametrize("prompt", [1, 7, 24])
def test_scores_are_as_exact_as_the_tolerance(pre_norm, rtol, prompt):
    """Against full solves at the same tolerance and at a much smaller one."""
    model = transformer(pre_norm=pre_norm, solver=EXACT | {"rtol": rtol}).eval()
    text, decoder = words(1, prompt), Decoder(model)
    for step in range(25):
        found = decoder.read(text[:, -1:] if step else text)
        if step % 8 == 0:
            for options in ({}, {"rtol": 1e-12}):
                expected, _ = scores_of_a_full_solve(model, text, **options)
                assert (found - expected).norm() <= 10 * rtol * expected.norm()
                assert (found - expected).abs().max() <= 10 * rtol * expected.abs().max()
        text = torch.cat([text, found.argmax(1, keepdim=True)], dim=1)


def test_64_words_take_a_fifth_of_the_evaluations_of_tokens_at_most(pre_norm):
    model = transformer(pre_norm=pre_norm, solver=EXACT | {"rtol": 1e-3}).eval()
    text, decoder, full = words(1, 4), Decoder(model), 0
    for step in range(64):
        found = decoder.read(text[:, -1:] if step else text)
        expected, evaluations = scores_of_a_full_solve(model, text)
        assert (found - expected).norm() <= 10 * 1e-3 * expected.norm()
        full += evaluations
        text = torch.cat([text, found.argmax(1, keepdim=True)], dim=1)
    assert 5 * decoder.token_evaluations <= full
    assert decoder.nfe < decoder.token_evaluations  # the prompt's four tokens count each


def test_generate_takes_the_most_probable_words_at_temperature_0(pre_norm):
    model, text = transformer(pre_norm=pre_norm).eval(), words(2, 5)
    found = model.generate(text, 6, temperature=0.0)
    for _ in range(6):
        text = torch.cat([text, scores_of_a_full_solve(model, text)[0].argmax(1, keepdim=True)], dim=1)
    assert torch.equal(found, text)
    assert torch.equal(model.generate(text[:, :5], 6, top_k=1), text)
    assert torch.equal(model.generate(text, 0), text)
    assert model.generate(text.int(), 1).dtype == torch.int32


def test_suppressed_words_are_never_drawn():
    model, text = transformer().eval(), words(1, 4)
    allowed = [3, 17, 39]
    suppress = [word for word in range(50) if word not in allowed]  # some of them are beyond the vocabulary
    for options in ({"temperature": 0.0}, {"top_k": 10}, {"temperature": 5.0}):
        new = model.generate(text, 12, generator=torch.Generator().manual_seed(0), suppress=suppress, **options)[:, 4:]
        assert set(new.flatten().tolist()) <= set(allowed)
    scores = scores_of_a_full_solve(model, text)[0][0, allowed]
    assert model.generate(text, 1, temperature=0.0, suppress=suppress)[0, -1] == allowed[int(scores.argmax())]


def test_generate_draws_by_its_generator():
    model, text = transformer().eval(), words(3, 4)
    draw = [model.generate(text, 8, 1.5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert not draw[0].requires_grad


def test_samples_have_the_probabilities_of_the_scores():
    scores = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64).log().repeat(20000, 1)
    for temperature, top_k, expected in (
        (1.0, None, [0.5, 0.2, 0.2, 0.1]),
        (0.5, None, [25 / 34, 4 / 34, 4 / 34, 1 / 34]),
        (1.0, 3, [5 / 9, 2 / 9, 2 / 9, 0.0]),
        (2.0, 1, [1.0, 0.0, 0.0, 0.0]),
        (1.0, 99, [0.5, 0.2, 0.2, 0.1]),
    ):
        drawn = sample(scores, temperature, top_k, torch.Generator().manual_seed(0))
        assert drawn.shape == (20000, 1)
        shares = torch.bincount(drawn[:, 0], minlength=4) / 20000
        error = 5 * 0.5 / 20000**0.5  # five standard deviations at most
        torch.testing.assert_close(shares, torch.tensor(expected), rtol=0, atol=error)
        assert not shares[torch.tensor(expected) == 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_temperatures_are_the_limits(dtype):
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=dtype).log().repeat(20000, 1)
    for temperature in (1e-40, 1e-320, 5e-324, 1e-6):
        assert (sample(scores, temperature, None, torch.Generator().manual_seed(0)) == 1).all()
        assert (sample(scores, temperature, 2, torch.Generator().manual_seed(0)) == 1).all()
    for temperature in (1e38, 1e308):  # all that may be drawn are as probable
        drawn = sample(scores, temperature, 2, torch.Generator().manual_seed(0))
        shares = torch.bincount(drawn[:, 0], minlength=4) / 20000
        torch.testing.assert_close(shares, torch.tensor([0.0, 0.5, 0.0, 0.5]), rtol=0, atol=5 * 0.5 / 20000**0.5)


class Letters:
    """Ten letters of a model's forty words."""

    def __len__(self):
        return 10

    def encode(self, text):
        return torch.tensor([ord(letter) - ord("a") for letter in text], dtype=torch.int64)

    def decode(self, tokens):
        return "".join(chr(ord("a") + token) for token in tokens.tolist())


def test_a_vocabulary_turns_text_into_text():
    model = transformer().eval()
    with pytest.raises(TypeError, match="this model has no vocabulary to read a text with"):
        model.generate("abc", 2)
    model.vocabulary = Letters()
    text = model.generate("abc", 30, 5.0, generator=torch.Generator().manual_seed(0))
    assert len(text) == 33
    assert text.startswith("abc")
    assert set(text) <= set("abcdefghij")  # no word that the vocabulary does not have
    with pytest.raises(ValueError, match=r"tokens must be of shape \(batch, length\), with a length of at least 1"):
        model.generate("", 2)


def test_normalized_weights_are_computed_once_for_all_words(monkeypatch):
    model, calls, original = transformer().eval(), [], WeightNorm._norm
    monkeypatch.setattr(WeightNorm, "_norm", lambda self, v: calls.append(self) or original(self, v))
    model.generate(words(1, 3), 5)
    assert len(calls) == len(set(calls)) == 5  # layers


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"new_tokens": -1}, ValueError, "new_tokens must be at least 0, got -1"),
        ({"new_tokens": 2.0}, TypeError, "new_tokens must be an int"),
        ({"temperature": -1.0}, ValueError, "temperature must be at least 0 and finite, got -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be at least 0 and finite, got nan"),
        ({"temperature": float("inf"), "top_k": 2}, ValueError, "temperature must be at least 0 and finite, got inf"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"suppress": [1.0]}, TypeError, "suppress must be an int"),
        ({"suppress": [-1]}, ValueError, "suppress must be at least 0, got -1"),
        ({"suppress": range(40)}, ValueError, "suppress must leave a word to draw, got all 40"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"tokens": torch.full((1, 2), 40)}, ValueError, r"tokens must be in \[0, 40\), got 40"),
        ({"tokens": torch.zeros(1, 2)}, TypeError, "tokens must be a tensor of integers"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        transformer().eval().generate(**({"tokens": words(1, 2), "new_tokens": 1} | options))


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        transformer().generate(words(1, 2), 1)


def test_rows_must_stay():
    decoder = Decoder(transformer().eval())
    decoder.read(words(2, 3))
    with pytest.raises(ValueError, match="tokens must have as many rows as those read before, 2, got 1"):
        decoder.read(words(1, 1))


def test_half_precision_by_autocast():
    model = transformer(solver={"rtol": 1e-2, "max_steps": 30}).float().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = Decoder(model).read(words(2, 6))
        assert found.dtype == torch.float32
        assert model.generate(words(2, 6), 4, temperature=0.0).shape == (2, 10)
