"""Operations on a GPU do what their references do on the CPU, over the cases of ``tests/ops``."""

from __future__ import annotations

import pytest
import test_anderson_step
import test_broyden_step
import test_gmres_step
import test_picard_step
import torch
from check_op import DTYPES, SCALES, bits, check_frozen, compare, copy, run
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pydeq.ops.anderson_step import anderson_step
from pydeq.ops.broyden_step import broyden_step
from pydeq.ops.constants import Distribution, Progress
from pydeq.ops.gmres_step import gmres_step
from pydeq.ops.picard_step import picard_step
from pydeq.ops.random_probes import random_probes_reference
from pydeq.ops.squared_norm import mean_squared_norm, squared_norm, squared_norm_reference
from pydeq.testing import tolerance

STEPS = [
    (test_picard_step, picard_step.reference),
    (test_anderson_step, anderson_step.reference),
    (test_broyden_step, broyden_step.reference),
    (test_gmres_step, gmres_step.reference),
]
# Either side of a pack, a warp, the smallest block, the largest state of one block, clusters with and without a
# remainder, the largest state of a cluster.
SIZES = (1, 3, 4, 31, 33, 511, 512, 513, 1025, 4097, 8191, 8192, 8193, 20000, 65536, 65537)


@pytest.fixture(params=STEPS, ids=["picard", "anderson", "broyden", "gmres"])
def step(request):
    return request.param


def on_gpu(sample: tuple, names: list[str]) -> tuple:
    """The arguments with everything on the GPU that a solve has there; the report goes to pinned memory."""
    moved = []
    for name, argument in zip(names, sample, strict=True):
        if name == "progress":
            moved.append(argument.clone().pin_memory())
        else:
            moved.append(tree_map_only(Tensor, lambda t: t.cuda(), argument))
    return tuple(moved)


def call(op, names: list[str], sample: tuple) -> dict:
    """The arguments by name after a call on the GPU, and "return", on the CPU."""
    arguments = on_gpu(copy(sample), names)
    with torch.no_grad():
        result = op(*arguments)
    torch.cuda.synchronize()
    after = {**dict(zip(names, arguments, strict=True)), "return": result}
    return tree_map_only(Tensor, lambda t: t.cpu(), after)


# The allowances are estimates, from a few disturbances, of what another order of summation may do.
SLACK = 4.0


def widened(allowed):
    if isinstance(allowed, list | tuple):
        return type(allowed)(widened(part) for part in allowed)
    return SLACK * allowed


def check(module, reference, samples) -> None:
    """Values as the reference's, within what the operation's own test allows; the same bits when called again."""
    for index, sample in enumerate(samples):
        expected = run(reference, module.NAMES, sample)
        allowed = module.allowance(dict(zip(module.NAMES, sample, strict=True)), expected)
        actual = call(module.OP, module.NAMES, sample)
        again = call(module.OP, module.NAMES, sample)
        for name, want in expected.items():
            compare(f"sample {index}, {name}", actual[name], want, widened(allowed.get(name, 0.0)))
            compare(f"sample {index} once more, {name}", again[name], actual[name], 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(step, dtype):
    check(*step, step[0].steps(dtype=dtype))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [33, 8201, 66000])
def test_a_little_of_everything(step, dtype, dim):
    """A block, a cluster and two launches, the history full once, a sample lost on the way.

    Few calls, since each is slow there.
    """
    module, reference = step
    more = {test_picard_step: {}, test_gmres_step: {"restart": 3}}.get(module, {"memory": 3})
    samples = module.steps(batch=5, dim=dim, dtype=dtype, max_steps=7, **more)
    check(module, reference, [samples[k] for k in (0, 4, 5, 6)])


@pytest.mark.parametrize("size", SIZES)
def test_sizes(step, size):
    check(*step, step[0].steps(batch=5, dim=size, max_steps=6))
    check(*step, step[0].steps(batch=3, dim=size, dtype=torch.bfloat16, max_steps=4))
    check(*step, step[0].steps(batch=2, dim=size, dtype=torch.float64, max_steps=4))


@pytest.mark.parametrize(("batch", "dim"), [(0, 33), (1, 1), (1, 9000), (3, 0), (700, 5)])
def test_batches(step, batch, dim):
    check(*step, step[0].steps(batch, dim, max_steps=4))


@pytest.mark.parametrize("dim", [33, 9000])
@pytest.mark.parametrize("memory", [1, 2, 7, 20])
@pytest.mark.parametrize("module", STEPS[1:], ids=["anderson", "broyden", "gmres"])
def test_memories(module, memory, dim):
    depth = {"restart" if module[0] is test_gmres_step else "memory": memory}
    check(*module, module[0].steps(batch=4, dim=dim, max_steps=16 if dim < 100 else 9, **depth))


