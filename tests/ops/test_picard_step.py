"""The operation behind pydeq.Picard."""

from collections.abc import Sequence

import pytest
import torch
from check_op import DTYPES, SCALES, SIZES, check_frozen, check_op, mixed_map, record, scalar_tolerance, scaled

from pydeq import Picard, Status
from pydeq.ops.constants import RUNNING, Counter, Scalar
from pydeq.ops.picard_step import picard_step
from pydeq.ops.reduction import norm

OP = torch.ops.pydeq.picard_step.default
NAMES = [argument.name for argument in OP._schema.arguments]


def allowance(before, after):
    return {"scalars": scalar_tolerance(before, after)}


def steps(batch=7, dim=33, dtype=torch.float32, damping=1.0, max_steps=12, scale=1.0, **rules):
    return record(Picard(damping=damping), *scaled(*mixed_map(batch, dim, dtype), scale), max_steps, **rules)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_equals_its_reference(dtype, damping):
    samples = steps(dtype=dtype, damping=damping)
    check_op(OP, picard_step.reference, samples, allowance, opcheck=[5])


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    check_op(OP, picard_step.reference, steps(dim=size, max_steps=6), allowance)
    check_op(OP, picard_step.reference, steps(dim=size, dtype=torch.bfloat16, damping=0.5, max_steps=6), allowance)


@pytest.mark.parametrize(("batch", "dim"), [(0, 33), (1, 1), (1, 9000), (3, 0)])
def test_batches(batch, dim):
    check_op(OP, picard_step.reference, steps(batch, dim, max_steps=4), allowance, opcheck=[0])


@pytest.mark.parametrize("rules", [{"freeze": False}, {"stall": False}, {"atol": 1e-1}, {"rtol": 0.0}], ids=str)
def test_rules(rules):
    check_op(OP, picard_step.reference, steps(max_steps=30, **rules), allowance)


@pytest.mark.parametrize(("dtype", "scale"), SCALES, ids=str)
def test_scales(dtype, scale):
    check_op(OP, picard_step.reference, steps(dtype=dtype, scale=scale), allowance)


@pytest.mark.parametrize("freeze", [True, False])
def test_stopped_samples_are_left_alone(freeze):
    assert check_frozen(OP, steps(max_steps=16, freeze=freeze)) >= 10


# What a sample was done as, how far its image has moved since in units of its tolerance, and what it then is.
LOOKED_AT = (
    (Status.CONVERGED, 0.0, Status.CONVERGED),
    (Status.CONVERGED, 0.5, Status.CONVERGED),
    (Status.CONVERGED, 3.0, RUNNING),
    (Status.CONVERGED, torch.nan, Status.NONFINITE),
    (Status.STALLED, 0.0, Status.STALLED),
    (Status.STALLED, 30.0, RUNNING),
    (Status.DIVERGED, 0.0, Status.DIVERGED),
    (Status.DIVERGED, 30.0, RUNNING),
    (Status.NONFINITE, 30.0, Status.NONFINITE),
    (Status.MAX_STEPS, 30.0, Status.MAX_STEPS),
)


def looking_back(dtype: torch.dtype, damping: float = 1.0, last: bool = False, dim: int = 33) -> list[Sequence]:
    """Arguments of a step that looks back after 7 evaluations: samples done at the third, then at the last."""
    before, moved, _ = zip(*LOOKED_AT, strict=True)
    batch, eps, rtol = len(before), torch.finfo(dtype).eps, 0.1
    value = torch.randn(batch, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    unit = value.double() / norm(value)[:, None]
    image = (value.double() + 0.5 * rtol * unit * norm(value)[:, None]).to(dtype)
    f = (image.double() + torch.tensor(moved, dtype=torch.float64)[:, None] * rtol * unit * norm(value)[:, None]).to(
        dtype
    )
    compute = torch.promote_types(dtype, torch.float32)
    scalars = torch.zeros(batch, len(Scalar), dtype=torch.float64)
    scalars[:, Scalar.BEST] = norm(image.to(compute) - value.to(compute))
    scalars[:, Scalar.BEST_NORM] = norm(image)
    scalars[:, Scalar.FIRST] = 1e-3
    counters = torch.zeros(batch, len(Counter), dtype=torch.int32)
    counters[:, Counter.STATUS] = torch.tensor([int(status) for status in before])
    counters[:, Counter.COUNT] = 3
    samples = []
    for evaluations in (3, 7):
        counters = counters.clone()
        counters[:, Counter.EVALUATIONS] = evaluations
        best, progress = torch.stack([value, image]), torch.zeros(3, dtype=torch.int64)
        samples.append(
            (
                value,
                f,
                value.clone(),
                best,
                scalars,
                counters,
                progress,
                7,
                rtol,
                0.0,
                eps,
                True,
                True,
                last,
                damping,
                7,
            )
        )
    return samples


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("damping", [1.0, 0.6])
@pytest.mark.parametrize("last", [False, True])
def test_looks_back(dtype, damping, last):
    samples = looking_back(dtype, damping, last)
    check_op(OP, picard_step.reference, samples, allowance, opcheck=[0])
    z, f, next, best, scalars, counters, progress, *more = (
        entry.clone() if isinstance(entry, torch.Tensor) else entry for entry in samples[0]
    )
    value, image = best.clone()
    OP(z, f, next, best, scalars, counters, progress, *more)
    for b, (before, _, after) in enumerate(LOOKED_AT):
        if last and after == RUNNING:
            after = before if before == Status.DIVERGED else Status.MAX_STEPS
        assert counters[b, Counter.STATUS] == after
        if before != after and after != Status.NONFINITE:  # all that is reported is of this evaluation
            assert torch.equal(best[1, b], f[b])
            assert float(scalars[b, Scalar.BEST]) == pytest.approx(
                float(norm(f[b] - value[b, None].double())), rel=1e-5
            )
            if not last:
                plain = value[b].double() + damping * (f[b].double() - value[b].double())
                torch.testing.assert_close(next[b].double(), plain, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
        elif before == after and before not in (Status.CONVERGED,):
            assert torch.equal(best[1, b], image[b])
        assert torch.equal(z[b], value[b])
    assert progress.tolist() == [8, 0 if last else sum(after == RUNNING for _, _, after in LOOKED_AT), 0]
    untouched = tuple(entry.clone() if isinstance(entry, torch.Tensor) else entry for entry in samples[1])
    OP(*untouched)
    for after, before in zip(untouched, samples[1], strict=True):
        if isinstance(after, torch.Tensor) and after.dtype != torch.int64:
            assert torch.equal(after, before) or after.isnan().any()
