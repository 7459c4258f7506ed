"""The operation behind pydeq.Anderson."""

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

from pydeq import Anderson
from pydeq.ops.anderson_step import anderson_step, mixing_coefficients
from pydeq.ops.constants import COEFFICIENT_LIMIT, RUNNING, Counter
from pydeq.testing import assert_close, tolerance

OP = torch.ops.pydeq.anderson_step.default
NAMES = [argument.name for argument in OP._schema.arguments]


def rounding(z):
    return tolerance(torch.promote_types(z.dtype, torch.float32), z.shape[1])


def gram_tolerance(before, after):
    """<g_i, g_j> may be off by a rounding error of ||g_i|| ||g_j||."""
    length = after["gram"].diagonal(dim1=1, dim2=2).nan_to_num(0.0, 0.0).sqrt()
    return rounding(before["z"]) * length[:, :, None] * length[:, None, :]


def perturb(arguments, generator):
    """Disturb the Gram matrix and the newest residual as rounding may."""
    z, f, gram = (arguments[name] for name in ("z", "f", "gram"))
    noise = 2.0 * torch.rand(gram.shape, generator=generator, dtype=gram.dtype) - 1.0
    gram.add_(gram_tolerance(arguments, arguments) * (noise + noise.mT) / 2.0)
    g = f.double() - z.double()
    direction = torch.randn(z.shape, generator=generator, dtype=torch.float64)
    direction = direction / direction.norm(dim=1, keepdim=True)
    along = torch.randn(z.shape[0], arguments["residuals"].shape[1], 1, generator=generator, dtype=torch.float64)
    ring = arguments["residuals"].double().nan_to_num(0.0, 0.0, 0.0)
    direction += (along * torch.nn.functional.normalize(ring, dim=2)).sum(1)
    f.copy_(f.double() + rounding(z) * g.norm(dim=1, keepdim=True).nan_to_num(0.0, 0.0) * direction)


def allowance(before, after):
    moved = sensitivity(anderson_step.reference, before, after, perturb)["next"]
    ulp = torch.finfo(before["z"].dtype).eps * after["next"].double().abs().nan_to_num(0.0, 0.0)
    # Where the ring was not moved on, its next slot is free: what is written there is not read.
    proceeds = proceeded(before, after)
    active = after["counters"][:, Counter.EVALUATIONS] > before["counters"][:, Counter.EVALUATIONS]
    head = torch.nn.functional.one_hot(before["counters"][:, Counter.HEAD].long(), before["gram"].shape[1])
    free = torch.where((head == 1) & (active & ~proceeds)[:, None], torch.inf, 0.0)[:, :, None]
    return {
        "scalars": scalar_tolerance(before, after),
        "residuals": free,
        "values": free,
        "gram": gram_tolerance(before, after),
        "next": torch.where(proceeds[:, None], 8.0 * moved + 4.0 * ulp, 0.0),
    }


def proceeded(before, after):
    """Samples that took Anderson's step, bool [B]: it moved them on in the ring."""
    return before["counters"][:, Counter.HEAD] != after["counters"][:, Counter.HEAD]


def steps(batch=7, dim=33, dtype=torch.float32, max_steps=12, memory=4, damping=1.0, ridge=1e-6, scale=1.0, **rules):
    solver = Anderson(memory=memory, damping=damping, ridge=ridge)
    return record(solver, *scaled(*mixed_map(batch, dim, dtype), scale), max_steps, **rules)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_equals_its_reference(dtype, damping):
    samples = steps(dtype=dtype, damping=damping)
    check_op(OP, anderson_step.reference, samples, allowance, opcheck=[5])


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    check_op(OP, anderson_step.reference, steps(dim=size, max_steps=6), allowance)
    check_op(OP, anderson_step.reference, steps(dim=size, dtype=torch.bfloat16, max_steps=6), allowance)


@pytest.mark.parametrize(("batch", "dim"), [(0, 33), (1, 1), (1, 9000), (3, 0)])
def test_batches(batch, dim):
    check_op(OP, anderson_step.reference, steps(batch, dim, max_steps=4), allowance, opcheck=[0])


@pytest.mark.parametrize("memory", [1, 2, 3, 7, 20])
def test_memories(memory):
    check_op(OP, anderson_step.reference, steps(memory=memory, dim=65, max_steps=16), allowance)


@pytest.mark.parametrize(
    "rules",
    [{"freeze": False}, {"stall": False}, {"atol": 1e-1}, {"rtol": 0.0}, {"ridge": 1e-2}],
    ids=str,
)
def test_rules(rules):
    check_op(OP, anderson_step.reference, steps(max_steps=24, **rules), allowance)


@pytest.mark.parametrize(("dtype", "scale"), SCALES, ids=str)
def test_scales(dtype, scale):
    check_op(OP, anderson_step.reference, steps(dtype=dtype, scale=scale), allowance)


