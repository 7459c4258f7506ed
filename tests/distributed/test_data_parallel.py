"""The layer under DistributedDataParallel and FSDP2, and around cells that communicate: gradients of one process."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from world import SIZE

import pydeq
from pydeq.testing import assert_close

DIM, BATCH = 8, 3
SOLVERS = (pydeq.Picard(), pydeq.Anderson(), pydeq.Broyden())


class Meeting(torch.autograd.Function):
    """The identity; all ranks must come, forward and backward, to every order."""

    @staticmethod
    def forward(x):
        present = torch.ones(1)
        dist.all_reduce(present)
        assert present == SIZE
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return Meeting.apply(gradient)


class Cell(nn.Module):
    def __init__(self, meets=False):
        super().__init__()
        self.inner, self.outer = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.meets = meets

    def forward(self, z, x):
        if self.meets:
            z = Meeting.apply(z)
        return torch.tanh(self.outer(torch.tanh(self.inner(z))) + x)


class Model(nn.Module):
    def __init__(self, adjoint=None, solver=None, group=None, meets=False):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(DIM, DIM)
        solver = solver or pydeq.Anderson()
        self.deq = pydeq.DEQ(
            Cell(meets), solver=solver, adjoint=adjoint, rtol=1e-11, max_steps=200, process_group=group
        )
        self.double()

    def forward(self, x):
        z, solution = self.deq(torch.zeros_like(x), self.encoder(x), return_solution=True)
        return z.square().mean(), solution


def batches():
    """The batch of each rank: where tanh saturates, the solve takes few steps."""
    x = torch.randn(SIZE, BATCH, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x * torch.tensor([10.0, 0.1], dtype=torch.float64).view(SIZE, 1, 1)


def train(model, x, steps=2):
    """Gradients, and how often fn was called, of each step of a short training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss, solution = model(x)
        loss.backward()
        gradients = [
            p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone() for p in model.parameters()
        ]
        seen.append((gradients, solution))
        optimizer.step()
    return seen


def expect(parallel, model):
    """What ``model`` trained on all batches at once gives."""
    for (gradients, _), (exact, _) in zip(parallel, train(model, batches().flatten(0, 1)), strict=True):
        assert any(float(g.abs().max()) > 1e-3 for g in exact)
        for gradient, of_one in zip(gradients, exact, strict=True):
            assert_close(gradient, of_one, size=DIM * BATCH * SIZE, condition=1e-9 / torch.finfo(torch.float64).eps)


def own_calls(adjoint, solver, x):
    """How often fn is called on this rank's batch alone, forward and backward."""
    model = Model(adjoint, solver)
    (_, solution), *_ = train(model, x, steps=1)
    return solution.nfe, solution.backward.nfe if solution.backward else 0


def under_ddp(rank, adjoint, solver, meets):
    x = batches()[rank]
    group = dist.group.WORLD if meets else None
    model = DistributedDataParallel(Model(adjoint, solver, group, meets))
    seen = train(model, x)
    expect(seen, Model(adjoint, solver))
    solution = seen[0][1]
    return (solution.nfe, solution.backward.nfe if solution.backward else 0), own_calls(adjoint, solver, x)


def under_fsdp(rank, adjoint, solver):
    x = batches()[rank]
    mesh = init_device_mesh("cpu", (SIZE,))
    model = Model(adjoint, solver, mesh.get_group())
    for module in (model.deq.cell.inner, model.deq.cell, model):
        fully_shard(module, mesh=mesh)
    seen = train(model, x)
    expect(seen, Model(adjoint, solver))
    with torch.no_grad():
        loss, evaluated = model.eval()(x)
    assert loss.isfinite()
    assert evaluated.converged.all()
    solution = seen[0][1]
    return (solution.nfe, solution.backward.nfe if solution.backward else 0), own_calls(adjoint, solver, x)


