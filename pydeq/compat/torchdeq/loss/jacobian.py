"""The Jacobian penalty and the spectral radius."""

from __future__ import annotations

from torch import Tensor

from pydeq.compat.jacobian import dominant_eigenvalue, hutchinson
from pydeq.compat.mode import is_legacy

__all__ = ["jac_reg", "power_method"]


def jac_reg(f0: Tensor, z0: Tensor, vecs: int = 1, create_graph: bool = True) -> Tensor:
    """Estimate ||J||_F^2 / numel(z0) of J = df0/dz0 by Gaussian probes (Hutchinson 1989).

    Args:
        f0, z0: f(z0) and z0, with the graph between them.
        vecs: Probes, at least 1.
        create_graph: Whether the estimate is to be differentiated.

    Returns:
        0-d tensor.

    Source: Bai, Koltun and Kolter, Stabilizing Equilibrium Models by Jacobian Regularization, ICML 2021.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> z = torch.zeros(1, 4, requires_grad=True)
        >>> torchdeq.jac_reg(0.5 * z, z).shape
        torch.Size([])
    """
    return hutchinson(f0, z0, vecs, create_graph, is_legacy())


def power_method(f0: Tensor, z0: Tensor, n_iters: int = 100) -> tuple[Tensor, Tensor]:
    """Estimate the largest |eigenvalue| of J = df0/dz0 of each sample by power iteration.

    Args:
        f0, z0: f(z0) and z0, with the graph between them; samples are independent.
        n_iters: Vector-Jacobian products, at least 1.

    Returns:
        The last direction, like z0, and the moduli, (B,).

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> z = torch.zeros(1, 2, requires_grad=True)
        >>> torchdeq.power_method(z @ torch.tensor([[0.75, 0.0], [0.0, 0.25]]), z)[1]
        tensor([0.7500])
    """
    return dominant_eigenvalue(f0, z0, n_iters, is_legacy())
