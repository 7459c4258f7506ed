"""Buffers of a solve: where their rows lie, and what is kept of them for the next one."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import pydeq
from pydeq.solvers import Solver, buffers

SOLVERS = (pydeq.Anderson(memory=4), pydeq.Broyden(), pydeq.GMRES())
LARGE = (4, 1 << 15)  # float32: half a MiB


@pytest.fixture(autouse=True)
def _nothing_kept():
    buffers.clear()
    yield
    buffers.clear()


def _affine(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator) - 0.5, torch.randn(shape, generator=generator)


def _solve(solver: Solver, seed: int, dtype: torch.dtype = torch.float32) -> pydeq.Solution:
    a, b = (part.to(dtype) for part in _affine(LARGE, seed))
    return pydeq.fixed_point(lambda z: a * z + b, torch.zeros_like(b), solver=solver, rtol=1e-3, max_steps=30)


@pytest.mark.parametrize("shape", [(3, 5), (1, 1 << 14), (7, 4099), LARGE], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_apart_and_whole(shape, dtype):
    scratch = buffers.Scratch(torch.zeros(shape))
    rows = [row for first in (0, 3, 6) for row in scratch.rows(first, 3, dtype)]
    assert all(row.shape == shape and row.dtype == dtype and row.is_contiguous() for row in rows)
    places = sorted((row.data_ptr(), row.data_ptr() + row.nbytes) for row in rows)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
    for i, row in enumerate(rows):
        row.fill_(i)
    assert all(bool((row == i).all()) for i, row in enumerate(rows))


@pytest.mark.parametrize(("size", "count"), [(1, 16), (64, 16), (100, 10), (500, 3), (1 << 14, 3)])
def test_many_small_rows_are_allocated_at_once(size, count):
    """16, or as many as fit in 8 KiB, or 3; and no more than are wanted."""
    scratch = buffers.Scratch(torch.zeros(1, size))
    assert len(scratch.more_rows(0, 100, torch.float64)) == count
    assert len(scratch.more_rows(count, 2, torch.float64)) == 2


def test_large_rows_start_at_different_places_of_their_pages():
    rows = buffers.Scratch(torch.zeros(LARGE)).rows(0, 8, torch.float32)
    first = rows[0].data_ptr()
    assert len({(row.data_ptr() - first) % 4096 for row in rows}) == 8


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_what_the_last_solve_left_is_never_read(solver):
    expected = _solve(solver, 0)
    kept = list(buffers._kept)
    assert kept, "nothing is kept: this test would see nothing"
    for buffer in kept:
        buffer.fill_(torch.nan)
    again = _solve(solver, 0)
    assert {buffer.data_ptr() for buffer in buffers._kept} == {buffer.data_ptr() for buffer in kept}
    assert again.nfe == expected.nfe
    assert torch.equal(again.value, expected.value)
    assert torch.equal(again.image, expected.image)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_solution_does_not_change_in_later_solves(solver):
    first = _solve(solver, 0)
    value, image, residual = first.value.clone(), first.image.clone(), first.residual.clone()
    _solve(solver, 1)
    assert torch.equal(first.value, value)
    assert torch.equal(first.image, image)
    assert torch.equal(first.residual, residual)


def test_solves_within_solves_have_buffers_of_their_own():
    solver = pydeq.Anderson(memory=4)
    alone = _solve(solver, 1)

    def fn(z: Tensor) -> Tensor:
        inner = _solve(solver, 1)
        assert torch.equal(inner.value, alone.value)
        return 0.5 * z + inner.value

    outer = pydeq.fixed_point(fn, torch.zeros(LARGE), solver=solver, rtol=1e-5, max_steps=30)
    assert bool(outer.converged.all())
    torch.testing.assert_close(outer.value, 2 * alone.value, rtol=1e-4, atol=1e-4)


def test_a_bounded_amount_is_kept():
    buffers.clear()
    for i in range(40):
        scratch = buffers.Scratch(torch.zeros(1))
        scratch.empty((1 << 20) + i)
        scratch.release()
    total = sum(buffer.nbytes for buffer in buffers._kept)
    assert 0 < total <= 1 << 26


def test_other_sizes_and_dtypes_are_not_taken():
    _solve(pydeq.Anderson(memory=4), 0)
    kept = {buffer.data_ptr() for buffer in buffers._kept}
    other = buffers.Scratch(torch.zeros(1, dtype=torch.float64))
    assert all(other.empty(buffer.numel()).data_ptr() not in kept for buffer in list(buffers._kept))
    same = buffers.Scratch(torch.zeros(1))
    sizes = [buffer.numel() for buffer in buffers._kept]
    assert {same.empty(size).data_ptr() for size in sizes} == kept


def test_inference_mode_leaves_nothing_that_others_cannot_write():
    solver = pydeq.Anderson(memory=4)
    expected = _solve(solver, 0)
    with torch.inference_mode():
        inside = _solve(solver, 0)
    outside = _solve(solver, 0)
    assert torch.equal(inside.value, expected.value)
    assert torch.equal(outside.value, expected.value)


def test_nothing_is_kept_of_a_solve_that_failed():
    def fail(z: Tensor) -> Tensor:
        raise ArithmeticError("on purpose")

    with pytest.raises(ArithmeticError, match="on purpose"):
        pydeq.fixed_point(fail, torch.zeros(LARGE), solver=pydeq.Anderson(memory=4))
    assert not buffers._kept
