"""The language model: its block, its memory, streams of text, and what it refuses."""

import pytest
import torch
from small_models import transformer
from torch.nn import functional

import pydeq
from pydeq import models
from pydeq.models import Memory


@pytest.fixture(params=[False, True], ids=["post-LN", "pre-LN"])
def pre_norm(request):
    return request.param


def words(*shape, seed=0):
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(seed))


def test_a_stream_is_one_pass_where_memory_covers_it(pre_norm):
    model, text = transformer(pre_norm=pre_norm, memory_length=20).eval(), words(2, 15)
    with torch.no_grad():
        (expected, hidden, memory), solution = model(text[:, :-1], text[:, 1:], return_solution=True)
    assert solution.converged.all()
    outputs, solutions = zip(*model.stream(text, 4), strict=True)
    assert [output.nll.shape[1] for output in outputs] == [4, 4, 4, 2]
    assert all(solution.converged.all() for solution in solutions)
    torch.testing.assert_close(torch.cat([o.nll for o in outputs], 1), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(torch.cat([o.hidden for o in outputs], 1), hidden, rtol=1e-8, atol=1e-8)
    for got, wanted in zip(outputs[-1].memory, memory, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


def test_a_stream_with_a_short_memory_sees_less(pre_norm):
    model, text = transformer(pre_norm=pre_norm, memory_length=20).eval(), words(2, 15)
    whole = torch.cat([output.nll for output, _ in model.stream(text, 4)], 1)
    model.memory_length = 3
    parts = list(model.stream(text, 4))
    assert [output.memory.states.shape[1] for output, _ in parts] == [3, 3, 3, 3]
    assert all(
        torch.equal(output.memory.states[:, -length:], output.hidden[:, -3:])
        for (output, _), length in zip(parts, (3, 3, 3, 2), strict=True)
    )
    short = torch.cat([output.nll for output, _ in parts], 1)
    torch.testing.assert_close(short[:, :4], whole[:, :4], rtol=1e-9, atol=1e-9)
    assert (short[:, 4:] - whole[:, 4:]).abs().max() > 1e-4
    model.memory_length = 0
    forgetful = list(model.stream(text, 4))
    assert forgetful[1][0].memory.states.shape == (2, 0, 12)
    with torch.no_grad():
        alone = model(text[:, 4:8], text[:, 5:9]).nll
    torch.testing.assert_close(forgetful[1][0].nll, alone, rtol=1e-9, atol=1e-9)


def test_a_window_hides_what_is_further_away():
    model, text = transformer(window=2, memory_length=20).eval(), words(1, 9)
    other = text.clone()
    other[0, 0] = (text[0, 0] + 1) % 40
    with torch.no_grad():
        # One evaluation from zero sees one token back; the equilibrium sees all of the past.
        first, second = (model(t, max_steps=1).hidden for t in (text, other))
        assert (first - second)[0, :2].abs().amax(-1).gt(1e-6).all()
        assert torch.equal(first[0, 2:], second[0, 2:])


def test_nothing_comes_from_the_future(pre_norm):
    model, text = transformer(pre_norm=pre_norm).eval(), words(1, 8)
    other = text.clone()
    other[0, 5] = (text[0, 5] + 1) % 40
    with torch.no_grad():
        first, second = model(text).hidden, model(other).hidden
    torch.testing.assert_close(first[:, :5], second[:, :5], rtol=1e-9, atol=1e-9)
    assert (first - second)[0, 5:].abs().amax(-1).gt(1e-6).all()


def test_the_equilibrium_is_that_of_the_block(pre_norm):
    """The cell without its shortcuts: memory and state through one attention, by the block's equations."""
    model = transformer(pre_norm=pre_norm, memory_length=20).eval()
    text = words(2, 9)
    with torch.no_grad():
        memory = model(text[:, :4]).memory
        z = model(text[:, 4:], memory=memory).hidden
        cell, attention = model.deq.cell, model.deq.cell.attention

        def norm(x):
            return functional.layer_norm(x, x.shape[-1:])

        injection = model.injection(model.embedding(text[:, 4:]))
        both, injected = torch.cat([memory.states, z], 1), torch.cat([memory.injection, injection], 1)
        if pre_norm:
            both = norm(both)
        empty = both.new_zeros(2, 2, 0, 6)
        attended = attention(both, injected, empty, empty, attention.positions(9, both), attention.mask(0, 9, both))[
            :, 4:
        ]
        h = norm(z + attended)
        f = h + cell.feedforward(h)
        torch.testing.assert_close(f if pre_norm else norm(f), z, rtol=1e-9, atol=1e-9)


def test_memory_has_no_graph_but_its_keys_reach_the_weights():
    model, text = transformer(memory_length=4), words(2, 9)
    memory = model(text[:, :4]).memory
    assert not any(part.requires_grad for part in memory)
    model(text[:, 4:8], text[:, 5:], memory).nll.mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_gradients_with_a_memory_are_those_of_the_unrolled_iteration(pre_norm):
    model, text = transformer(pre_norm=pre_norm, memory_length=4), words(2, 9)
    memory = model(text[:, :4]).memory
    found = []
    for adjoint in (model.deq.adjoint, pydeq.Unrolled()):
        model.zero_grad()
        model.deq.adjoint = adjoint
        model(text[:, 4:8], text[:, 5:], memory, max_steps=300).nll.mean().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.filterwarnings("ignore:the forward solve of a pydeq.DEQ")
def test_dropout_is_drawn_once_per_call():
    model, text = transformer(dropout=0.2, attention_dropout=0.2).train(), words(3, 7)
    solution = model(text, return_solution=True, rtol=1e-8)[1]
    assert solution.converged.all(), "no fixed point: each evaluation drew new random numbers"
    first, second = model(text).hidden, model(text).hidden
    assert not torch.allclose(first, second)
    assert torch.equal(model.eval()(text).hidden, model(text).hidden)


def test_log_probabilities_are_what_nll_picks_from():
    model, text = transformer().eval(), words(2, 6)
    output = model(text[:, :-1], text[:, 1:])
    picked = model.log_probabilities(output.hidden).gather(-1, text[:, 1:, None])[..., 0]
    torch.testing.assert_close(-picked, output.nll)


def test_autocast_trains():
    model, text = transformer(solver={"rtol": 1e-2, "max_steps": 20, "backward_rtol": 0.05}).float(), words(2, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, solution = model(text[:, :-1], text[:, 1:], return_solution=True, penalty=pydeq.JacobianPenalty(0.1))
        loss = output.nll.mean() + solution.penalty
    loss.backward()
    assert output.nll.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 3),), TypeError, "tokens must be a tensor of integers"),
        ((torch.zeros(3, dtype=torch.long),), ValueError, r"tokens must be of shape \(batch, length\)"),
        ((torch.full((1, 2), 40),), ValueError, r"tokens must be in \[0, 40\), got 40"),
        ((words(2, 3), words(2, 4)), ValueError, r"targets must have the shape of tokens, \(2, 3\), got \(2, 4\)"),
        ((words(2, 3), torch.full((2, 3), -1)), ValueError, r"targets must be in \[0, 40\), got -1"),
        (
            (words(2, 3), None, Memory(torch.zeros(1, 2, 12), torch.zeros(1, 2, 36))),
            ValueError,
            r"memory.states must be of shape \(2, M, 12\), got \(1, 2, 12\)",
        ),
        (
            (words(2, 3), None, Memory(torch.zeros(2, 2, 12), torch.zeros(2, 1, 36))),
            ValueError,
            "memory.states and memory.injection must be of one length",
        ),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        transformer()(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 13}, "d_model must be even"),
        ({"heads": 0}, "heads must be at least 1"),
        ({"memory_length": -1}, "memory_length must be at least 0"),
        ({"attention_dropout": -0.1}, "attention_dropout must be in"),
        ({"d_embed": 0, "div": 1, "tie_weights": False}, "d_embed must be at least 1, got 0"),
        ({"tie_weights": False, "tie_projections": True}, "tie_projections needs tie_weights"),
        ({"cutoffs": [20, 10]}, "cutoffs must rise"),
    ],
)
def test_bad_configuration(options, message):
    with pytest.raises(ValueError, match=message):
        transformer(**options)


