"""The operation behind pydeq.Broyden. That it is Broyden's method is tested in tests/solvers/test_broyden.py."""

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

from pydeq import Broyden
from pydeq.ops.broyden_step import broyden_step, denominator_damping
from pydeq.ops.constants import DENOMINATOR_LIMIT, RUNNING, Counter
from pydeq.testing import tolerance

OP = torch.ops.pydeq.broyden_step.default
NAMES = [argument.name for argument in OP._schema.arguments]


def rounding(z):
    return tolerance(torch.promote_types(z.dtype, torch.float32), z.shape[1])


def size(x):
    """Norms of the rows of [B, D], float64 [B]; 0 where they are not finite."""
    return x.double().norm(dim=1).nan_to_num(0.0, 0.0)


def residual(arguments):
    iterate = arguments["iterate"] if arguments["iterate"].numel() else arguments["z"]
    return size(arguments["f"].double() - iterate.double())


def lengths(arguments):
    """||s_j|| by row of the Gram matrix, [B, K]."""
    return arguments["gram"].diagonal(dim1=1, dim2=2).nan_to_num(0.0, 0.0).clamp(min=0.0).sqrt()


def gram_tolerance(arguments, after=None, moved=0.0):
    """A product may be off by a rounding error of the lengths it is of, and as the newest step has ``moved``, [B, 1].

    Column 0 may be of w_0 instead of s_0.
    """
    length = lengths(after or arguments)
    columns = length.clone()
    if arguments["restart"].numel():
        previous = size(arguments["restart"])  # w_0, or the residual that w_0 is about to be made of
        squared = (DENOMINATOR_LIMIT * length[:, 0].square()).nan_to_num(0.0, 0.0)
        w0 = 2.0 * (length[:, 0] + residual(arguments) + previous) / squared
        columns[:, 0] = torch.stack([columns[:, 0], previous, w0.nan_to_num(0.0, 0.0, 0.0)]).amax(0)
    return (rounding(arguments["z"]) * length + 2.0 * moved)[:, :, None] * columns[:, None, :]


def perturb(arguments, generator):
    """Disturb the Gram matrix and the newest residual as rounding may."""
    z, f, gram = (arguments[name] for name in ("z", "f", "gram"))
    noise = 2.0 * torch.rand(gram.shape, generator=generator, dtype=gram.dtype) - 1.0
    gram.add_(gram_tolerance(arguments) * noise)
    direction = torch.nn.functional.normalize(torch.randn(z.shape, generator=generator).double(), dim=1)
    for step in [*arguments["steps"], arguments["restart"]]:
        if step.numel():
            along = torch.randn(z.shape[0], 1, generator=generator, dtype=torch.float64)
            direction += along * torch.nn.functional.normalize(step.double().nan_to_num(0.0, 0.0, 0.0), dim=1)
    # A half f rounds such a change away: move the iterate that it is held against.
    target = arguments["iterate"] if arguments["iterate"].numel() else f
    target.add_(rounding(z) * residual(arguments)[:, None] * direction)


def allowance(before, after):
    moved = sensitivity(broyden_step.reference, before, after, perturb)
    eps = torch.finfo(torch.promote_types(before["z"].dtype, torch.float32)).eps
    active = proceeded(before, after)[:, None]
    # The terms of v, g and c_j s_{j+1}, are about as large as this; v is divided by no less than 0.1.
    length = lengths(before)
    ratios = (length[:, 1:] / length[:, :-1]).nan_to_num(0.0, 0.0, 0.0).sum(1)
    summed = (4.0 * eps / DENOMINATOR_LIMIT * residual(before) * (1.0 + ratios))[:, None]

    def rounded(name, value, extra=0.0, j=None):
        magnitude = value.double().abs().nan_to_num(0.0, 0.0)
        coarse = torch.finfo(value.dtype).eps if value.dtype.itemsize == 2 else 0.0
        moves = moved[name] if j is None else moved[name][j]
        allowed = 8.0 * moves + (4.0 * eps + coarse) * magnitude + extra
        return torch.where(active if value.dim() == 2 else active[:, :, None], allowed, 0.0)

    count = after["counters"][:, Counter.COUNT]
    stored = torch.arange(before["thetas"].shape[1])
    # Past the last step nothing is read; a theta belongs to the step before it.
    dead = torch.where(active & (stored >= count[:, None]), torch.inf, 0.0)
    dead_theta = torch.where(active & (stored + 1 >= count[:, None]), torch.inf, 0.0)
    return {
        "scalars": scalar_tolerance(before, after),
        "next": rounded("next", after["next"], summed),
        "iterate": rounded("iterate", after["iterate"], summed) if after["iterate"].numel() else 0.0,
        "restart": rounded("restart", after["restart"]) if after["restart"].numel() else 0.0,
        "thetas": rounded("thetas", after["thetas"]) + dead_theta,
        "gram": rounded("gram", after["gram"], gram_tolerance(before, after, summed)) + dead[:, :, None],
        "steps": [rounded("steps", step, summed, j) + dead[:, j : j + 1] for j, step in enumerate(after["steps"])],
    }


