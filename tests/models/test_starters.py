"""The starters: the multilayer perceptron's bound, the convolutional cell's equation, and what they refuse."""

import pytest
import torch
from small_models import conv, mlp


def test_the_bound_holds_and_gives_one_equilibrium():
    model = mlp(hidden=12).double().train()
    with torch.no_grad():
        model.deq.cell.recurrent.parametrizations.weight.original.mul_(50.0)
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
        for _ in range(30):  # a step of power iteration each
            solution = model(x, return_solution=True)[1]
        assert solution.converged.all()
        assert float(torch.linalg.matrix_norm(model.eval().deq.cell.recurrent.weight, 2)) < 0.9 * 1.01
        z = solution.image
        weight, injection = model.deq.cell.recurrent.weight, model.injection(x)
        torch.testing.assert_close(torch.tanh(z @ weight.T + injection), z, rtol=1e-3, atol=1e-3)


def test_without_a_bound_the_weight_is_a_plain_parameter():
    assert "recurrent.weight" in dict(mlp(bound=None).deq.cell.named_parameters())


def test_the_convolutional_equilibrium_is_that_of_its_equation():
    model = conv(stride=2).eval()
    x = torch.randn(3, 2, 7, 6, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        z = model(x, return_solution=True)[1].image
        cell, injection = model.deq.cell, model.stem(x)
        y = cell.norm1(cell.conv1(z).relu())
        f = cell.norm3((z + cell.norm2(injection + cell.conv2(y))).relu())
    assert z.shape == (3, 8, 4, 3)
    torch.testing.assert_close(f, z, rtol=1e-9, atol=1e-9)


def test_a_deep_stem_halves_the_image_with_each_convolution():
    model = conv(stride=8, stem_channels=(3, 5)).eval()
    x = torch.randn(3, 2, 32, 16, generator=torch.Generator().manual_seed(0)).double()
    convolutions = [layer for layer in model.stem if isinstance(layer, torch.nn.Conv2d)]
    norms = [layer for layer in model.stem if isinstance(layer, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.running_mean.normal_(generator=torch.Generator().manual_seed(1))
        y = x
        for convolution, norm in zip(convolutions, norms, strict=True):
            y = (y if convolution is convolutions[0] else y.relu()).contiguous()
            y = torch.nn.functional.conv2d(y, convolution.weight, convolution.bias, stride=2, padding=1)
            y = (y - norm.running_mean.view(-1, 1, 1)) / (1.0 + norm.eps) ** 0.5
        torch.testing.assert_close(model.stem(x), y)
    assert [each.weight.shape[:2] for each in convolutions] == [(3, 2), (5, 3), (8, 5)]
    assert y.shape == (3, 8, 4, 2)
    assert (y < 0).any()


@pytest.mark.parametrize("make", [mlp, conv])
def test_dropout_is_drawn_once_per_call(make):
    model = make(dropout=0.4).train()
    x = torch.randn(5, 4).double() if make is mlp else torch.randn(5, 2, 6, 6).double()
    assert model(x, return_solution=True)[1].converged.all()


def test_bad_input():
    with pytest.raises(ValueError, match=r"x must be of shape \(batch, 4\), got \(2, 5\)"):
        mlp()(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"images must be of shape \(batch, 2, height, width\), got \(2, 4\)"):
        conv()(torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (mlp, {"hidden": 0}, "hidden must be at least 1, got 0"),
        (mlp, {"bound": 0.0}, "bound must be above 0 and finite, got 0"),
        (mlp, {"dropout": 2}, "dropout must be in"),
        (conv, {"init_std": -1.0}, "init_std must be at least 0, got -1"),
        (conv, {"stem_channels": (4, 0)}, r"stem_channels\[1\] must be at least 1, got 0"),
        (conv, {"stem_channels": [4], "stride": 2}, "stride must be 4 with 1 stem_channels, .* got 2"),
        (conv, {"stride": 0}, "stride must be at least 1, got 0"),
        (conv, {"inner": 9}, "inner must be a multiple of groups, 4, got 9"),
    ],
)
def test_bad_configuration(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
