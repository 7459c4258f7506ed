"""Relative attention against its definition, one query, key and head at a time."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pydeq
from pydeq.models.relative_attention import RelativeAttention, relative_shift, relative_sinusoids

SIZES = st.integers(1, 4)


def make(window, *, d_model=6, heads=2, d_head=4, attention_dropout=0.0, dropout=0.0):
    attention = RelativeAttention(d_model, heads, d_head, dropout, attention_dropout, window).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention


def draw(length, remembered, *, batch=2, d_model=6, inner=8):
    z, states = torch.randn(batch, length, d_model).double(), torch.randn(batch, remembered, d_model).double()
    injection, before = (
        torch.randn(batch, length, 3 * inner).double(),
        torch.randn(batch, remembered, 3 * inner).double(),
    )
    return z, injection, states, before


def call(attention, z, injection, states, before):
    keys, values = attention.remember(states, before)
    positions = attention.positions(states.shape[1] + z.shape[1], z)
    return attention(z, injection, keys, values, positions, attention.mask(states.shape[1], z.shape[1], z))


def defined(attention, z, injection, states, before):
    """The same by loops: queries, keys and values of memory and state alike, a position vector for each distance."""
    heads, d_head = attention.heads, attention.d_head
    remembered = states.shape[1]
    everything, injected = torch.cat([states, z], 1), torch.cat([before, injection], 1)
    out = []
    for sample in range(len(z)):
        q, k, v = (everything[sample] @ attention.qkv.weight.T + injected[sample]).split(heads * d_head, dim=1)
        rows = []
        for i in range(z.shape[1]):
            row = []
            for head in range(heads):
                part = slice(head * d_head, (head + 1) * d_head)
                content = q[remembered + i, part] + attention.content_bias[head, 0]
                position = q[remembered + i, part] + attention.position_bias[head, 0]
                scores = []
                reach = [j for j in range(len(k)) if 0 <= remembered + i - j < attention.window]
                for j in reach:
                    distance = remembered + i - j
                    angles = [distance / 10000 ** (2 * n / z.shape[2]) for n in range(z.shape[2] // 2)]
                    sinusoid = torch.tensor([f(a) for f in (math.sin, math.cos) for a in angles], dtype=torch.float64)
                    r = (attention.position.weight @ sinusoid)[part]
                    scores.append((content @ k[j, part] + position @ r) / math.sqrt(d_head))
                weights = torch.stack(scores).softmax(0)
                row.append(sum(w * v[j, part] for w, j in zip(weights, reach, strict=True)))
            rows.append(torch.cat(row))
        out.append(torch.stack(rows) @ attention.output.weight.T + attention.output.bias)
    return torch.stack(out)


@given(length=SIZES, remembered=st.integers(0, 3), window=st.integers(1, 8), seed=st.integers(0, 99))
def test_attention_is_what_it_is_defined_as(length, remembered, window, seed):
    torch.manual_seed(seed)
    attention, arguments = make(window), draw(length, remembered)
    expected = defined(attention, *arguments)
    torch.testing.assert_close(call(attention, *arguments), expected, rtol=1e-11, atol=1e-11)
    with torch.no_grad():  # by scaled_dot_product_attention
        torch.testing.assert_close(call(attention, *arguments), expected, rtol=1e-11, atol=1e-11)


def test_evaluations_without_gradients_are_fused(monkeypatch):
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k)
    )
    torch.manual_seed(0)
    attention, arguments = make(9), draw(3, 2)
    call(attention, *arguments)
    assert not calls
    with torch.no_grad():
        call(attention, *arguments)
    assert len(calls) == 1


@given(length=SIZES, extra=st.integers(0, 5), batch=st.integers(0, 2))
def test_shift_moves_each_distance_to_its_key(length, extra, batch):
    keys = length + extra
    by_distance = torch.arange(batch * length * keys, dtype=torch.float32).view(batch, length, keys)
    shifted = relative_shift(by_distance)
    assert shifted.shape == by_distance.shape
    for i in range(length):
        for j in range(extra + i + 1):
            distance = extra + i - j
            assert torch.equal(shifted[:, i, j], by_distance[:, i, keys - 1 - distance])


def test_second_derivatives_exist():
    torch.manual_seed(0)
    attention, (z, *rest) = make(4), draw(3, 2, batch=1)
    assert torch.autograd.gradgradcheck(lambda z: call(attention, z, *rest), z.requires_grad_())


def test_half_precision_stays_close():
    torch.manual_seed(0)
    attention, arguments = make(9), draw(4, 3)
    expected = call(attention, *arguments)
    attention.float()
    arguments = [argument.float() for argument in arguments]
    for grad in (False, True):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
            got = call(attention, *arguments)
        torch.testing.assert_close(got.double(), expected, rtol=0.0, atol=0.05 * float(expected.detach().abs().max()))


def test_attention_dropout_drops_the_same_weights_in_all_of_a_solve():
    torch.manual_seed(0)
    attention, arguments = make(9, attention_dropout=0.5).train(), draw(4, 3)
    with torch.no_grad():
        plain = call(attention.eval(), *arguments)
        attention.train()
        with pydeq.nn.solve_scope():
            first, second = call(attention, *arguments), call(attention, *arguments)
            with torch.enable_grad():
                third = call(attention, *arguments)
        other = call(attention, *arguments)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, third.detach(), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(first, other)
    assert not torch.allclose(first, plain)


@pytest.mark.parametrize("length", [1, 4])
def test_sinusoids_go_from_far_to_near(length):
    sinusoids = relative_sinusoids(length, 6, torch.zeros(()))
    assert sinusoids.shape == (1, length, 6)
    torch.testing.assert_close(sinusoids[0, -1], torch.tensor([0.0, 0, 0, 1, 1, 1]))
    torch.testing.assert_close(sinusoids[0, 0, 0], torch.tensor(math.sin(length - 1)))