def proceeded(before, after):
    """Samples that took Broyden's step, bool [B]."""
    return before["f"].isfinite().all(1) & (after["counters"][:, Counter.COUNT] > 0)


def steps(batch=7, dim=33, dtype=torch.float32, max_steps=12, memory=30, scale=1.0, **rules):
    return record(Broyden(memory=memory), *scaled(*mixed_map(batch, dim, dtype), scale), max_steps, **rules)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory", [3, 30])
def test_equals_its_reference(dtype, memory):
    check_op(OP, broyden_step.reference, steps(dtype=dtype, memory=memory), allowance, opcheck=[5])


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    check_op(OP, broyden_step.reference, steps(dim=size, max_steps=6), allowance)
    check_op(OP, broyden_step.reference, steps(dim=size, dtype=torch.bfloat16, memory=2, max_steps=6), allowance)


@pytest.mark.parametrize(("batch", "dim"), [(0, 33), (1, 1), (1, 9000), (3, 0)])
def test_batches(batch, dim):
    check_op(OP, broyden_step.reference, steps(batch, dim, max_steps=4), allowance, opcheck=[0])


@pytest.mark.parametrize("memory", [1, 2, 3, 5])
def test_restarts(memory):
    """Samples that lost their history reach the end of their memory later than the others."""
    samples = steps(batch=9, dim=65, dtype=torch.float64, memory=memory, max_steps=18)
    counts = {tuple(sample[NAMES.index("counters")][:, Counter.COUNT].tolist()) for sample in samples}
    assert any(len(set(count)) > 2 for count in counts)
    check_op(OP, broyden_step.reference, samples, allowance)


@pytest.mark.parametrize("memory", [1, 4, 10])
@pytest.mark.parametrize("max_steps", [1, 2, 3, 4, 5, 6, 7])
def test_the_last_steps_around_a_restart(memory, max_steps):
    check_op(OP, broyden_step.reference, steps(memory=memory, max_steps=max_steps), allowance)


@pytest.mark.parametrize("rules", [{"freeze": False}, {"stall": False}, {"atol": 1e-1}, {"rtol": 0.0}], ids=str)
def test_rules(rules):
    check_op(OP, broyden_step.reference, steps(dtype=torch.float64, max_steps=24, **rules), allowance)


@pytest.mark.parametrize(("dtype", "scale"), SCALES, ids=str)
def test_scales(dtype, scale):
    check_op(OP, broyden_step.reference, steps(dtype=dtype, memory=5, scale=scale), allowance)


@pytest.mark.parametrize("freeze", [True, False])
def test_stopped_samples_are_left_alone(freeze):
    assert check_frozen(OP, steps(max_steps=16, memory=4, freeze=freeze)) >= 10


def test_a_retry_forgets_the_history():
    lost = 0
    for sample in steps(batch=14, max_steps=9):
        before, after = dict(zip(NAMES, sample, strict=True)), run(OP, NAMES, sample)
        bad = ~before["f"].isfinite().all(1) & (after["counters"][:, Counter.STATUS] == RUNNING)
        assert (after["counters"][bad, Counter.COUNT] == 0).all()
        assert torch.equal(after["next"][bad], after["best"][1][bad])  # f at the best iterate
        lost += int(bad.sum())
    assert lost >= 4


def test_denominators_keep_their_distance_from_zero():
    d = torch.linspace(-0.5, 0.5, 1001, dtype=torch.float64)
    theta = denominator_damping(d)
    assert (theta[d.abs() >= DENOMINATOR_LIMIT] == 1.0).all()
    denominator = 1.0 - theta + theta * d
    assert (denominator.abs() >= DENOMINATOR_LIMIT * (1.0 - 1e-12)).all()
    assert ((denominator > 0) == (d >= 0)).all()
    assert ((theta >= 0.8) & (theta <= 1.2)).all()  # More and Trangenstein 1976, section 6: within 1 -+ 0.2
