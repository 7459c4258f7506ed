"""Arnoldi's relation and Ritz values, per sample."""

import pytest
import torch

from pydeq.jacobian.arnoldi import arnoldi, ritz_values
from pydeq.testing import assert_close

EPS = torch.finfo(torch.float64).eps


def matrices(batch=3, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(batch, dim, dim, generator=generator, dtype=torch.float64)
    return A, torch.randn(batch, dim, generator=generator, dtype=torch.float64)


def recorded(A, start, steps):
    """H, what is left, and the basis: the vectors that products were asked for."""
    basis = []

    def product(v):
        basis.append(v.clone())
        return torch.einsum("bij,bj->bi", A, v)

    H, left = arnoldi(product, start, steps)
    return H, left, torch.stack(basis, 2)


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_relation(steps):
    """A V = V H + w e_m^T with V orthonormal, w orthogonal to V, ||w|| what is left."""
    A, start = matrices()
    H, left, V = recorded(A, start, steps)
    assert_close(V.mT @ V, torch.eye(steps, dtype=torch.float64).expand(3, -1, -1), size=8, condition=4)
    rest = A @ V - V @ H
    assert (rest[:, :, :-1].abs() < 100 * EPS).all()
    assert_close(rest[:, :, -1].norm(dim=1), left, size=8, condition=10)
    assert (V.mT @ rest[:, :, -1:]).abs().max() < 100 * EPS
    assert torch.equal(H.tril(-2), torch.zeros_like(H))


def test_basis_stays_orthogonal_where_what_is_left_is_small():
    """Of diag(1, 1e-2, 1e-4, ...) a product lies in the basis but for its last digits; one projection is not enough."""
    A = torch.diag(torch.logspace(0, -10, 6, dtype=torch.float64)).expand(3, 6, 6)
    _, _, V = recorded(A, matrices(dim=6)[1], 5)
    assert_close(V.mT @ V, torch.eye(5, dtype=torch.float64).expand(3, -1, -1), size=6, condition=4)


def test_all_steps_give_all_eigenvalues():
    A, start = matrices()
    H, left, _ = recorded(A, start, 8)
    assert torch.equal(left, torch.zeros(3, dtype=torch.float64))
    values, error = ritz_values(H, left, EPS)
    expected = torch.linalg.eigvals(A)
    expected = expected.gather(1, expected.abs().argsort(dim=1, descending=True))
    assert_close(values.abs(), expected.abs(), size=64, condition=100)
    assert (error < 1e-12).all()
    assert (values.abs().diff(dim=1) <= 0).all()


def test_a_basis_that_is_complete_early_ends_for_its_sample_alone():
    A, start = matrices()
    A[1] = 0.0
    A[1, :2, :2] = torch.tensor([[0.0, -0.5], [0.5, 0.0]])
    A[2] = 0.0
    start[1, 2:] = 0.0
    H, left, V = recorded(A, start, 6)
    assert (left[1:] == 0).all()
    assert left[0] > 0
    assert torch.equal(V[1, :, 2:], torch.zeros(8, 4, dtype=torch.float64))
    assert torch.equal(H[2], torch.zeros(6, 6, dtype=torch.float64))
    values, error = ritz_values(H, left, EPS)
    assert_close(values[1].abs()[:2], torch.full((2,), 0.5, dtype=torch.float64))
    assert (values[2] == 0).all()
    assert (error[2] == 0).all()
    alone, _, _ = recorded(A[:1], start[:1], 6)
    assert_close(H[:1], alone, size=8, condition=10)


def test_residuals_bound_the_error_of_symmetric_maps():
    """Where eigenvectors are orthogonal, an eigenvalue lies within the residual of every Ritz value."""
    A, start = matrices(batch=20, dim=40, seed=1)
    A = A + A.mT
    H, left, _ = recorded(A, start, 12)
    values, error = ritz_values(H, left, EPS)
    exact = torch.linalg.eigvalsh(A)
    distance = (values.real[:, :, None] - exact[:, None]).abs().amin(2)
    assert (distance <= error * 1.01).all()
    assert error[:, 0].median() < 0.05 * exact.abs().max()  # or it would promise nothing


def test_a_sample_that_is_not_finite_is_nan_and_alone():
    A, start = matrices()
    A[1, 0, 0] = torch.nan
    H, left, _ = recorded(A, start, 8)
    values, error = ritz_values(H, left, EPS)
    assert values[1].isnan().all()
    assert error[1].isnan().all()
    assert values[[0, 2]].isfinite().all()
    assert error[[0, 2]].isfinite().all()


def test_error_of_a_defective_eigenvalue_is_the_root_of_rounding():
    """A Jordan block of order p moves by eps^(1/p): the estimate must not promise more."""
    for order in (2, 3):
        A = 0.7 * torch.eye(order, dtype=torch.float64) + torch.diag(torch.ones(order - 1, dtype=torch.float64), 1)
        basis = torch.linalg.qr(torch.randn(order, order, generator=torch.Generator().manual_seed(0)).double()).Q
        values, error = ritz_values((basis @ A @ basis.mT)[None], torch.zeros(1, dtype=torch.float64), EPS)
        assert ((values - 0.7).abs() <= 3 * error).all()
        assert error.max() > EPS ** (1 / order)
