"""A solve keeps one draw for all of its evaluations, wherever and whenever they happen."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

import pydeq
from pydeq.cell.scope import active_scope, scope_of

BATCH, DIM = 4, 6


class Recording(nn.Module):
    """A contraction that notes the mask of each of its evaluations."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.A = nn.Parameter(0.15 * torch.randn(DIM, DIM, generator=generator).to(dtype))
        self.dropout = pydeq.nn.VariationalDropout(0.4)
        self.masks = []

    def forward(self, z, x):
        self.masks.append(self.dropout(torch.ones_like(z)))
        return torch.tanh(self.dropout(z @ self.A.T) + x)

    def take(self):
        """The masks since the last time, which must be one."""
        masks, self.masks = self.masks, []
        assert len(masks) > 1
        assert all(torch.equal(mask, masks[0]) for mask in masks)
        return masks[0]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def inputs(dtype=torch.float64):
    x = torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
    return torch.zeros_like(x), x


ADJOINTS = [
    pydeq.Implicit(),
    pydeq.Phantom(steps=3),
    pydeq.Phantom(steps=3, form="neumann"),
    pydeq.Shine(refine_steps=2),
    pydeq.Unrolled(),
    pydeq.Unrolled(checkpoint=True),
    pydeq.Reversible(checkpoints=20),
]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_one_mask_per_step_and_another_for_the_next(adjoint):
    cell, (z0, x) = Recording(), inputs()
    solver = pydeq.Broyden() if isinstance(adjoint, pydeq.Shine) else pydeq.Anderson()
    deq = pydeq.DEQ(cell, solver=solver, adjoint=adjoint, rtol=1e-4, max_steps=100)
    seen = []
    for _ in range(3):
        z, solution = deq(z0, x, return_solution=True, penalty=pydeq.JacobianPenalty(0.1))
        assert solution.converged.all()
        (z.sum() + solution.penalty).backward()
        seen.append(cell.take())
    with torch.no_grad():
        deq(z0, x)
        seen.append(cell.take())
    for i, mask in enumerate(seen):
        assert not any(torch.equal(mask, other) for other in seen[:i])


def test_what_backward_evaluates_again_sees_the_mask_of_its_forward():
    cell, (z0, x) = Recording(), inputs()
    x.requires_grad_()
    deq = pydeq.DEQ(cell, rtol=1e-8)
    first, mask_of_first = deq(z0, x), cell.take()
    second, mask_of_second = deq(z0, x), cell.take()
    for z, mask in ((first, mask_of_first), (second, mask_of_second)):
        torch.autograd.grad(z.square().sum(), x, create_graph=True)
        assert len(cell.masks) == 1
        assert torch.equal(cell.masks.pop(), mask)


def test_gradients_to_second_order_are_those_of_the_drawn_map():
    cell, (z0, x) = Recording(), inputs()
    deq = pydeq.DEQ(cell, adjoint=pydeq.Implicit(rtol=1e-12), rtol=1e-12, max_steps=200)

    def solve(x, A):
        torch.manual_seed(7)  # the same mask for each of gradcheck's perturbations
        return torch.func.functional_call(deq, {"cell.A": A}, (z0, x))

    A = cell.A.detach().clone().requires_grad_()
    x.requires_grad_()
    assert torch.autograd.gradcheck(solve, (x, A))
    assert torch.autograd.gradgradcheck(solve, (x, A))


def test_fixed_point_keeps_one_mask_too():
    cell, (z0, x) = Recording(), inputs()
    assert pydeq.fixed_point(cell, z0, x, rtol=1e-8).converged.all()
    mask = cell.take()
    pydeq.fixed_point(cell, z0, x)
    assert not torch.equal(cell.take(), mask)
    assert active_scope() is None


def test_cells_that_are_no_modules():
    cell, (z0, x) = Recording(), inputs()
    deq = pydeq.DEQ(lambda z, x: 0.5 * cell(z, x) + 0.5 * z, rtol=1e-8)
    assert deq(z0, x, return_solution=True)[1].converged.all()
    cell.take()


def test_an_inner_solve_keeps_its_mask_over_the_outer_one():
    cell, (z0, x) = Recording(), inputs()
    inner = pydeq.DEQ(cell, rtol=1e-10)
    outer = pydeq.DEQ(lambda z, x: 0.4 * inner(torch.zeros_like(z), z + x), rtol=1e-8)
    for _ in range(2):
        assert outer(z0, x, return_solution=True)[1].converged.all()
        cell.take()


