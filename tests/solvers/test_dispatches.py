"""What a workspace costs the host: fills, allocations and operations per solve and per step.

On a GPU each fill is a launch, and each allocation a call of torch's allocator. The meta device stands in for a GPU: it
gets the same calls.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pydeq
from pydeq.ops.termination import Rules
from pydeq.solvers.buffers import zeros

SOLVERS = [pydeq.Picard(damping=0.7), pydeq.Anderson(), pydeq.Broyden(), pydeq.GMRES()]
RULES = Rules(rtol=0.0, atol=0.0, eps=torch.finfo(torch.float32).eps, freeze=True, stall=True)
FILLS = ("zero", "fill", "full", "ones")
ALLOCATIONS = ("empty", *FILLS)
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)


class Dispatches(TorchDispatchMode):
    """The names of the operations that were dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))

    def count(self, *words: str) -> int:
        return sum(any(word in name for word in words) for name in self.names)


def start(solver, steps: int = 12, batch: int = 3, size: int = 40, device: str = "cpu"):
    flat = torch.randn(batch, size, generator=torch.Generator().manual_seed(0)).to(device)
    return solver.start(flat, RULES, steps), flat


@every_solver
def test_a_solve_begins_with_one_fill(solver):
    with Dispatches() as dispatches:
        start(solver, device="meta")
    assert dispatches.count(*FILLS) == 1, dispatches.names


@every_solver
def test_a_step_is_one_operation_and_allocates_nothing(solver):
    """But for the history of Broyden's method and GMRES, which grows by several rows at once until memory is full."""
    workspace, x = start(solver)
    allocating = 0
    for k in range(12):
        f = torch.tanh(workspace.z[k % 2] + x)
        with Dispatches() as dispatches:
            workspace.step(f, k)
        assert dispatches.count("pydeq::") == 1
        assert dispatches.count(*FILLS) == 0
        allocating += dispatches.count(*ALLOCATIONS) > 0
        if isinstance(solver, pydeq.Picard | pydeq.Anderson):
            assert len(dispatches.names) == 1
    assert allocating <= 4


@every_solver
def test_buffers_of_a_solve_start_empty_and_aligned(solver):
    for device in ("cpu", "meta"):
        workspace, _ = start(solver, batch=5, device=device)
        for buffer in (workspace.scalars, workspace.counters, *workspace.zeroed):
            assert buffer.is_contiguous()
            assert buffer.device.type == device
            assert buffer.storage_offset() * buffer.itemsize % 64 == 0
            assert device == "meta" or not buffer.any()


class Elsewhere(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    device = torch.device("cuda")
    __torch_function__ = torch._C._disabled_torch_function_impl


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_parts_of_one_fill_do_not_overlap(mode):
    like = torch.randn(2, 3)
    parts = [(torch.float64, (5, 6)), (torch.int32, (5, 11)), (torch.float64, (0, 4)), (torch.int64, (3,))]
    with mode():
        buffers = zeros(like.as_subclass(Elsewhere), *parts)
        assert len({buffer.untyped_storage().data_ptr() for buffer in buffers}) == 1
        for number, buffer in enumerate(buffers, 1):
            assert not buffer.any()
            assert buffer.data_ptr() % 64 == 0
            buffer.fill_(number)
    for number, (buffer, (dtype, shape)) in enumerate(zip(buffers, parts, strict=True), 1):
        assert (buffer.dtype, buffer.shape) == (dtype, shape)
        assert (buffer == number).all()


def test_broyden_keeps_its_inner_products_where_it_makes_room():
    workspace, x = start(pydeq.Broyden(memory=60), steps=40)
    for k in range(39):
        f = torch.tanh(workspace.z[k % 2] * 1.7 + x)
        before, room = workspace.gram, workspace.thetas.shape[1]
        with Dispatches() as dispatches:
            workspace.step(f, k)
        widened = workspace.thetas.shape[1] > room
        assert dispatches.count(*FILLS) == 2 * widened
        if widened:
            assert torch.equal(workspace.gram[:, : room - 1, : room - 1], before[:, : room - 1, : room - 1])
    assert workspace.thetas.shape[1] == 39
