"""The multiscale model: its block, its fusion, sizes that are no powers of two, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import mdeq
from torch.nn import functional

import pydeq


def images(height=6, width=5, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, height, width, generator=generator, dtype=torch.float64)


@settings(max_examples=10)
@given(
    resolutions=st.integers(1, 4),
    height=st.integers(3, 17),
    width=st.integers(3, 17),
    downsamplings=st.integers(0, 3),
    projected=st.booleans(),
)
def test_any_resolutions_of_any_image(resolutions, height, width, downsamplings, projected):
    model = mdeq((8,) * resolutions, downsamplings=downsamplings, project_injection=projected)
    with torch.no_grad():
        logits, solution = model.eval()(images(height, width), return_solution=True, max_steps=2)
    assert logits.shape == (3, 5)
    assert logits.isfinite().all()
    assert tuple(tuple(part.shape[1:]) for part in solution.image) == model.state_shapes(height, width)
    assert sum(part[0].numel() for part in solution.image) == model.state_size(height, width)


def test_the_equilibrium_is_that_of_the_equations():
    """Block and fusion in plain functions of the cell's tensors."""
    model = mdeq((8, 16, 8), seed=3).eval()
    with torch.no_grad():
        injection = model.stem(images(8, 8))
        z, solution = model.equilibrium(images(8, 8))
        assert solution.converged.all()
        cell = model.deq.cell
        y = []
        for i, (block, part) in enumerate(zip(cell.blocks, z, strict=True)):

            def norm(x, of, groups=4):
                return functional.group_norm(x, groups, of.weight, of.bias)

            inner = norm(functional.conv2d(part, block.conv1.weight, padding=1), block.norm1).relu()
            inner = functional.conv2d(inner, block.conv2.weight, padding=1)
            inner = norm(inner + (injection if i == 0 else 0.0), block.norm2)
            y.append(norm((inner + part).relu(), block.norm3))
        for i, part in enumerate(z):
            total = y[i]
            for j in range(3):
                x = y[j]
                layers = list(cell.fusion[i][j]) if i != j else []
                for layer in layers:
                    x = layer(x)
                if j > i:
                    x = x.repeat_interleave(2 ** (j - i), 2).repeat_interleave(2 ** (j - i), 3)
                if j != i:
                    total = total + x
            conv, gn = cell.post[i]
            f = functional.group_norm(functional.conv2d(total.relu(), conv.weight), 2, gn.weight, gn.bias)
            torch.testing.assert_close(f, part, rtol=1e-9, atol=1e-9)


def test_fusion_paths_are_what_they_are_described_as():
    cell = mdeq((8, 16, 24)).deq.cell
    assert [type(layer).__name__ for layer in cell.fusion[2][0]] == [
        "Conv2d",
        "GroupNorm",
        "ReLU",
        "Conv2d",
        "GroupNorm",
    ]
    assert [layer.out_channels for layer in cell.fusion[2][0] if hasattr(layer, "out_channels")] == [8, 24]
    assert [type(layer).__name__ for layer in cell.fusion[0][2]] == ["Conv2d", "GroupNorm"]
    normed = {name for name, _ in cell.named_parameters() if "original0" in name}
    assert len(normed) == 3 * 3
    assert not any("fusion" in name for name in normed)


def test_new_convolutions_are_as_published():
    """N(0, 0.01^2) in stem, cell and head; what weight norm normalizes keeps its weights."""
    torch.manual_seed(0)
    head = {"classes": 10, "channels": [8, 16], "final": 32}
    model = pydeq.models.MDEQ(pydeq.models.MDEQConfig(channels=(16, 32), classification=head, project_injection=True))
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convolutions) == 3 + 8 + (4 + 4 + 1 + 1)  # stem, cell, head
    for convolution in convolutions:
        weight = convolution.weight.detach()
        error = 5 * 0.01 / (2 * weight.numel()) ** 0.5  # five standard deviations of a deviation
        assert abs(float(weight.std()) - 0.01) < error
        assert abs(float(weight.mean())) < 2 * error


def test_channel_dropout_is_drawn_once_per_call():
    model = mdeq(dropout=0.4).train()
    with torch.no_grad():
        solution = model(images(), return_solution=True)[1]
        assert solution.converged.all(), "no fixed point: each evaluation drew new random numbers"
        first, second = (model.equilibrium(images())[0][0] for _ in range(2))
    assert not torch.allclose(first, second)


@pytest.mark.filterwarnings("ignore:the forward solve of a pydeq.DEQ")
def test_segmentation_scores_every_pixel_of_the_finest_resolution():
    model = mdeq((8, 8), segmentation={"classes": 4, "kernel": 3}, downsamplings=1).eval()
    assert model(images(9, 12)).shape == (3, 4, 5, 6)


def test_penalty_over_several_resolutions_trains_with_two_probes():
    model = mdeq().float()
    x = images().float()
    penalty = pydeq.JacobianPenalty(0.5, probes=2, mode="jvp")
    model.deq.adjoint = pydeq.JacobianFree()
    logits, solution = model(x, return_solution=True, penalty=penalty, rtol=1e-4, max_steps=40)
    (logits.square().mean() + solution.penalty).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_bad_images():
    with pytest.raises(ValueError, match=r"images must be of shape \(batch, 2, height, width\), got \(2, 3, 4, 4\)"):
        mdeq()(torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"downsamplings": -1}, "downsamplings must be at least 0"),
        ({"expansion": 0}, "expansion must be at least 1"),
        ({"segmentation": {"classes": 2, "kernel": 2}}, "kernel must be odd"),
        ({"classification": None}, "one head"),
    ],
)
def test_bad_configuration(options, message):
    with pytest.raises(ValueError, match=message):
        mdeq(**options)
