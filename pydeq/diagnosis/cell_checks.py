"""What a cell does besides mapping a state: random numbers, state that it keeps, samples that depend on each other."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from pydeq.cell.replay_rng import random_modules
from pydeq.cell.running_statistics import batch_norms
from pydeq.diagnosis.subject import Subject, dense_buffers, same_bits


@dataclass
class Habits:
    """What a cell does in a call besides its result.

    Attributes:
        draws: Whether two calls with the same z give different values.
        replays: Whether they give the same values with the same random numbers.
        random: Names of modules that draw random numbers.
        buffers: Names of buffers that a call changes.
        batch_norms: Names of modules that take their statistics from the batch.
        coupled: Whether samples depend on each other.
        rounded: Whether samples depend on each other only in rounding errors.
    """

    draws: bool = False
    replays: bool = True
    random: list[str] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)
    batch_norms: list[str] = field(default_factory=list)
    coupled: bool = False
    rounded: bool = False

    def sentences(self) -> list[str]:
        """What is worth telling."""
        told = []
        if self.draws and self.replays:
            names = f" ({', '.join(self.random)})" if self.random else ""
            told.append(f"each call draws different random numbers{names}, so there is no fixed point")
        elif self.draws:
            told.append(
                "two calls with the same z give different values, and random numbers are not the reason: the cell keeps"
                " state from call to call" + (f" (buffers {', '.join(self.buffers)})" if self.buffers else "")
            )
        if self.buffers and not (self.draws and not self.replays):
            told.append(f"a call changes buffers ({', '.join(self.buffers)}), but not its result")
        if self.coupled:
            names = f" ({', '.join(self.batch_norms)} in training mode)" if self.batch_norms else ""
            told.append(f"samples depend on each other{names}: the batch is one system")
        elif self.rounded:
            told.append("samples depend on each other only in rounding errors")
        return told


def habits_of(raw: Subject, replayed: Subject, module: nn.Module | None) -> Habits:
    """Look at a cell.

    Args:
        raw: The cell as it is.
        replayed: The cell with the same random numbers in every call.
        module: The cell's module, if it has one.
    """
    found = Habits(random=random_modules(module), batch_norms=batch_norms(module))
    start = raw.start
    names = dense_buffers(module)
    before = {name: buffer.detach().clone() for name, buffer in names.items()}
    first = raw.image(start)
    found.buffers = [name for name, buffer in names.items() if not torch.equal(buffer, before[name])]
    found.draws = not bool(same_bits(first, raw.image(start)).all())
    found.replays = bool(same_bits(replayed.image(start), replayed.image(start)).all())
    if len(start) > 1 and start.shape[1]:
        _look_for_coupling(found, replayed, start)
    return found


def changing_norms(module: nn.Module | None) -> list[str]:
    """Names of torch's spectral norms that take a step of their power iteration in each call."""
    return [
        name
        for name, part in (() if module is None else module.named_modules())
        if isinstance(part, parametrizations._SpectralNorm) and part.training
    ]


def _look_for_coupling(found: Habits, subject: Subject, start: Tensor) -> None:
    """Move one sample, and look at the images of the others."""
    generator = torch.Generator(start.device).manual_seed(0)
    image = subject.image(start)
    scale = float(image.double().square().mean().sqrt()) or 1.0
    noise = torch.randn(start.shape[1], generator=generator, device=start.device, dtype=torch.float64)
    for z in (start, image):
        moved = z.clone()
        moved[0] = (z[0].double() + scale * noise).to(z.dtype)
        one, other = subject.image(z)[1:], subject.image(moved)[1:]
        if bool(same_bits(one, other).all()):
            continue
        difference = (one.double() - other.double()).abs()
        size = one.double().abs().max().clamp_min(scale)
        if bool((difference > 100.0 * subject.eps * size).any()):
            found.coupled = True
        else:
            found.rounded = True
