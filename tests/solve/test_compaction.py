"""compact=True: fn is called on the samples that still need it, with what of the context belongs to them."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pydeq
from pydeq import Status
from pydeq.testing import CallCounter, assert_close, assert_identical, softsign_map, tanh_map

RHOS = [0.1, 0.3, 0.3, 0.5, 0.5, 0.6, 0.9, 0.99]


def both(problem, **options):
    return problem.solve(**options), problem.solve(
        **options, compact=True, batched_context=(True,) * len(problem.context)
    )


@given(
    rhos=st.lists(st.sampled_from([0.0, 0.3, 0.6, 0.9, 0.99, 1.5]), min_size=1, max_size=12),
    dim=st.sampled_from([1, 7, 33]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_nothing_changes_but_the_batch_that_fn_sees(solver, rhos, dim, dtype, seed):
    problem = softsign_map(rhos, dim, dtype=dtype, seed=seed)
    whole, compact = both(problem, solver=solver, max_steps=30, trace=True)
    assert compact.nfe == whole.nfe
    assert_identical(compact, whole)
    assert torch.equal(compact.trace.nan_to_num(-1.0), whole.trace.nan_to_num(-1.0))


def test_for_products_of_matrices_it_is_the_same_up_to_rounding(solver):
    problem = tanh_map(0.7, 50, batch=8, dtype=torch.float64)
    problem.context[0].mul_(torch.logspace(-3, 0, 8, dtype=torch.float64)[:, None])
    whole, compact = both(problem, solver=solver, rtol=1e-9, max_steps=400)
    assert whole.converged.all()
    assert compact.converged.all()
    assert whole.sample_nfe.min() < whole.nfe
    assert_close(compact.image, whole.image, condition=1e-8 / torch.finfo(torch.float64).eps)


def test_fn_sees_smaller_and_smaller_batches(solver):
    problem = softsign_map(RHOS, 9, dtype=torch.float64)
    counter = CallCounter(problem.fn)
    solution = pydeq.fixed_point(
        counter, problem.z0, *problem.context, solver=solver, rtol=1e-8, max_steps=3000,
        compact=True, batched_context=(True, True),
    )  # fmt: skip
    assert solution.converged.all()
    assert solution.nfe == counter.calls
    assert counter.batches[0] == 8
    assert counter.batches == sorted(counter.batches, reverse=True)
    assert counter.batches[-1] == 1
    assert len(set(counter.batches)) <= 4  # 8, 4, 2, 1: compilers and caches behind fn stay warm
    for k, batch in enumerate(counter.batches):
        running = int((solution.sample_nfe > k).sum())
        assert running <= batch < max(2 * running, 2)  # never twice as many as needed


def test_context_is_gathered_as_it_says(solver):
    """Tensors and nested tuples of them where they carry the batch; anything else goes through as it is."""
    problem = softsign_map(RHOS, 5, dtype=torch.float64)
    x, quarter = problem.context
    shared = torch.ones(8, 5, dtype=torch.float64)  # as long as the batch, but not of it
    owners = torch.arange(8)
    options = {"mask": None}
    seen = []

    def fn(z, x, shared_entry, nested, given):
        assert shared_entry is shared
        assert given is options
        (rate,), who = nested
        seen.append(who)
        assert len(z) == len(x) == len(rate) == len(who)
        return problem.fn(z, x, rate)

    ran = {"solver": solver, "rtol": 1e-8, "max_steps": 200}
    context = (x, shared, ([quarter], owners), options)
    compact = pydeq.fixed_point(
        fn, problem.z0, *context, **ran, compact=True, batched_context=(True, False, True, False)
    )
    assert_identical(compact, problem.solve(**ran))
    assert len({len(who) for who in seen}) > 1
    for k, who in enumerate(seen):
        running = (compact.sample_nfe > k).nonzero()[:, 0]
        assert torch.isin(running, who).all()
        assert torch.equal(who, who.sort().values)


def test_tuple_states(solver):
    problem = softsign_map(RHOS, 6, dtype=torch.float64)

    def fn(parts, *context):
        assert parts[0].shape[1:] == (2, 2)
        image = problem.fn(torch.cat([parts[0].flatten(1), parts[1]], dim=1), *context)
        return image[:, :4].reshape(-1, 2, 2), image[:, 4:]

    z0 = (torch.zeros(8, 2, 2, dtype=torch.float64), torch.zeros(8, 2, dtype=torch.float64))
    ran = {"solver": solver, "rtol": 1e-8, "max_steps": 60}
    whole = pydeq.fixed_point(fn, z0, *problem.context, **ran)
    compact = pydeq.fixed_point(fn, z0, *problem.context, **ran, compact=True, batched_context=(True, True))
    assert_identical(compact, whole)


def test_samples_that_are_lost_are_left_out_too(solver):
    problem = softsign_map([0.9] * 8, 5, dtype=torch.float64)
    problem.context[0][2:] = torch.nan
    counter = CallCounter(problem.fn)
    solution = pydeq.fixed_point(
        counter, problem.z0, *problem.context, solver=solver, max_steps=60, compact=True, batched_context=(True, True)
    )
    assert solution.status.tolist() == [Status.CONVERGED] * 2 + [Status.NONFINITE] * 6
    assert set(counter.batches[1:]) <= {1, 2}


def test_without_context(solver):
    solution = pydeq.fixed_point(lambda z: 0.5 * z + 1.0, torch.zeros(3, 2), solver=solver, compact=True)
    assert solution.converged.all()


def test_a_reused_buffer_of_fn(solver):
    problem = softsign_map(RHOS, 5, dtype=torch.float64)
    buffer = torch.empty_like(problem.z0)

    def fn(z, *context):
        buffer[: len(z)] = problem.fn(z, *context)
        return buffer[: len(z)]

    ran = {"solver": solver, "rtol": 1e-8, "max_steps": 60}
    compact = pydeq.fixed_point(fn, problem.z0, *problem.context, **ran, compact=True, batched_context=(True, True))
    assert_identical(compact, problem.solve(**ran))


def test_the_shape_is_checked_against_the_batch_that_fn_saw(solver):
    """A closure over the whole batch cannot be gathered: its result has the wrong batch size."""
    problem = softsign_map([0.1, 0.1, 0.1, 0.9], 5)
    x, quarter = problem.context

    def fn(z, quarter):
        return problem.fn(torch.zeros(4, 5) + (z if len(z) == 4 else 0.0), x, quarter)

    with pytest.raises(Exception, match=r"expected \(\d, 5\), got \(4, 5\)|must match the size"):
        pydeq.fixed_point(
            fn, problem.z0, quarter, solver=solver, rtol=1e-6, max_steps=90, compact=True, batched_context=(True,)
        )


@pytest.mark.parametrize(
    ("context", "batched", "error", "message"),
    [
        ((1.0,), None, ValueError, "batched_context must say for each of the 1 context arguments whether it"),
        (
            (1.0, 2.0),
            (True,),
            ValueError,
            "batched_context must have one entry for each of the 2 context arguments, got 1",
        ),
        ((), (True,), ValueError, "batched_context must have one entry for each of the 0 context arguments, got 1"),
        ((1.0,), (True,), TypeError, "context[0] is batched, so it must be a tensor or a tuple, got float"),
        (
            (None, torch.ones(4)),
            (False, True),
            ValueError,
            "context[1] must carry the batch of 3 first, got shape (4,)",
        ),
        (
            (torch.tensor(1.0),),
            (True,),
            ValueError,
            "context[0] must carry the batch of 3 first, got shape ()",
        ),
    ],
    ids=range(6),
)
def test_refuses_what_it_cannot_gather(context, batched, error, message):
    with pytest.raises(error, match=re.escape(message)):
        pydeq.fixed_point(
            lambda z, *context: 0.5 * z, torch.ones(3, 2), *context, compact=True, batched_context=batched
        )


@pytest.mark.parametrize("nested", [(torch.ones(3), torch.ones(4)), ([torch.ones(2)],)], ids=range(2))
def test_refuses_nested_context_of_another_batch(nested):
    """A longer tensor would be gathered without complaint, from the wrong rows."""
    with pytest.raises(ValueError, match=r"context\[0\].* must carry the batch of 3 first"):
        pydeq.fixed_point(lambda z, nested: 0.5 * z, torch.ones(3, 2), nested, compact=True, batched_context=(True,))


def test_refuses_to_leave_out_what_is_to_be_iterated_on():
    with pytest.raises(ValueError, match=r"compact=True leaves out samples that are done, but freeze=False"):
        pydeq.fixed_point(lambda z: 0.5 * z, torch.ones(3, 2), compact=True, freeze=False)


def test_refuses_batch_norm_in_training():
    cell = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match=r"compact=True changes the batch that 1 \(BatchNorm1d in training mode\)"):
        pydeq.fixed_point(cell, torch.ones(3, 2), compact=True)
    with pytest.raises(ValueError, match=r"the batch that fn \(BatchNorm1d in training mode\)"):
        pydeq.fixed_point(nn.BatchNorm1d(2), torch.ones(3, 2), compact=True)
    with pytest.raises(ValueError, match="drew its mask for"):
        pydeq.fixed_point(nn.Sequential(pydeq.nn.VariationalDropout(0.5)), torch.ones(3, 2), compact=True)
    with pytest.raises(ValueError, match="BatchNorm1d in training mode"):
        pydeq.fixed_point(cell.forward, torch.ones(3, 2), compact=True)
    pydeq.fixed_point(cell.eval(), torch.ones(3, 2), compact=True)
    pydeq.fixed_point(nn.Sequential(nn.LayerNorm(2)).train(), torch.ones(3, 2), compact=True)
