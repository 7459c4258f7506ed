"""One step of restarted GMRES (Saad and Schultz 1986) on each sample, for affine f(z) = A z + v: M z = v, M = I - A.

Residuals are measured: an evaluated point y has g = f(y) - y = r(y), with r(y) = v - M y. A cycle starts at a measured
point x_0 with beta = ||r_0||, V = [r_0 / beta], and evaluates

    y = x + d,   d = c (r + a multiple of the newest basis vector, if r has almost none of it)

where x is the point of x_0 + span(V) with the smallest residual r so far. c is ||d|| / ||M d|| of the previous
direction, so that r(y) is about as far from r as r is from 0. With c = 1 and a small ||M||, x would be extrapolated far
beyond y, and a rounding error of f would grow by 1 / ||M|| from step to step. After the evaluation, f is known on x_0 +
the span of all directions d = y - x so far: M d = r - g. g is in span(V), except for one new direction, which becomes
the next basis vector. So all points and residuals of the cycle are known by coordinates in V:

    h = G^-1 V^T g,   G = V^T V;     v_new = (g - V h) / ||g - V h||;     g = V h + ||g - V h|| v_new

and the least-squares problem is solved in coordinates, in float64. It uses an orthonormal basis e_i of the images M d,
and the directions p_i with M p_i = e_i:

    e = M d - sum_i <e_i, M d> e_i,   p = d - sum_i <e_i, M d> p_i,   twice, then both divided by ||e||
    r <- r - <e_i, r> e_i,   x <- x + <e_i, r> p_i                    for all i so far, then for the newest one

Classical Gram-Schmidt leaves a basis that is not exactly orthogonal. The inner products use G, so they are correct for
this basis. The error in the orthogonality neither grows from vector to vector nor changes x, since g = V h + ... holds
to rounding for any inner product. It is eps (||g|| / ||g - V h||)^2, mostly in the lengths, which are computed from 1 -
h^T V^T g. The largest |G - I|, measured for 24 unknowns, is 1e-11 and, in float32, at most 2e-3. For A = .99 I + 1e-3
E, with remainders of 1e-3 of g, it is 2e-10 and 4e-2.

A cycle ends with an evaluation of x itself, and the next cycle starts from x and its measured residual. It ends if the
known residual meets the tolerance or is below rounding errors, if the basis has ``restart`` vectors, or if there is no
new direction. So if dense GMRES needs k products with M, this solver takes at most k + 2 evaluations, the first of z0
and the last of the solution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pydeq.ops.constants import BREAKDOWN_EPSILONS, CONTRACTION, MARGIN, NEWEST_SHARE, Coordinate, Counter, Scalar
from pydeq.ops.reduction import inner
from pydeq.ops.step import Step, StepOperation, report, settle
from pydeq.ops.termination import judge


@dataclass(frozen=True)
class Extension:
    """A measured residual, added to the cycles of R samples with n basis vectors; lengths in units of beta."""

    h: Tensor  # [R, n] coordinates of g / ||g||
    remainder: Tensor  # [R] ||g - V h|| / ||g||; 0 if there is no new direction
    image: Tensor  # [R, n + 1] e_{n-1}
    direction: Tensor  # [R, n] p_{n-1}
    x: Tensor  # [R, n]
    rho: Tensor  # [R, n + 1] coordinates of r
    known: Tensor  # [R] ||r||
    gain: Tensor  # [R] ||d|| / ||M d||
    usable: Tensor  # [R] whether M d was a new image; if not, x and rho are the old ones


def extend(
    gram: Tensor,
    images: Tensor,
    directions: Tensor,
    x: Tensor,
    rho: Tensor,
    a: Tensor,
    products: Tensor,
    ratio: Tensor,
    eps: float,
) -> Extension:
    """Add the residual measured at ``a`` to the least-squares problem; all float64.

    Args:
        gram: G, [R, n, n].
        images, directions: e_i and p_i so far, [R, n - 1, n].
        x, rho, a: Coordinates of x, of its residual, and of the point evaluated, [R, n].
        products: V^T g / ||g||, [R, n].
        ratio: ||g|| / beta, [R].
        eps: Of the dtype that products are computed in.
    """
    n = x.shape[1]
    diagonal = gram.diagonal(dim1=1, dim2=2)
    h = products / diagonal
    for _ in range(2):  # G is nearly the identity: the error is squared, then cubed
        h = h + (products - _apply(gram, h)) / diagonal
    left = 1.0 - (h * products).sum(1)
    remainder = torch.where(left > BREAKDOWN_EPSILONS * eps, left, 0.0).sqrt()

    wide = torch.zeros(len(x), n + 1, n + 1, dtype=gram.dtype, device=gram.device)
    wide[:, :n, :n] = gram
    wide[:, n, n] = 1.0
    longer = torch.nn.functional.pad
    old = longer(rho, (0, 1))
    e = old - ratio[:, None] * torch.cat([h, remainder[:, None]], 1)
    p = a - x
    scale = _norm(wide, old) + ratio
    gain = _norm(gram, p) / _norm(wide, e)
    basis = longer(images, (0, 1))
    for _ in range(2):
        c = (basis * _apply(wide, e)[:, None]).sum(2, keepdim=True)
        e, p = e - (c * basis).sum(1), p - (c * directions).sum(1)
    length = _norm(wide, e)
    usable = length > BREAKDOWN_EPSILONS * eps * scale
    e, p = e / length[:, None], p / length[:, None]
    c = (basis * _apply(wide, old)[:, None]).sum(2, keepdim=True)
    r, moved = old - (c * basis).sum(1), x + (c * directions).sum(1)
    along = _inner(wide, e, r)[:, None]
    r, moved = r - along * e, moved + along * p
    r, moved = torch.where(usable[:, None], r, old), torch.where(usable[:, None], moved, x)
    return Extension(h, remainder, e, p, moved, r, _norm(wide, r), gain, usable)


def _apply(gram: Tensor, u: Tensor) -> Tensor:
    return (gram * u[:, None, :]).sum(2)


def _inner(gram: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return (u * _apply(gram, v)).sum(1)


def _norm(gram: Tensor, u: Tensor) -> Tensor:
    return _inner(gram, u, u).clamp(min=0.0).sqrt()


def gmres_step_reference(
    step: Step,
    iterate: Tensor,  # [B, D], or empty
    start: Tensor,  # [B, D]
    basis: Sequence[Tensor],  # each [B, D]
    gram: Tensor,  # [B, K, K]
    images: Tensor,  # [B, K, K]
    directions: Tensor,  # [B, K, K]
    coordinates: Tensor,  # [B, len(Coordinate), K]
    lengths: Tensor,  # [B]
    penultimate: bool,
    restart: int,
) -> None:
    """Take a step of restarted GMRES.

    Args:
        iterate: The iterates in float32 where z is of a half type; else of no elements.
        start: Where each sample's cycle starts, float32 for half states.
        basis: V, each vector of the dtype of ``start``; at least min(step.number + 1, restart) of them unless this
            evaluation is the last.
        gram: V^T V, float64, with K the largest number of basis vectors.
        images, directions: Coordinates of e_i and p_i, float64.
        coordinates: By :class:`pydeq.ops.constants.Coordinate`, float64.
        lengths: beta, the unit of the coordinates, float64.
        penultimate: Whether exactly one evaluation follows. It is spent on the point with the smallest known residual
            where the one after that is not expected to be better.
        restart: Basis vectors of a cycle, at least 1.
    """
    z, f, next, scalars, counters = step.z, step.f, step.next, step.scalars, step.counters
    rules, reduction = step.rules, step.rules.reduction
    verdict = judge(z, f, scalars, counters, rules, step.last)
    settle(step, verdict)
    exact = iterate.numel() > 0  # then z is the rounding of iterate
    counters[verdict.retry, Counter.COUNT] = 0
    if exact:
        iterate.copy_(torch.where(verdict.retry[:, None], next.to(iterate.dtype), iterate))
    position = iterate if exact else z
    compute = torch.promote_types(z.dtype, torch.float32)
    rounding = torch.finfo(compute).eps

    def move(rows: Tensor, to: Tensor) -> None:
        next[rows] = to.to(z.dtype)
        if exact:
            iterate[rows] = to.to(compute)

    def begin(rows: Tensor, g: Tensor, size: Tensor) -> None:
        """Begin a cycle at the iterate and take a plain step; no cycle where the residual cannot be normalized."""
        sound = (1.0 / size).to(compute).isfinite() & (size > 0)
        start[rows] = position[rows]
        counters[rows, Counter.COUNT] = sound.int()
        # From a new best a plain step is the one a retry would take.
        counters[rows[verdict.improved[rows]], Counter.TRIED] = 1
        move(rows, f[rows])
        rows, size = rows[sound], size[sound]
        basis[0][rows] = (g[sound] / size[:, None]).to(compute)
        gram[rows, 0, 0] = inner(basis[0][rows], basis[0][rows], reduction)
        lengths[rows] = size
        for name, value in ((Coordinate.MINIMUM, 0.0), (Coordinate.RESIDUAL, 1.0), (Coordinate.POINT, 1.0)):
            coordinates[rows, name, 0] = value

    samples = verdict.proceed.nonzero()[:, 0]
    counts = counters[samples, Counter.COUNT]
    for n in counts.unique().tolist():
        rows = samples[counts == n]
        g = (f[rows].to(compute) - position[rows]).double()
        # ||g|| is the residual, measured without overflow; but of half states g is not z's.
        size = inner(g, g, reduction).sqrt() if exact else scalars[rows, Scalar.RESIDUAL]
        if n == 0:
            begin(rows, g, size)
            continue
        V = torch.stack([basis[i][rows].double() for i in range(n)], 1)  # [R, n, D]
        beta = lengths[rows]
        unit = torch.where(size > 0, size, 1.0)
        products = inner(V, (g / unit[:, None])[:, None], reduction)
        x, rho, a = (coordinates[rows, name, :n] for name in Coordinate)
        old = _norm(gram[rows, :n, :n], rho)
        ratio = size / beta
        new = extend(
            gram[rows, :n, :n], images[rows, : n - 1, :n], directions[rows, : n - 1, :n], x, rho, a, products, ratio,
            rounding,
        )  # fmt: skip
        sound = torch.cat([new.h, new.x, new.rho], 1).isfinite().all(1)
        norm = scalars[rows, Scalar.NORM]
        tolerance = torch.minimum(rules.atol + rules.rtol * norm, CONTRACTION * scalars[rows, Scalar.FIRST])
        target = torch.maximum(MARGIN * tolerance, torch.finfo(z.dtype).eps * norm) / beta
        closes = (new.known <= target) | (new.remainder == 0) | ~new.usable | (n == restart)
        closes |= (ratio > old) & penultimate

        d = new.rho.clone()
        least = NEWEST_SHARE * new.known
        d[:, n] = torch.where(d[:, n].abs() < least, torch.copysign(least, d[:, n]), d[:, n])
        point = torch.nn.functional.pad(new.x, (0, 1)) + new.gain[:, None] * d
        closed, grows = sound & closes, sound & ~closes
        counters[rows[closed], Counter.COUNT] = 0
        counters[rows[closed], Counter.FAR] = 0  # the solution is evaluated next
        to = start[rows].double() + beta[:, None] * (V * new.x[:, :, None]).sum(1)
        move(rows[closed], to[closed])

        if grows.any():
            r, V, beta = rows[grows], V[grows], beta[grows]
            newest = (g / unit[:, None])[grows] - (V * new.h[grows][:, :, None]).sum(1)
            newest = (newest / new.remainder[grows][:, None]).to(compute)
            basis[n][r] = newest
            V = torch.cat([V, newest.double()[:, None]], 1)
            move(r, start[r].double() + beta[:, None] * (V * point[grows][:, :, None]).sum(1))
            row = inner(V, V[:, n:], reduction)
            gram[r, n, : n + 1] = row
            gram[r, : n + 1, n] = row
            images[r, n - 1, : n + 1] = new.image[grows]
            directions[r, n - 1, :n] = new.direction[grows]
            directions[r, n - 1, n] = 0.0
            images[r, : n - 1, n] = 0.0
            directions[r, : n - 1, n] = 0.0
            coordinates[r, Coordinate.MINIMUM, : n + 1] = torch.nn.functional.pad(new.x[grows], (0, 1))
            coordinates[r, Coordinate.RESIDUAL, : n + 1] = new.rho[grows]
            coordinates[r, Coordinate.POINT, : n + 1] = point[grows]
            counters[r, Counter.COUNT] = n + 1
        if not sound.all():
            begin(rows[~sound], g[~sound], size[~sound])
    report(step.progress, step.counters, step.number)


gmres_step = StepOperation(
    "gmres_step",
    "Tensor(g!) iterate, Tensor(h!) start, Tensor(i!)[] basis, Tensor(j!) gram, Tensor(k!) images,"
    " Tensor(l!) directions, Tensor(m!) coordinates, Tensor(n!) lengths, bool penultimate, int restart",
    gmres_step_reference,
)
