"""Does the map contract at a point: its Jacobian's spectral radius, largest eigenvalues and norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pydeq.diagnosis.subject import Subject
from pydeq.jacobian.arnoldi import arnoldi, ritz_values

_ARNOLDI_STEPS = 80
_POWER_STEPS = 15
_EIGENVALUES = 6


@dataclass(frozen=True)
class Contraction:
    """The Jacobian J of fn at a point; one row per sample, or one row if samples depend on each other.

    Args:
        radius: The largest modulus of an eigenvalue, float64 [rows].
        error: The estimated absolute error of ``radius``, float64 [rows].
        eigenvalues: The largest eigenvalues by modulus, complex128 [rows, at most 6].
        norm: An estimate from below of the largest singular value of J, float64 [rows].
    """

    radius: Tensor
    error: Tensor
    eigenvalues: Tensor
    norm: Tensor

    @staticmethod
    def at(subject: Subject, z: Tensor, together: bool) -> Contraction:
        """Measure at z [B, D].

        Args:
            together: Whether samples depend on each other.
        """
        linearization = subject.linearize(z)
        shape = (1, z.numel()) if together else tuple(z.shape)
        wide = torch.promote_types(z.dtype, torch.float32)

        def pull(v: Tensor) -> Tensor:
            return linearization.flat_vjp(v.view(z.shape).to(z.dtype)).to(wide).view(shape)

        step = subject.eps ** (1.0 / 3.0) * float(z.double().square().mean().sqrt().clamp_min(1e-3)) * shape[1] ** 0.5

        def push(v: Tensor) -> Tensor:
            v = v.view(z.shape).to(z.dtype)
            difference = subject.image(z + step * v).to(wide) - subject.image(z - step * v).to(wide)
            return (difference / (2.0 * step)).view(shape)

        generator = torch.Generator(z.device).manual_seed(2)
        start = torch.randn(shape, generator=generator, device=z.device, dtype=torch.float64).to(wide)
        values, errors = ritz_values(*arnoldi(pull, start, min(_ARNOLDI_STEPS, shape[1])), subject.eps)
        return Contraction(
            values[:, 0].abs(), errors[:, 0], values[:, :_EIGENVALUES], _largest_singular_value(pull, push, start)
        )

    @property
    def worst(self) -> int:
        """The row with the largest radius."""
        return int(self.radius.nan_to_num(torch.inf).argmax())

    def sentence(self) -> str:
        i = self.worst
        shown = ", ".join(_number(complex(value)) for value in self.eigenvalues[i][:4])
        return (
            f"spectral radius {float(self.radius[i]):.3g} (error {float(self.error[i]):.1g}), norm at least"
            f" {float(self.norm.max()):.3g}; largest eigenvalues {shown}"
        )


def _largest_singular_value(
    pull: Callable[[Tensor], Tensor], push: Callable[[Tensor], Tensor], start: Tensor
) -> Tensor:
    """Power iteration with J^T J."""
    v = start
    found = start.new_zeros(len(start), dtype=torch.float64)
    for _ in range(_POWER_STEPS):
        length = v.double().norm(dim=1, keepdim=True)
        image = push((v / torch.where(length > 0, length, 1.0)).to(start.dtype))
        found = torch.maximum(found, image.double().norm(dim=1))
        v = pull(image)
    return found


def _number(value: complex) -> str:
    if abs(value.imag) < 1e-6 * abs(value.real):
        return f"{value.real:.3g}"
    return f"{value.real:.3g}{value.imag:+.3g}i"
