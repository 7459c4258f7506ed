"""The Jacobian at the fixed point: its norm, for penalties, and its eigenvalues, for monitoring."""

from pydeq.jacobian.norms import frobenius_norm_squared, jacobian_penalty
from pydeq.jacobian.penalty import JacobianPenalty
from pydeq.jacobian.spectral import SpectralRadius, Spectrum, jacobian_spectrum, spectral_radius

__all__ = [
    "JacobianPenalty",
    "SpectralRadius",
    "Spectrum",
    "frobenius_norm_squared",
    "jacobian_penalty",
    "jacobian_spectrum",
    "spectral_radius",
]
