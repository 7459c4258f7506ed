"""The spectral radius against dense eigenvalues."""

import math

import pytest
import torch

import pydeq


def linear(matrix):
    return lambda z: z @ matrix.T


@pytest.mark.parametrize("steps", [60, 200])
def test_a_rotation_scaled_by_nine_tenths(steps):
    c, s = math.cos(1.1), math.sin(1.1)
    matrix = 0.9 * torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    radius = pydeq.spectral_radius(linear(matrix), torch.zeros(3, 2, dtype=torch.float64), steps=steps)
    torch.testing.assert_close(radius, torch.full_like(radius, 0.9), rtol=1e-12, atol=0)


def test_zero_nilpotent_and_constant_maps():
    z = torch.zeros(2, 3, dtype=torch.float64)
    nilpotent = torch.tensor([[0.0, 1.0, 5.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    for fn in (linear(torch.zeros(3, 3, dtype=torch.float64)), linear(nilpotent), lambda z: torch.ones_like(z)):
        assert torch.equal(pydeq.spectral_radius(fn, z), torch.zeros(2, dtype=torch.float64))


def test_random_matrices_with_complex_dominant_pairs():
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        matrix = torch.randn(12, 12, generator=generator, dtype=torch.float64) / 12**0.5
        expected = torch.linalg.eigvals(matrix).abs().max()
        radius = pydeq.spectral_radius(
            linear(matrix), torch.zeros(1, 12, dtype=torch.float64), steps=2000, generator=generator
        )
        torch.testing.assert_close(radius, expected[None], rtol=5e-3, atol=0)


def test_per_sample():
    scales = torch.tensor([0.2, 0.5, 1.5])
    radius = pydeq.spectral_radius(lambda z: z * scales[:, None], torch.ones(3, 4))
    torch.testing.assert_close(radius, scales)


def test_bad_arguments():
    with pytest.raises(ValueError, match="steps must be at least 2, got 1"):
        pydeq.spectral_radius(torch.tanh, torch.zeros(1, 2), steps=1)