def check_calls(counts):
    """Equal on all ranks, and no more than the slowest one needs; the ranks would not have been equal alone."""
    together, alone = zip(*counts, strict=True)
    assert set(together) == {tuple(max(calls) for calls in zip(*alone, strict=True))}
    assert alone[0][0] != alone[1][0]


@pytest.mark.parametrize(
    ("solver", "meets"),
    [(pydeq.Anderson(), False), *((solver, True) for solver in SOLVERS)],
    ids=lambda part: ("plain", "communicating")[part] if isinstance(part, bool) else type(part).__name__,
)
def test_ddp_gives_the_gradients_of_one_process(world, solver, meets):
    adjoint = pydeq.Implicit(solver=solver, rtol=1e-11, max_steps=200)
    counts = world.run(under_ddp, adjoint, solver, meets)
    if meets:
        check_calls(counts)
    else:
        assert all(together == alone for together, alone in counts)


@pytest.mark.parametrize(
    ("adjoint", "solver"),
    [
        *[(pydeq.Implicit(solver=solver, rtol=1e-11, max_steps=200), solver) for solver in SOLVERS],
        (pydeq.Phantom(steps=3, damping=0.5), pydeq.Anderson()),
        (pydeq.Phantom(steps=3, damping=0.5, form="neumann"), pydeq.Anderson()),
        (pydeq.JacobianFree(), pydeq.Broyden()),
    ],
    ids=lambda part: type(part).__name__,
)
def test_fsdp_gives_the_gradients_of_one_process(world, adjoint, solver):
    check_calls(world.run(under_fsdp, adjoint, solver))


def penalize(rank):
    """FSDP2 does not differentiate twice what it wraps; a penalty made of Jacobian-vector products needs it once."""
    x, gradients = batches()[rank], []
    mesh = init_device_mesh("cpu", (SIZE,))
    for group in (mesh.get_group(), None):
        model = Model(group=group)
        if group:
            fully_shard(model.deq.cell, mesh=mesh)
        data = model.encoder(x)
        z = model.deq(torch.zeros_like(x), data)
        generator = torch.Generator().manual_seed(rank)
        penalty = pydeq.jacobian_penalty(model.deq.cell, z, data, mode="jvp", generator=generator)
        penalty.backward()
        gradients.append([p.grad for p in model.deq.cell.parameters()])
    for gradient, alone in zip(*gradients, strict=True):
        dist.all_reduce(alone)
        assert float(alone.abs().max()) > 1e-3
        assert_close(gradient.full_tensor(), alone / SIZE, size=DIM * BATCH * SIZE, condition=100.0)


def test_a_penalty_by_jacobian_vector_products_under_fsdp(world):
    world.run(penalize)


def penalize_by_differences(rank):
    """In a layer, by default: the evaluation that attaches the graph, and one more."""
    x, gradients, reasons = batches()[rank], [], []
    mesh = init_device_mesh("cpu", (SIZE,))
    for group in (mesh.get_group(), None):
        model = Model(group=group)
        if group:
            fully_shard(model.deq.cell, mesh=mesh)
        data = model.encoder(x)
        penalty = pydeq.JacobianPenalty(1.0, mode="auto" if group else "difference", probes=2)
        torch.manual_seed(rank)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            z, solution = model.deq(torch.zeros_like(x), data, return_solution=True, penalty=penalty)
        reasons.append([str(w.message) for w in caught if "differences of fn" in str(w.message)])
        (z.square().mean() + solution.penalty).backward()
        gradients.append([p.grad for p in model.deq.cell.parameters()])
    assert len(reasons[0]) == 1
    assert "FSDP2 frees parameters after each backward pass" in reasons[0][0]
    assert not reasons[1]
    for gradient, alone in zip(*gradients, strict=True):
        dist.all_reduce(alone)
        assert float(alone.abs().max()) > 1e-3
        assert_close(gradient.full_tensor(), alone / SIZE, size=DIM * BATCH * SIZE, condition=1e5)


def test_a_layers_penalty_under_fsdp(world):
    world.run(penalize_by_differences)


