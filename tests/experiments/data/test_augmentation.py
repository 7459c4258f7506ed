import pytest
import torch
from torch.nn import functional

from experiments.data import normalize, random_crop, random_flip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(batch, channels, height, width, dtype=torch.float32):
    """Images with no value twice, and none 0 (but modulo 256)."""
    return torch.arange(1, batch * channels * height * width + 1).reshape(batch, channels, height, width).to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 3, 6, 5), (1, 1, 1, 1), (0, 3, 4, 4)])
def test_crops_are_windows_of_the_padded_image(dtype, shape):
    images = numbered(*shape, dtype)
    cropped = random_crop(images, 2, generator=generator())
    assert cropped.shape == images.shape
    assert cropped.dtype == dtype
    padded = functional.pad(images, (2,) * 4)
    height, width = shape[2:]
    places = set()
    for image, crop in zip(padded, cropped, strict=True):
        windows = {(i, j): image[:, i : i + height, j : j + width] for i in range(5) for j in range(5)}
        fitting = [place for place, window in windows.items() if torch.equal(window, crop)]
        assert fitting
        places.add(fitting[0])
    # Each sample draws its own.
    assert len(places) > 10 or shape[0] < 40


def test_every_shift_is_as_likely():
    images = torch.zeros(9000, 1, 3, 3)
    images[:, :, 1, 1] = 1
    cropped = random_crop(images, 1, generator=generator())
    # The one moves to each of nine places: 1000 times, sixfold of sqrt(1000 * 8 / 9).
    assert (cropped.sum(dim=0)[0] - 1000).abs().max() < 6 * (1000 * 8 / 9) ** 0.5


def test_without_padding_nothing_moves():
    images = numbered(3, 2, 4, 4)
    assert torch.equal(random_crop(images, 0, generator=generator()), images)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_flips_mirror_half_of_the_images(dtype):
    images = numbered(400, 1, 2, 3, dtype)
    flipped = random_flip(images, generator=generator())
    same = (flipped == images).flatten(1).all(dim=1)
    assert torch.equal(flipped[~same], images[~same].flip(3))
    # Sixfold of sqrt(400) / 2.
    assert abs(int(same.sum()) - 200) < 60
    assert flipped.dtype == dtype


def test_the_generator_says_it_all():
    images = numbered(8, 3, 5, 5)
    state = torch.get_rng_state()
    for augment in (random_crop, random_flip):
        first, again = augment(images, generator=generator(1)), augment(images, generator=generator(1))
        assert torch.equal(first, again)
        assert not torch.equal(first, augment(images, generator=generator(2)))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(random_crop(images, generator=None), random_crop(images, generator=generator(1)))


def test_normalized_values():
    images = torch.tensor([[0, 255], [51, 204]], dtype=torch.uint8).reshape(1, 2, 1, 2)
    found = normalize(images, (0.5, 0.2), (0.25, 0.1))
    assert found.dtype == torch.float32
    eps = torch.finfo(torch.float32).eps
    expected = torch.tensor([[-2.0, 2.0], [0.0, 6.0]]).reshape(1, 2, 1, 2)
    torch.testing.assert_close(found, expected, rtol=8 * eps, atol=8 * eps)
    doubled = normalize(images.double() / 255, (0.5, 0.2), (0.25, 0.1))
    assert doubled.dtype == torch.float64
    torch.testing.assert_close(doubled, expected.double(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: random_crop(torch.zeros(3, 4, 4), generator=None), ValueError, r"\(N, C, H, W\), got \(3, 4, 4\)"),
        (lambda: random_flip(torch.zeros(3, 4, 4), generator=None), ValueError, r"\(N, C, H, W\)"),
        (lambda: random_crop(torch.zeros(1, 3, 4, 4), -1, generator=None), ValueError, "padding .* got -1"),
        (lambda: normalize(torch.zeros(1, 3, 4, 4), (0.5,), (0.5,)), ValueError, "3 entries, one a channel, got 1"),
        (lambda: normalize(torch.zeros(1, 1, 4, 4), (0.5,), (0.0,)), ValueError, "std must be positive"),
        (lambda: normalize(torch.zeros(1, 1, 4, 4).int(), (0.5,), (0.5,)), TypeError, "uint8 or floating, got"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
