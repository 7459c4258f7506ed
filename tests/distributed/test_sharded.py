"""sharded=True: each rank has its own entries of every sample, and the solve is that of the whole states."""

import warnings

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from world import SIZE

import pydeq
from pydeq import Status
from pydeq.state import as_tuple
from pydeq.testing import CallCounter, assert_close, softsign_map

SOLVERS = (
    pydeq.Picard(),
    pydeq.Picard(damping=0.7),
    pydeq.Anderson(),
    pydeq.Anderson(memory=3, damping=0.8),
    pydeq.Broyden(),
    pydeq.Broyden(memory=2),
    pydeq.GMRES(),
    pydeq.GMRES(restart=3),
)
DIM = 13


class Gather(torch.autograd.Function):
    """[B, D_r] on each rank -> [B, D] on all; the way back adds up what the ranks want of each entry."""

    @staticmethod
    def forward(x, sizes):
        parts = [x.new_empty(len(x), n) for n in sizes]
        whole = torch.zeros(len(x), sum(sizes), dtype=x.dtype)
        start = sum(sizes[: dist.get_rank()])
        whole[:, start : start + x.shape[1]] = x
        gathered = [torch.empty_like(whole) for _ in parts]
        dist.all_gather(gathered, whole)
        return torch.cat([each.split(sizes, 1)[rank] for rank, each in enumerate(gathered)], 1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.sizes = inputs[1]

    @staticmethod
    def backward(ctx, gradient):
        total = gradient.contiguous()
        dist.all_reduce(total)
        return total.split(ctx.sizes, 1)[dist.get_rank()], None


def shard(x, sizes):
    return x.split(sizes, 1)[dist.get_rank()].contiguous()


def sharded_map(fn, sizes):
    """fn(z, *context) on whole states -> on shards."""
    return lambda z, *context: shard(fn(Gather.apply(z, sizes), *context), sizes)


def assert_same_everywhere(tensor):
    parts = [torch.empty_like(tensor) for _ in range(SIZE)]
    dist.all_gather(parts, tensor)
    assert torch.equal(*[part.nan_to_num(-1.0) for part in parts])


def solve(rank, problem_of, sizes, solver, options):
    """The solution of whole states, that of shards, and its statuses."""
    problem = problem_of()
    whole = problem.solve(solver=solver, trace=True, **options)
    counter = CallCounter(sharded_map(problem.fn, sizes))
    parts = pydeq.fixed_point(
        counter, shard(problem.z0, sizes), *problem.context, solver=solver, trace=True, sharded=True,
        process_group=dist.group.WORLD, **options,
    )  # fmt: skip
    for name in ("status", "sample_nfe", "residual", "relative_residual", "trace"):
        assert_same_everywhere(getattr(parts, name))
    assert counter.calls == parts.nfe
    return whole, parts, parts.status.tolist()


def close(whole, parts, sizes, condition):
    assert parts.status.tolist() == whole.status.tolist()
    assert parts.sample_nfe.tolist() == whole.sample_nfe.tolist()
    assert parts.nfe == whole.nfe
    for name in ("value", "image"):
        assert_close(getattr(parts, name), shard(getattr(whole, name), sizes), size=DIM, condition=condition)
    assert_close(parts.trace[:3], whole.trace[:3], size=DIM, condition=condition)


class Softsign:
    """A problem to make anew on each rank."""

    def __init__(self, rhos, dtype=torch.float64, seed=0, scale=1.0, broken=()):
        self.arguments = rhos, dtype, seed, scale, broken

    def __call__(self):
        rhos, dtype, seed, scale, broken = self.arguments
        problem = softsign_map(rhos, DIM, dtype=dtype, seed=seed)
        fn = problem.fn
        for sample in broken:
            problem.context[0][sample, -1] = torch.nan  # in the shard of the last rank
        if scale != 1.0:
            object.__setattr__(problem, "fn", lambda z, *context: scale * fn(z / scale, *context))
        return problem


def solve_close(rank, problem_of, sizes, solver, options, condition):
    whole, parts, statuses = solve(rank, problem_of, sizes, solver, options)
    close(whole, parts, sizes, condition)
    return statuses


@pytest.mark.parametrize("sizes", [(6, 7), (13, 0)], ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_equals_the_solve_of_whole_states(world, solver, sizes):
    options = {"rtol": 1e-6, "max_steps": 60}
    statuses = world.run(solve_close, Softsign([0.1, 0.5, 0.8, 0.9]), sizes, solver, options, 1e6)
    assert statuses[0] == [Status.CONVERGED] * 4


@settings(max_examples=12, phases=[Phase.generate])  # to shrink would start processes again and again
@given(
    rhos=st.lists(st.sampled_from([0.0, 0.3, 0.6, 0.9]), min_size=1, max_size=4),
    first=st.integers(0, DIM),
    max_steps=st.integers(1, 12),
    seed=st.integers(0, 100),
    freeze=st.booleans(),
    scale=st.sampled_from([1.0, 2.0**-600, 2.0**600]),
)
def test_any_sharding(world, solver, rhos, first, max_steps, seed, freeze, scale):
    """Of any batch, with norms whose squares over- or underflow."""
    options = {"rtol": 1e-5, "max_steps": max_steps, "freeze": freeze}
    world.run(solve_close, Softsign(rhos, seed=seed, scale=scale), (first, DIM - first), solver, options, 1e6)


def solve_narrow(rank, dtype, solver):
    """Rounding decides about the last steps, so the count may be off; what the statuses promise holds."""
    rtol = 1e-4 if dtype == torch.float32 else 2e-2
    options = {"rtol": rtol, "max_steps": 60}
    whole, parts, _ = solve(rank, Softsign([0.1, 0.5, 0.8, 0.9], dtype), (6, 7), solver, options)
    assert parts.converged.all()
    assert abs(parts.nfe - whole.nfe) <= 2
    # Either is within rtol / (1 - rho) of the fixed point.
    assert_close(parts.image, shard(whole.image, (6, 7)), condition=20 * rtol / torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_states(world, solver, dtype):
    world.run(solve_narrow, dtype, solver)


def test_a_sample_that_is_lost_in_one_shard_is_lost_on_all_ranks(world, solver):
    options = {"rtol": 1e-6, "max_steps": 40}
    problem = Softsign([0.5, 0.5, 3.0, 0.7], broken=(1,))
    statuses = world.run(solve_close, problem, (6, 7), solver, options, 1e6)
    assert statuses[0] == statuses[1]
    assert statuses[0][1] == Status.NONFINITE
    assert statuses[0][::3] == [Status.CONVERGED] * 2


def solve_variants(rank, solver):
    """Compact batches, tuples and autocast go with shards as they go without."""
    problem = softsign_map([0.1, 0.1, 0.1, 0.9], DIM, dtype=torch.float64)
    fn, z0 = sharded_map(problem.fn, (6, 7)), shard(problem.z0, (6, 7))
    options = {"solver": solver, "rtol": 1e-8, "max_steps": 90, "process_group": dist.group.WORLD, "sharded": True}
    plain = pydeq.fixed_point(fn, z0, *problem.context, **options)
    counter = CallCounter(fn)
    compact = pydeq.fixed_point(counter, z0, *problem.context, **options, compact=True, batched_context=(True, True))
    assert counter.batches[-1] == 1
    assert torch.equal(compact.image, plain.image)

    def of_tuple(parts, *context):
        image = fn(torch.cat(parts, 1), *context)
        return image[:, :2], image[:, 2:]

    parts = pydeq.fixed_point(of_tuple, (z0[:, :2], z0[:, 2:]), *problem.context, **options)
    assert torch.equal(torch.cat(as_tuple(parts.image), 1), plain.image)
    with torch.autocast("cpu", torch.bfloat16):
        cast = pydeq.fixed_point(fn, z0, *problem.context, **options)
    assert torch.equal(cast.image, plain.image)


def test_compact_tuples_and_autocast(world, solver):
    world.run(solve_variants, solver)


class Cell(torch.nn.Module):
    """tanh(W z + x); a rank has some of W's rows and of x's columns."""

    def __init__(self, W, sizes=None):
        super().__init__()
        self.sizes = sizes
        self.W = torch.nn.Parameter(W if sizes is None else W.split(sizes)[dist.get_rank()].clone())

    def forward(self, z, x):
        return torch.tanh((z if self.sizes is None else Gather.apply(z, self.sizes)) @ self.W.T + x)


def differentiate(rank, solver):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(DIM, DIM, generator=generator, dtype=torch.float64) * 0.6 / DIM**0.5
    x = torch.randn(3, DIM, generator=generator, dtype=torch.float64)
    sizes = (6, 7)
    options = {"solver": solver, "rtol": 1e-11, "max_steps": 200}
    adjoint = pydeq.Implicit(**options)
    whole = pydeq.DEQ(Cell(W), adjoint=adjoint, **options)
    parts = pydeq.DEQ(Cell(W, sizes), adjoint=adjoint, process_group=dist.group.WORLD, sharded=True, **options)
    x_whole, x_part = x.clone().requires_grad_(), shard(x, sizes).requires_grad_()
    gradients, solutions = [], []
    for deq, data in ((whole, x_whole), (parts, x_part)):
        z, solution = deq(torch.zeros_like(data), data, return_solution=True)
        z.pow(3).sum().backward()
        gradients.append((deq.cell.W.grad, data.grad))
        solutions.append((solution, solution.backward))
    condition = 1e-9 / torch.finfo(torch.float64).eps
    (W_whole, x_whole), (W_part, x_part) = gradients
    assert_close(W_part, W_whole.split(sizes)[rank], size=DIM, condition=condition)
    assert_close(x_part, shard(x_whole, sizes), size=DIM, condition=condition)
    for one, other in zip(*solutions, strict=True):
        assert one.nfe == other.nfe
        assert other.converged.all()


def test_a_layer_of_shards_gives_the_gradients_of_a_whole_one(world, solver):
    world.run(differentiate, solver)


def refuse(rank):
    class Other(pydeq.solvers.Solver):
        def start(self, flat, rules, max_steps):
            raise AssertionError

    with pytest.raises(ValueError, match="solver must be one that takes sharded states, got"):
        pydeq.fixed_point(lambda z: z, torch.ones(2, 3), solver=Other(), process_group=dist.group.WORLD, sharded=True)
    shine = {"solver": pydeq.Broyden(), "adjoint": pydeq.Shine(), "process_group": dist.group.WORLD}
    x = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"Shine does not take sharded states: use pydeq\.Implicit"):
        pydeq.DEQ(lambda z, x: 0.5 * z + x, sharded=True, **shine)(torch.zeros(2, 3), x)
    with pytest.raises(ValueError, match=r"adjoint must be one that takes a process_group, got Reversible"):
        pydeq.DEQ(torch.nn.Identity(), adjoint=pydeq.Reversible(), process_group=dist.group.WORLD)


def test_solvers_and_adjoints_must_know_how(world):
    world.run(refuse)


def solve_relay(rank, solver):
    """Samples that depend on each other wake on all ranks alike."""

    def relay(z):
        return torch.stack([0.5 * z[0] + 1.0, torch.relu(z[0] - 1.0)])

    z0 = torch.zeros(2, DIM, dtype=torch.float64)
    options = {"solver": solver, "rtol": 1e-6, "trace": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pydeq.CouplingWarning)
        whole = pydeq.fixed_point(relay, z0, **options)
        parts = pydeq.fixed_point(relay, shard(z0, (6, 7)), process_group=dist.group.WORLD, sharded=True, **options)
    assert whole.converged.all()
    close(whole, parts, (6, 7), 1e6)
    assert torch.equal(relay(parts.value), parts.image)


def test_samples_that_depend_on_each_other(world, solver):
    world.run(solve_relay, solver)
