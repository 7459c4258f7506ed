"""The Jacobian at the fixed point: norms to penalize, and the spectral radius to watch."""

from pydeq.jacobian.norms import frobenius_norm_squared, jacobian_penalty
from pydeq.jacobian.spectral import spectral_radius

__all__ = ["frobenius_norm_squared", "jacobian_penalty", "spectral_radius"]
