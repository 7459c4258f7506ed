"""What training keeps of a forward pass, in bytes of the tensors alive, counted without a word from the system."""

import gc

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

import pydeq
from pydeq import (
    Anderson,
    Broyden,
    Implicit,
    JacobianFree,
    JacobianPenalty,
    Phantom,
    Picard,
    Reversible,
    Shine,
    Unrolled,
)

BATCH, DIM = 4, 256
STATE = BATCH * DIM * 4  # bytes


class Storages(TorchDispatchMode):
    """Follows every storage that an operation makes."""

    def __init__(self):
        super().__init__()
        self.known = WeakTensorKeyDictionary()
        self.watching, self.peak = False, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.known[tensor] = True
        if self.watching:
            self.peak = max(self.peak, self.alive())
        return out

    def alive(self):
        """Bytes of all of them that still live."""
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in self.known}
        return sum(storages.values())


def measure(solver, adjoint, max_steps):
    """Bytes kept between forward and backward; bytes kept after backward, and at the peak of backward."""
    torch.manual_seed(0)
    cell = nn.Linear(DIM, DIM)
    x = torch.randn(BATCH, DIM)
    deq = pydeq.DEQ(lambda z, x: torch.tanh(cell(z) + x), solver=solver, adjoint=adjoint, rtol=0.0, max_steps=max_steps)
    gc.collect()
    gc.disable()  # nothing may wait for the collector of cycles
    try:
        with Storages() as storages:
            z = deq(torch.zeros(BATCH, DIM), x)
            kept = storages.alive()
            loss = z.sum()
            storages.watching = True
            loss.backward()
            cell.weight.grad = cell.bias.grad = None
            peak = storages.peak
            after = storages.alive()
    finally:
        gc.enable()
    return kept, after, peak


CONSTANT = [
    (Anderson(), Implicit(rtol=1e-2, max_steps=5)),
    (Picard(), Implicit(rtol=1e-2, max_steps=5)),
    (Broyden(), Implicit(rtol=1e-2, max_steps=5)),
    (Anderson(), Phantom(steps=3)),
    (Anderson(), Phantom(steps=3, form="neumann")),
    (Broyden(), JacobianFree()),
    (Anderson(), Reversible()),
]


@pytest.mark.parametrize(("solver", "adjoint"), CONSTANT, ids=repr)
def test_what_training_keeps_does_not_grow_with_the_solve(solver, adjoint):
    few, _, few_peak = measure(solver, adjoint, 10)
    many, _, many_peak = measure(solver, adjoint, 24)
    assert few > STATE  # the measure sees something
    assert many <= few + 1024  # scalars alone
    assert many_peak <= few_peak + STATE


@pytest.mark.parametrize(
    ("solver", "adjoint"),
    [(Broyden(), Shine()), (Picard(), Unrolled()), (Picard(), Unrolled(checkpoint=True))],
    ids=repr,
)
def test_where_it_must_grow_it_is_seen_to(solver, adjoint):
    few, _, _ = measure(solver, adjoint, 10)
    many, after, _ = measure(solver, adjoint, 22)
    assert many - few >= 11 * STATE
    assert after <= 0.5 * many  # and goes with backward, while the output lives on


@pytest.mark.parametrize(("solver", "adjoint"), [*CONSTANT, (Broyden(), Shine())], ids=repr)
def test_backward_frees_what_forward_kept(solver, adjoint):
    kept, after, _ = measure(solver, adjoint, 12)
    assert after < kept
    assert after <= 6 * STATE + 2048  # x, z, value and image of both solutions; scalars


@pytest.mark.parametrize("penalty", [None, JacobianPenalty(1.0, probes=2)], ids=["plain", "penalty"])
@pytest.mark.parametrize(
    ("solver", "adjoint"), [*CONSTANT, (Broyden(), Shine()), (Picard(), Unrolled(checkpoint=True))], ids=repr
)
@pytest.mark.filterwarnings("ignore:the forward solve of a pydeq.DEQ")
def test_forwards_without_backward_leave_no_byte(solver, adjoint, penalty):
    torch.manual_seed(0)
    cell = nn.Linear(DIM, DIM)
    x = torch.randn(BATCH, DIM)
    deq = pydeq.DEQ(lambda z, x: torch.tanh(cell(z) + x), solver=solver, adjoint=adjoint, max_steps=6)

    def forward():
        deq(torch.zeros(BATCH, DIM), x, return_solution=True, penalty=penalty)

    gc.collect()
    gc.disable()  # nothing may wait for the collector of cycles
    try:
        with Storages() as storages:
            forward()
            once = storages.alive()
            for _ in range(3):
                forward()
            assert storages.alive() == once == 0
    finally:
        gc.enable()
