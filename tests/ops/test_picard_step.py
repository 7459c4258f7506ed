"""The operation behind pydeq.Picard."""

import pytest
import torch
from check_op import DTYPES, SCALES, SIZES, check_frozen, check_op, mixed_map, record, scalar_tolerance, scaled

from pydeq import Picard
from pydeq.ops.picard_step import picard_step_reference

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
    check_op(OP, picard_step_reference, samples, allowance, opcheck=[5])


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    check_op(OP, picard_step_reference, steps(dim=size, max_steps=6), allowance)
    check_op(OP, picard_step_reference, steps(dim=size, dtype=torch.bfloat16, damping=0.5, max_steps=6), allowance)


@pytest.mark.parametrize(("batch", "dim"), [(0, 33), (1, 1), (1, 9000), (3, 0)])
def test_batches(batch, dim):
    check_op(OP, picard_step_reference, steps(batch, dim, max_steps=4), allowance, opcheck=[0])


@pytest.mark.parametrize("rules", [{"freeze": False}, {"stall": False}, {"atol": 1e-1}, {"rtol": 0.0}], ids=str)
def test_rules(rules):
    check_op(OP, picard_step_reference, steps(max_steps=30, **rules), allowance)


@pytest.mark.parametrize(("dtype", "scale"), SCALES, ids=str)
def test_scales(dtype, scale):
    check_op(OP, picard_step_reference, steps(dtype=dtype, scale=scale), allowance)


@pytest.mark.parametrize("freeze", [True, False])
def test_stopped_samples_are_left_alone(freeze):
    assert check_frozen(OP, steps(max_steps=16, freeze=freeze)) >= 10