def test_a_scope_reaches_beyond_a_solve():
    cell, (z0, x) = Recording(), inputs()
    deq = pydeq.DEQ(cell, rtol=1e-8)
    with pydeq.nn.solve_scope():
        z = deq(z0, x)
        pydeq.jacobian_penalty(cell, z, x)
        with pydeq.nn.solve_scope():
            deq(z0, x)
        deq(z0, x)
        cell.take()
    cell(z0, x)
    cell(z0, x)
    assert not torch.equal(*cell.masks)


def test_masks_drawn_in_inference_mode_serve_gradients():
    cell, (z0, x) = Recording(), inputs()
    with pydeq.nn.solve_scope():
        with torch.inference_mode():
            pydeq.DEQ(cell)(z0, x)
        pydeq.DEQ(cell)(z0, x).sum().backward()
    cell.take()
    assert cell.A.grad is not None


def test_a_cell_that_raises_leaves_no_scope_behind():
    cell, (z0, x) = Recording(), inputs()
    with pytest.raises(RuntimeError):
        pydeq.DEQ(cell)(z0, x[:, :3])
    assert active_scope() is None
    with pytest.raises(ZeroDivisionError), pydeq.nn.solve_scope():
        raise ZeroDivisionError
    assert active_scope() is None


def test_nothing_is_kept_once_the_graph_is_gone():
    cell, (z0, x) = Recording(), inputs()
    z = pydeq.DEQ(cell)(z0, x)
    kept = weakref.ref(cell.masks[0])
    bound = weakref.ref(z.grad_fn.next_functions[0][0])  # behind a copy
    z.sum().backward()
    cell.masks.clear()
    del z
    gc.collect()
    assert kept() is None
    assert bound() is None


def test_threads_have_their_own_scopes():
    (z0, x), found = inputs(), {}
    cell = Recording()
    meet = threading.Barrier(2)

    def work(name):
        masks = []

        def meeting(z, x):
            meet.wait(timeout=30)  # the solves take turns, evaluation by evaluation
            masks.append(cell.dropout(torch.ones_like(z)))
            return 0.5 * masks[-1] * z + x

        pydeq.DEQ(meeting, rtol=0.0, max_steps=6)(z0, x)
        found[name] = masks

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for masks in found.values():
        assert len(masks) == 7
        assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert not torch.equal(found["a"][0], found["b"][0])


def test_modules_that_keep_nothing_are_called_as_they_are():
    cell = nn.Linear(3, 3)
    assert scope_of(cell, list(cell.modules())) is None
    cell = nn.Sequential(cell, pydeq.nn.VariationalDropout())
    assert scope_of(cell, list(cell.modules())) is not None


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_layers_are_copied_between_forward_and_backward(clone):
    cell, (z0, x) = Recording(), inputs()
    deq = pydeq.DEQ(cell)
    z = deq(z0, x)
    cell.masks.clear()
    twin = clone(deq)
    torch.manual_seed(3)
    expected = deq(z0, x)
    torch.manual_seed(3)
    assert torch.equal(twin(z0, x), expected)
    z.sum().backward()
    assert twin.cell.A.grad is None
    assert list(deq.state_dict()) == ["cell.A"]


def test_autocast_trains_with_one_mask():
    cell, (z0, x) = Recording(torch.float32), inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        z = pydeq.DEQ(cell)(z0, x)
    cell.take()
    z.sum().backward()
    assert cell.A.grad.isfinite().all()


class Compiled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = pydeq.nn.weight_norm(nn.Linear(DIM, DIM))
        self.dropout = pydeq.nn.SequenceDropout(0.4)
        self.second = pydeq.nn.spectral_norm(nn.Linear(DIM, DIM), bound=0.5)

    def forward(self, z, x):
        return torch.tanh(self.second(self.dropout(self.linear(z))) + x)


def test_a_compiled_cell_is_one_graph_in_three_variants():
    torch.manual_seed(0)
    cell = Compiled()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    deq = pydeq.DEQ(torch.compile(cell, backend=backend, fullgraph=True), rtol=1e-5)
    z0, x = torch.zeros(2, 3, DIM), torch.randn(2, 3, DIM)
    outputs = []
    for _ in range(3):
        z, solution = deq(z0, x, return_solution=True)
        assert solution.converged.all()
        z.sum().backward()
        outputs.append(z)
    assert len(graphs) == 3  # the first evaluation, which draws; the other ones; the one with gradients
    assert not torch.equal(outputs[0], outputs[1])
    with torch.no_grad():
        torch.testing.assert_close(deq.eval()(z0, x), pydeq.DEQ(cell, rtol=1e-5)(z0, x), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
