import pytest
import torch

from experiments.data import Images, Statistics, load_images, normalize, statistics


def test_the_known_numbers_of_digits_are_those_of_the_data():
    computed = statistics(load_images("digits", "train"))
    # Four decimals.
    assert computed.mean == pytest.approx(statistics("digits").mean, abs=5e-5)
    assert computed.std == pytest.approx(statistics("digits").std, abs=5e-5)


def test_what_is_computed_is_what_torch_computes():
    pixels = torch.randint(0, 256, (7, 3, 5, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = statistics(Images(pixels, torch.zeros(7, dtype=torch.int64), ("a",)))
    values = pixels.double() / 255
    assert found.mean == pytest.approx(values.mean(dim=(0, 2, 3)).tolist(), rel=1e-13)
    assert found.std == pytest.approx(values.var(dim=(0, 2, 3), correction=0).sqrt().tolist(), rel=1e-13)
    normalized = normalize(pixels, found.mean, found.std)
    eps = torch.finfo(torch.float32).eps
    assert normalized.mean(dim=(0, 2, 3)).abs().max() < 50 * eps
    assert (normalized.var(dim=(0, 2, 3), correction=0) - 1).abs().max() < 50 * eps


def test_what_is_published():
    assert statistics("cifar10") == Statistics((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    assert statistics("imagenet").mean == (0.485, 0.456, 0.406)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="data must be one of digits, fashion_mnist, cifar10, imagenet, or images"):
        statistics("mnist")
    empty = Images(torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), ("a",))
    with pytest.raises(ValueError, match=r"data must have images, got shape \(0, 1, 8, 8\)"):
        statistics(empty)