def test_new_weights_are_as_published():
    """N(0, 0.01^2), biases 0: Bai, Koltun and Kolter, 2021. Weight norm keeps what it normalizes."""
    torch.manual_seed(0)
    sizes = {"vocabulary": 900, "d_model": 64, "d_inner": 128, "heads": 8, "d_head": 8, "cutoffs": (200,), "div": 2}
    model = models.DEQTransformerLM(models.DEQTransformerConfig(**sizes))
    normalized = [name for name, _ in model.named_parameters() if name.endswith("original0")]
    assert len(normalized) == 5  # qkv, positions, output, and the two of the feedforward layer
    for name, parameter in model.named_parameters():
        if name.endswith("original0"):
            direction = model.get_parameter(name.replace("original0", "original1"))
            torch.testing.assert_close(parameter, direction.norm(dim=1, keepdim=True))
        elif name.endswith("bias") and not name.endswith(("content_bias", "position_bias")):
            assert not parameter.any(), name
        else:
            error = 5 * 0.01 / (2 * parameter.numel()) ** 0.5  # five standard deviations of a deviation
            assert abs(float(parameter.detach().std()) - 0.01) < error, name
            assert abs(float(parameter.detach().mean())) < 2 * error, name


def test_bad_segments():
    for length, error in ((0, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match="length must be"):
            next(transformer().stream(words(1, 5), length))
    with pytest.raises(ValueError, match=r"tokens must be of shape \(batch, length\), .*got \(5,\)"):
        next(transformer().stream(words(5), 2))
