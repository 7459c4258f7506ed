"""The published configurations have the published sizes; nothing is computed, on the meta device."""

import pytest
import torch

from pydeq import models

SIZES = {
    # Exact where it was published exactly, else to its published digits.
    "mdeq_cifar_tiny": (158_890, 1, 32, 30_720),
    "mdeq_cifar_large": (11.10e6, 0.01e6, 32, 61_440),
    "mdeq_cifar_large_reg": (11.10e6, 0.01e6, 32, 61_440),
    "mdeq_imagenet_small": (16.8e6, 0.1e6, 224, 188_160),
    "mdeq_imagenet_small_reg": (18.6e6, 0.1e6, 224, 188_160),
    "mdeq_imagenet_large": (67.1e6, 0.1e6, 224, 470_400),
    "mdeq_imagenet_large_reg": (67.1e6, 0.1e6, 224, 470_400),
    "mdeq_imagenet_xl": (90.5e6, 0.1e6, 224, 517_440),
    # Of these there is no published number.
    "mdeq_cityscapes_small": (8.97e6, 0.01e6, None, None),
    "mdeq_cityscapes_large": (55.96e6, 0.01e6, None, None),
    "mdeq_cityscapes_xl": (79.55e6, 0.01e6, None, None),
    "deq_transformer_wt103_post_ln": (97.9e6, 0.1e6, None, None),
    "deq_transformer_wt103_post_ln_reg": (97.9e6, 0.1e6, None, None),
    "deq_transformer_wt103_pre_ln_reg": (97.9e6, 0.1e6, None, None),
}


@pytest.fixture(params=models.config_names())
def name(request):
    return request.param


def build(name):
    with torch.device("meta"):
        return models.build(name)


def test_all_published_configurations_are_here():
    assert sorted(SIZES) == models.config_names()


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_published_ones(name):
    count, digit, image, state = SIZES[name]
    model = build(name)
    assert round(model.parameter_count() / digit) == round(count / digit)
    if image:
        assert model.state_size(image, image) == state


def test_states_have_the_shapes_that_are_said(name):
    model = build(name)
    solved = []
    model.deq.forward = lambda z0, *context, **_: solved.append(z0) or (z0, None)
    if isinstance(model, models.DEQTransformerLM):
        tokens = torch.zeros(2, 5, dtype=torch.long, device="meta")
        # Adaptive embeddings sort words by their values, which there are none of here.
        model.embedding.forward = lambda words: torch.empty(*words.shape, 700, device="meta")
        output = model(tokens)
        assert solved[0].shape == output.hidden.shape == (2, 5, 700)
    else:
        shapes = model.state_shapes(40, 56)
        logits = model(torch.empty(2, 3, 40, 56, device="meta"))
        assert [part.shape[1:] for part in solved[0]] == [torch.Size(shape) for shape in shapes]
        segments = model.config.segmentation is not None
        assert logits.shape == ((2, 19, *shapes[0][1:]) if segments else (2, model.config.classification.classes))


def test_the_regularized_ones_have_a_penalty(name):
    penalty = models.load_config(name).penalty
    assert (penalty is not None) == name.endswith("_reg")
    if penalty is not None:
        schedule = penalty.build(steps_per_epoch=10)
        assert schedule.strength_at(0) == penalty.strength
        assert (schedule.probes, schedule.mode) == ((2, "jvp") if name.startswith("mdeq") else (1, "vjp"))
        if penalty.stop_epoch:
            assert schedule.strength_at(10 * penalty.stop_epoch) == 0.0
            with pytest.raises(ValueError, match="steps_per_epoch"):
                penalty.build()
        else:
            assert schedule.strength_at(penalty.every) == pytest.approx(penalty.strength + 0.1)


def test_parameters_do_not_depend_on_where_they_are_made():
    small = models.load_config("mdeq_cifar_tiny")
    names = [key for key, _ in models.build(small).named_parameters()]
    assert names == [key for key, _ in build("mdeq_cifar_tiny").named_parameters()]