@pytest.mark.parametrize("freeze", [True, False])
def test_stopped_samples_are_left_alone(freeze):
    assert check_frozen(OP, steps(max_steps=16, freeze=freeze)) >= 10


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("damping", "ridge"), [(1.0, 1e-6), (0.6, 1e-6), (1.0, 1e-3)])
def test_mixes_as_its_equation_says(dtype, damping, ridge):
    """With the coefficients of the Gram matrix it left, next is the mixture, up to one rounding of each term."""
    looked_at = 0
    for sample in steps(dtype=dtype, damping=damping, ridge=ridge, max_steps=9):
        before, after = dict(zip(NAMES, sample, strict=True)), run(OP, NAMES, sample)
        for b in proceeded(before, after).nonzero()[:, 0].tolist():
            head, count = (int(after["counters"][b, column]) for column in (Counter.HEAD, Counter.COUNT))
            slots = [(head - 1 - age) % after["gram"].shape[1] for age in range(count)]
            gram = after["gram"][b][slots][:, slots]
            scale = 1.0 / gram.diag().sqrt()  # of columns: they may differ by orders of magnitude
            system = scale * gram * scale[:, None] + ridge * torch.eye(count, dtype=gram.dtype)
            a = scale * torch.linalg.solve(system, scale)
            a = a / a.sum()
            values, residuals = after["values"][b, slots].double(), after["residuals"][b, slots].double()
            terms = a[:, None] * (values - (1.0 - damping) * residuals)
            compute = torch.promote_types(dtype, torch.float32)
            allowed = tolerance(compute, count) * terms.abs().sum(0)
            allowed += torch.finfo(dtype).eps * terms.sum(0).abs()
            allowed += tolerance(torch.float64) * count / ridge * terms.abs().sum()  # of a: the system's condition
            assert ((after["next"][b].double() - terms.sum(0)).abs() <= allowed).all()
            looked_at += count
    assert looked_at > 50


def correlated(batch, memory, noise, seed=0):
    """Gram matrices of residuals that differ by ``noise``, of scales from 1e-8 to 1e8."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(batch, 1, 50, generator=generator, dtype=torch.float64)
    columns = columns + noise * torch.randn(batch, memory, 50, generator=generator, dtype=torch.float64)
    columns = columns * torch.logspace(-8, 8, batch, dtype=torch.float64)[:, None, None]
    return columns @ columns.mT


def test_coefficients_solve_the_small_system():
    gram, count, ridge = correlated(5, 4, 0.5), torch.tensor([1, 2, 3, 4, 4]), 1e-6
    a, used = mixing_coefficients(gram, count, ridge)
    assert torch.equal(used, count)
    assert_close(a.sum(1), torch.ones(5, dtype=torch.float64), size=4)
    for b, n in enumerate(count.tolist()):
        system = gram[b, :n, :n] + ridge * gram[b, :n, :n].diag().diag()
        product = system @ a[b, :n]
        assert_close(product, product.mean().expand(n), condition=1e3)
        assert not a[b, n:].any()


def test_coefficients_do_not_depend_on_scale():
    gram, count = correlated(3, 4, 0.5), torch.tensor([4, 4, 4])
    scaled = gram * 2.0 ** torch.tensor([-40.0, 6.0, 80.0], dtype=torch.float64)[:, None, None]
    assert torch.equal(mixing_coefficients(gram, count, 1e-6)[0], mixing_coefficients(scaled, count, 1e-6)[0])


def test_coefficients_drop_the_oldest_columns_where_they_spoil_the_system():
    gram = correlated(4, 3, 0.5)
    gram[3] = correlated(1, 3, 1e-7)[0]  # nearly parallel: to cancel them takes coefficients of 1e7
    gram[0, 2], gram[0, :, 2] = torch.nan, torch.nan
    gram[1, 1], gram[1, :, 1] = torch.inf, torch.inf
    gram[2] = 0.0  # underflow
    a, used = mixing_coefficients(gram, torch.tensor([3, 3, 3, 3]), 0.0)
    assert used.tolist() == [2, 1, 1, 1]
    assert a.isfinite().all()
    assert (a.abs().sum(1) <= COEFFICIENT_LIMIT).all()


@pytest.mark.parametrize("freeze", [True, False])
def test_a_retry_forgets_the_history(freeze):
    names, lost = [], 0
    for sample in steps(batch=14, max_steps=9, freeze=freeze):
        before, after = dict(zip(NAMES, sample, strict=True)), run(OP, NAMES, sample)
        bad = ~before["f"].isfinite().all(1) & (after["counters"][:, Counter.STATUS] == RUNNING)
        assert (after["counters"][bad, Counter.COUNT] == 0).all()
        assert torch.equal(after["next"][bad], after["best"][1][bad])  # f at the best iterate
        lost += int(bad.sum())
        names.append(bad)
    assert lost >= 4
