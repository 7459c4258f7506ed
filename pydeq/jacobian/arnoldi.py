"""Arnoldi's method: the eigenvalues of a linear map from products with it, for all samples of a batch at once.

v_1, ..., v_m is an orthonormal basis of the space spanned by a random start and its images. The eigenvalues of the
upper Hessenberg matrix H = V^H A V, the Ritz values, approach the outer eigenvalues of A first. Complex pairs and
defective eigenvalues need no special treatment (Saad, Numerical Methods for Large Eigenvalue Problems, 2011, chapter
6).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def arnoldi(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Take ``steps`` steps of Arnoldi's method for the linear map ``product`` of each sample.

    Args:
        product: [B, D] -> [B, D].
        start: [B, D], float32 or float64, not 0.
        steps: m, at least 1. More than D steps are useless.

    Returns:
        H, float64 [B, m, m], and the norm of the remainder of the last step, [B]. If a sample's basis is complete
        earlier, its later columns and its remainder are 0.
    """
    batch, size = start.shape
    H = torch.zeros(batch, steps + 1, steps, dtype=torch.float64, device=start.device)
    basis = torch.zeros(batch, steps + 1, size, dtype=start.dtype, device=start.device)
    eps = torch.finfo(start.dtype).eps
    basis[:, 0] = start / start.norm(dim=1, keepdim=True)
    for m in range(steps):
        w = product(basis[:, m])
        scale = w.norm(dim=1)
        known = basis[:, : m + 1]
        for _ in range(2):  # twice is enough (Giraud, Langou and Rozloznik 2005)
            h = torch.einsum("bmd,bd->bm", known, w)
            w = w - torch.einsum("bmd,bm->bd", known, h)
            H[:, : m + 1, m] += h
        left = w.norm(dim=1)
        # If the product lies in the basis, its remainder is rounding. NaN must stay.
        done = (left <= 10.0 * eps * scale) | (m + 1 >= size)
        left = torch.where(done, 0.0, left)
        H[:, m + 1, m] = left
        basis[:, m + 1] = torch.where(done[:, None], 0.0, w / torch.where(done, 1.0, left)[:, None])
    return H[:, :steps], H[:, steps, steps - 1]


def ritz_values(H: Tensor, left: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues of each H by falling modulus, and bounds of their errors.

    A Ritz value theta with right and left eigenvectors s and y of H is an eigenvalue of a map at a distance of
    left |s_m| from A. Rounding adds a few eps ||H||. To first order, theta moves by this distance over
    |y^H s| / (||y|| ||s||).

    Args:
        H: float64 [B, m, m].
        left: Norm of the remainder of the last step, [B].
        eps: Relative error of the products.

    Returns:
        complex128 [B, m] and float64 [B, m]; NaN if H is not finite.
    """
    bad = ~H.isfinite().flatten(1).all(1)
    H = torch.where(bad[:, None, None], 0.0, H)
    theta, right = torch.linalg.eig(H)
    norm = torch.linalg.matrix_norm(H)[:, None]
    residual = left[:, None] * right[:, -1].abs() + (4.0 + H.shape[1] ** 0.5) * eps * norm
    inverse, _ = torch.linalg.inv_ex(right)
    # Columns of `right` have norm 1. For a defective H it is singular, or nearly so. No error exceeds the norm of H.
    condition = torch.linalg.vector_norm(inverse, dim=2).nan_to_num(torch.inf, torch.inf)
    error = torch.minimum(torch.where(residual == 0, 0.0, condition * residual), norm + left[:, None])
    order = theta.abs().argsort(dim=1, descending=True, stable=True)
    theta, error = theta.gather(1, order), error.gather(1, order)
    return torch.where(bad[:, None], torch.nan, theta), torch.where(bad[:, None], torch.nan, error)
