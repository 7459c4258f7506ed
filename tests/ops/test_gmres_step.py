"""The operation behind pydeq.GMRES. That it is GMRES is tested in tests/solvers/test_gmres.py."""

import pytest
import torch
from check_op import (
    DTYPES,
    SCALES,
    SIZES,
    check_frozen,
    check_op,
    mixed_map,
    record,
    run,
    scalar_tolerance,
    scaled,
    sensitivity,
)

from pydeq import GMRES
from pydeq.ops.constants import RUNNING, Coordinate, Counter
from pydeq.ops.gmres_step import gmres_step
from pydeq.testing import tolerance

OP = torch.ops.pydeq.gmres_step.default
NAMES = [argument.name for argument in OP._schema.arguments]


def rounding(z):
    return tolerance(torch.promote_types(z.dtype, torch.float32), z.shape[1])


def residual(arguments):
    iterate = arguments["iterate"] if arguments["iterate"].numel() else arguments["z"]
    return (arguments["f"].double() - iterate.double()).norm(dim=1).nan_to_num(0.0, 0.0)


def perturb(arguments, generator):
    """Disturb the Gram matrix and the newest residual as rounding may."""
    z, f, gram = (arguments[name] for name in ("z", "f", "gram"))
    noise = 2.0 * torch.rand(gram.shape, generator=generator, dtype=gram.dtype) - 1.0
    gram.add_(rounding(z) * (noise + noise.mT) / 2.0)
    direction = torch.nn.functional.normalize(torch.randn(z.shape, generator=generator).double(), dim=1)
    for vector in arguments["basis"]:
        along = torch.randn(z.shape[0], 1, generator=generator, dtype=torch.float64)
        direction += along * vector.double().nan_to_num(0.0, 0.0, 0.0)
    # A half f rounds such a change away: move the iterate that it is held against.
    target = arguments["iterate"] if arguments["iterate"].numel() else f
    target.add_(rounding(z) * residual(arguments)[:, None] * direction)


def allowance(before, after):
    moved = sensitivity(gmres_step.reference, before, after, perturb)
    eps = torch.finfo(torch.promote_types(before["z"].dtype, torch.float32)).eps
    count = after["counters"][:, Counter.COUNT]
    moves = proceeded(before, after)
    # Terms of the next point: beta times a coordinate, of a vector whose entries are at most 1.
    coordinates = after["coordinates"].nan_to_num(0.0, 0.0, 0.0)
    terms = (after["lengths"].nan_to_num(0.0) * coordinates[:, Coordinate.POINT].norm(dim=1))[:, None]
    extends = moves & (count > 1)

    def rounded(name, value, extra=0.0, rows=moves, j=None):
        magnitude = value.double().abs().nan_to_num(0.0, 0.0)
        coarse = torch.finfo(value.dtype).eps if value.dtype.itemsize == 2 else 0.0
        change = moved[name] if j is None else moved[name][j]
        allowed = 16.0 * change + (4.0 * eps + coarse) * magnitude + extra
        return torch.where(rows.view(-1, *[1] * (value.dim() - 1)), allowed, 0.0)

    # A newest vector is as far off as rounding is beside the remainder that it was normalized by.
    noise = 4.0 * rounding(before["z"])
    names = ("gram", "images", "directions", "coordinates")
    small = {name: rounded(name, after[name], noise) for name in names}
    return {
        "scalars": scalar_tolerance(before, after),
        "next": rounded("next", after["next"], 4.0 * eps * terms),
        "iterate": rounded("iterate", after["iterate"], 4.0 * eps * terms) if after["iterate"].numel() else 0.0,
        "start": 0.0,
        "basis": [
            rounded("basis", vector, 4.0 * eps, extends | moves & (count == 1), j)
            for j, vector in enumerate(after["basis"])
        ],
        "lengths": rounded("lengths", after["lengths"], noise * residual(before)),
        **small,
    }


def proceeded(before, after):
    """Samples that took a step of GMRES, bool [B]."""
    running = after["counters"][:, Counter.STATUS] == RUNNING
    return before["f"].isfinite().all(1) & (running | (not before["freeze"]))


def steps(batch=7, dim=33, dtype=torch.float32, max_steps=12, restart=30, scale=1.0, **rules):
    return record(GMRES(restart=restart), *scaled(*mixed_map(batch, dim, dtype), scale), max_steps, **rules)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("restart", [3, 30])
def test_equals_its_reference(dtype, restart):
    check_op(OP, gmres_step.reference, steps(dtype=dtype, restart=restart), allowance, opcheck=[5])


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    check_op(OP, gmres_step.reference, steps(dim=size, max_steps=6), allowance)
    check_op(OP, gmres_step.reference, steps(dim=size, dtype=torch.bfloat16, restart=2, max_steps=6), allowance)


@pytest.mark.parametrize(("batch", "dim"), [(0, 33), (1, 1), (1, 9000), (3, 0)])
def test_batches(batch, dim):
    check_op(OP, gmres_step.reference, steps(batch, dim, max_steps=4), allowance, opcheck=[0])


@pytest.mark.parametrize("restart", [1, 2, 3, 5])
def test_restarts(restart):
    """Samples that lost their basis reach the end of their cycle later than the others."""
    samples = steps(batch=9, dim=65, dtype=torch.float64, restart=restart, max_steps=14)
    counts = {tuple(sample[NAMES.index("counters")][:, Counter.COUNT].tolist()) for sample in samples}
    assert any(len(set(count)) > 1 for count in counts)
    assert max(max(count) for count in counts) == restart
    check_op(OP, gmres_step.reference, samples, allowance)


@pytest.mark.parametrize("restart", [1, 4, 10])
@pytest.mark.parametrize("max_steps", [1, 2, 3, 4, 5, 6, 7])
def test_the_last_steps_around_a_restart(restart, max_steps):
    check_op(OP, gmres_step.reference, steps(restart=restart, max_steps=max_steps), allowance)


@pytest.mark.parametrize("rules", [{"freeze": False}, {"stall": False}, {"atol": 1e-1}, {"rtol": 0.0}], ids=str)
def test_rules(rules):
    check_op(OP, gmres_step.reference, steps(dtype=torch.float64, max_steps=16, **rules), allowance)


@pytest.mark.parametrize(("dtype", "scale"), SCALES, ids=str)
def test_scales(dtype, scale):
    check_op(OP, gmres_step.reference, steps(dtype=dtype, restart=5, scale=scale), allowance)


@pytest.mark.parametrize("freeze", [True, False])
def test_stopped_samples_are_left_alone(freeze):
    assert check_frozen(OP, steps(max_steps=16, restart=4, freeze=freeze)) >= 10


def test_a_retry_forgets_the_basis():
    lost = 0
    for sample in steps(batch=14, max_steps=9):
        before, after = dict(zip(NAMES, sample, strict=True)), run(OP, NAMES, sample)
        bad = ~before["f"].isfinite().all(1) & (after["counters"][:, Counter.STATUS] == RUNNING)
        assert (after["counters"][bad, Counter.COUNT] == 0).all()
        assert torch.equal(after["next"][bad], after["best"][1][bad])  # f at the best iterate
        lost += int(bad.sum())
    assert lost >= 4