@pytest.mark.parametrize("dim", [33, 9000])
@pytest.mark.parametrize("damping", [1.0, 0.6])
@pytest.mark.parametrize("module", STEPS[:2], ids=["picard", "anderson"])
def test_dampings(module, damping, dim):
    for dtype in (torch.float32, torch.float16):
        check(*module, module[0].steps(dtype=dtype, damping=damping, dim=dim, max_steps=9))


@pytest.mark.parametrize("dim", [33, 9000])
@pytest.mark.parametrize("rules", [{"freeze": False}, {"stall": False}, {"atol": 1e-1}, {"rtol": 0.0}], ids=str)
def test_rules(step, rules, dim):
    check(*step, step[0].steps(dim=dim, max_steps=20 if dim < 100 else 8, **rules))


@pytest.mark.parametrize(("dtype", "scale"), SCALES, ids=str)
def test_scales(step, dtype, scale):
    check(*step, step[0].steps(dtype=dtype, scale=scale))
    check(*step, step[0].steps(batch=3, dim=9000, max_steps=5, dtype=dtype, scale=scale))


@pytest.mark.parametrize("freeze", [True, False])
def test_stopped_samples_are_left_alone(step, freeze):
    module, _ = step
    samples = [on_gpu(sample, module.NAMES) for sample in module.steps(max_steps=16, freeze=freeze)]
    assert check_frozen(module.OP, samples) >= 10


def test_a_report_to_memory_that_a_gpu_cannot_write(step):
    """The step then waits and copies."""
    module, reference = step
    sample = module.steps(batch=4, max_steps=3)[1]
    expected = run(reference, module.NAMES, sample)["progress"]
    arguments = on_gpu(copy(sample), module.NAMES)
    at = module.NAMES.index("progress")
    place = torch.zeros(len(Progress), dtype=torch.int64)
    with torch.no_grad():
        module.OP(*arguments[:at], place, *arguments[at + 1 :])
    assert torch.equal(place, expected)


def test_a_tensor_on_another_device_is_refused(step):
    module, _ = step
    sample = module.steps(batch=4, max_steps=3)[1]
    for wrong in ("z", "f", "next", "best", "scalars", "counters"):
        arguments = list(on_gpu(copy(sample), module.NAMES))
        at = module.NAMES.index(wrong)
        arguments[at] = arguments[at].cpu()
        with torch.no_grad(), pytest.raises(RuntimeError, match=rf"{wrong} must be .*on another device"):
            module.OP(*arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 0, 5), (2, 3, 0), (1, 1, 1), (3, 5, 33), (2, 700, 3), (1, 3, 2047), (4, 3, 2049), (2, 2, 100000)],
    ids=str,
)
def test_mean_squared_norm(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    expected, actual = squared_norm_reference(x), mean_squared_norm(x.cuda())
    assert actual.dtype == expected.dtype
    compute = torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(actual.cpu(), expected, rtol=tolerance(compute, shape[2]), atol=0.0)
    assert torch.equal(bits(mean_squared_norm(x.cuda())), bits(actual))
    rows = mean_squared_norm(x[:, 1:].cuda().contiguous())
    assert torch.equal(bits(rows), bits(actual[1:]))


@pytest.mark.sanitize
def test_squared_norm_of_rows_that_are_not_aligned():
    storage = torch.randn(3 * 5001 + 1, generator=torch.Generator().manual_seed(0)).cuda()
    x = storage[1:].view(3, 5001)
    assert torch.equal(squared_norm(x), squared_norm(x.clone()))


@pytest.mark.parametrize("distribution", Distribution)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(0, 2, 5), (1, 0, 5), (2, 3, 0), (1, 1, 1), (3, 5, 33), (2, 700, 3), (2, 3, 2047), (1, 3, 2049), (2, 2, 100000)],
    ids=str,
)
def test_random_probes_are_those_of_the_cpu(shape, dtype, distribution):
    """To the last bit."""
    probes, *sample = shape
    like = torch.empty(sample, dtype=dtype)
    for seed in (0, -1, 0x123456789ABCDEF0):
        call = (torch.tensor(seed), probes, int(distribution))
        expected = bits(random_probes_reference(like, *call))
        assert torch.equal(bits(torch.ops.pydeq.random_probes(like, *call)), expected)
        drawn = torch.ops.pydeq.random_probes(like.cuda(), call[0].cuda(), *call[1:])
        assert torch.equal(bits(drawn.cpu()), expected)


def test_random_probes_refuse_a_seed_on_another_device():
    with pytest.raises(RuntimeError, match=r"seed must be .*on another device"):
        torch.ops.pydeq.random_probes(torch.empty(2, 3, device="cuda"), torch.tensor(0), 1, 0)


@pytest.mark.sanitize
def test_random_probes_of_rows_that_are_not_aligned():
    like, seed = torch.empty(3, 5001, dtype=torch.float16), torch.tensor(7)
    for distribution in Distribution:
        call = (2, int(distribution))
        drawn = torch.ops.pydeq.random_probes(like.cuda(), seed.cuda(), *call)
        assert torch.equal(bits(drawn.cpu()), bits(random_probes_reference(like, seed, *call)))