def second_order(rank):
    """A Hessian-vector product; the ranks' loops of the second backward pass end together, too."""
    x = batches()[rank]
    adjoint = pydeq.Implicit(rtol=1e-11, max_steps=200)
    products = []
    for model in (Model(adjoint, group=dist.group.WORLD, meets=True), Model(adjoint)):
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(model(x)[0], parameters, create_graph=True)
        product = sum((g * torch.linspace(-1.0, 1.0, g.numel()).view_as(g)).sum() for g in gradients)
        products.append(torch.autograd.grad(product, parameters))
    assert any(float(p.abs().max()) > 1e-3 for p in products[1])
    for together, alone in zip(*products, strict=True):
        assert_close(together, alone, size=DIM * BATCH, condition=1e-8 / torch.finfo(torch.float64).eps)


def test_second_derivatives(world):
    world.run(second_order)


def empty_batch(rank):
    x = batches()[0][: BATCH if rank == 0 else 0]
    model = Model(group=dist.group.WORLD, meets=True)
    single = copy.deepcopy(model)
    single.deq.cell.meets, single.deq.ranks = False, None
    outputs = []
    for each in (model, single):
        z, solution = each.deq(torch.zeros_like(x), each.encoder(x), return_solution=True)
        z.square().sum().backward()
        outputs.append((solution, [p.grad for p in each.parameters()]))
    (solution, gradients), (_, exact) = outputs
    for gradient, of_one in zip(gradients, exact, strict=True):
        assert torch.equal(gradient, of_one)
    return solution.nfe, solution.backward.nfe


def test_a_rank_without_samples_takes_part(world):
    first, second = world.run(empty_batch)
    assert first == second
    assert min(first) > 1


class BrokenError(Exception):
    pass


def broken_backward(rank):
    """fn's derivative fails on one rank in the adjoint's solve."""
    model = Model(group=dist.group.WORLD)
    calls = 0

    def fail(module, gradient):
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 3:
            raise BrokenError("no more")

    model.deq.cell.outer.register_full_backward_pre_hook(fail)
    loss, _ = model(batches()[rank])
    error, message = ((RuntimeError, "the solve failed on rank 1"), (BrokenError, "no more"))[rank]
    with pytest.raises(error, match=message):
        loss.backward()
    assert calls == 3


def test_an_error_in_the_backward_pass_of_one_rank_ends_it_on_all(world):
    world.run(broken_backward)


class Learned(nn.Module):
    """An initial state that is learned."""

    def __init__(self, adjoint):
        super().__init__()
        torch.manual_seed(0)
        self.start = nn.Parameter(torch.zeros(1, DIM))
        self.deq = pydeq.DEQ(Cell(), adjoint=adjoint)
        for p in self.deq.parameters():
            p.data.mul_(0.5)

    def forward(self, x):
        return self.deq(self.start.expand(len(x), DIM), x).square().mean()


def learning_the_start(rank, adjoint, find):
    model = DistributedDataParallel(Learned(adjoint), find_unused_parameters=find)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model.zero_grad()
            model(torch.full((2, DIM), 1.0 + rank)).backward()
    said = any("z0 is a parameter" in str(warning.message) for warning in caught)
    learned = model.module.start.grad is not None and bool(model.module.start.grad.any())
    return said, learned, float(model.module.deq.cell.inner.weight.grad.norm()) > 0


@pytest.mark.parametrize(
    ("adjoint", "find", "learns"),
    [(pydeq.Implicit(), True, False), (pydeq.Unrolled(), False, True), (pydeq.Reversible(), False, True)],
    ids=["Implicit", "Unrolled", "Reversible"],
)
def test_a_learned_initial_state_under_ddp(world, adjoint, find, learns):
    """What the layer's warning and the docs say to do."""
    for said, learned, trained in world.run(learning_the_start, adjoint, find):
        assert (said, learned, trained) == (not learns, learns, True)
