"""process_group: all ranks call fn equally often, whatever happens on one of them, and nothing else changes."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from world import SIZE

import pydeq
from pydeq.testing import CallCounter, assert_identical, softsign_map

FAST, SLOW = [0.1, 0.3, 0.3, 0.5], [0.6, 0.9]


def communicating(fn):
    """``fn``, after a meeting of all ranks: with unequal numbers of calls, some would wait forever."""

    def meeting(*arguments):
        present = torch.ones(1)
        dist.all_reduce(present)
        assert present == SIZE
        return fn(*arguments)

    return meeting


def solve_own(rank, rhos, solver, dtype, options):
    """This rank's problems, solved with the other rank and alone."""
    problem = softsign_map(rhos[rank], 9, batch=len(rhos[rank]), dtype=dtype, seed=rank)
    alone = problem.solve(solver=solver, **options)
    counter = CallCounter(communicating(problem.fn))
    together = pydeq.fixed_point(
        counter, problem.z0, *problem.context, solver=solver, process_group=dist.group.WORLD, **options
    )
    assert together.nfe == counter.calls
    assert all(counter.batches) or not rhos[rank]  # compact or not, fn need not take an empty batch
    assert_identical(together, alone)
    if options.get("trace"):
        assert torch.equal(together.trace[: alone.nfe].nan_to_num(-1.0), alone.trace.nan_to_num(-1.0))
        assert len(together.trace) == together.nfe
        assert together.trace[alone.nfe :].isnan().all()
    return together.nfe, alone.nfe


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_ranks_that_converge_at_different_speeds(world, solver, dtype, compact):
    options = {"rtol": 1e-9 if dtype == torch.float64 else 1e-2, "max_steps": 200, "trace": True}
    if compact:
        options |= {"compact": True, "batched_context": (True, True)}
    (together, first), (other, second) = world.run(solve_own, (FAST, SLOW), solver, dtype, options)
    assert together == other == max(first, second)
    # GMRES needs as few for the slow ones as for the fast, where a tolerance is as coarse as that.
    assert first < second or (isinstance(solver, pydeq.GMRES) and dtype == torch.bfloat16)


@settings(max_examples=10, phases=[Phase.generate])  # to shrink would start processes again and again
@given(
    rhos=st.tuples(*[st.lists(st.sampled_from([0.0, 0.3, 0.9, 1.5]), max_size=4)] * SIZE),
    max_steps=st.integers(1, 20),
    compact=st.booleans(),
)
def test_any_batches(world, solver, rhos, max_steps, compact):
    """Of any sizes, also of none; diverging or not."""
    options = {"rtol": 1e-6, "max_steps": max_steps, "compact": compact, "batched_context": (True, True)}
    counts = world.run(solve_own, rhos, solver, torch.float32, options)
    assert {together for together, _ in counts} == {max(alone for _, alone in counts)}


def solve_unfrozen(rank, solver):
    problem = softsign_map(FAST + SLOW, 9, dtype=torch.float64)
    options = {"solver": solver, "rtol": 1e-9, "max_steps": 60, "freeze": False, "stall": False}
    rows = slice(0, 4) if rank == 0 else slice(4, 6)
    together = problem.rows(rows).solve(**options, process_group=dist.group.WORLD)
    whole = problem.solve(**options)
    assert_identical(together, whole, rows)
    assert together.nfe == whole.nfe


def test_without_freezing_all_go_on_until_the_worst_of_any_rank_is_done(world, solver):
    world.run(solve_unfrozen, solver)


class BrokenError(Exception):
    pass


def solve_broken(rank, at, how, sharded):
    """fn fails on rank 1 in call ``at``; afterwards the ranks can still solve."""
    problem = softsign_map(0.9, 9, seed=rank)

    def fn(z, *context):
        if rank == 1 and counter.calls == at:
            if how == "raises":
                raise BrokenError("no more")
            return problem.fn(z, *context)[:, 1:]
        return problem.fn(z, *context)

    counter = CallCounter(fn)
    ours, message = (BrokenError, "no more") if how == "raises" else (ValueError, "fn must return the shape of z0")
    expected, message = ((RuntimeError, "the solve failed on rank 1"), (ours, message))[rank]
    with pytest.raises(expected, match=message):
        pydeq.fixed_point(
            counter, problem.z0, *problem.context, rtol=1e-6, process_group=dist.group.WORLD, sharded=sharded
        )
    assert counter.calls == at
    solve_own(rank, (FAST, SLOW), pydeq.Anderson(), torch.float32, {})


@pytest.mark.parametrize("sharded", [False, True], ids=["own samples", "sharded"])
@pytest.mark.parametrize("how", ["raises", "changes the shape"])
@pytest.mark.parametrize("at", [1, 4])
def test_an_error_on_one_rank_ends_the_solve_on_all(world, at, how, sharded):
    world.run(solve_broken, at, how, sharded)


def differ(rank):
    z0 = torch.ones(2, 3)
    group = dist.group.WORLD
    with pytest.raises(ValueError, match=rf"max_steps must be the same on all ranks .* 7 to 8, {7 + rank} here"):
        pydeq.fixed_point(lambda z: 0.5 * z, z0, max_steps=7 + rank, process_group=group)
    with pytest.raises(ValueError, match=f"sharded must be the same on all ranks .* sharded is {rank == 1}"):
        pydeq.fixed_point(lambda z: 0.5 * z, z0, sharded=rank == 1, process_group=group)
    for different in (
        {"rtol": 10.0 ** -(rank + 2)},
        {"atol": float(rank)},
        {"solver": (pydeq.Picard(), pydeq.Broyden())[rank]},
        {"solver": pydeq.Anderson(memory=2 + rank)},
        {"freeze": rank == 0},
        {"stall": rank == 0},
    ):
        with pytest.raises(ValueError, match="and if so also the batch size, solver, rtol"):
            pydeq.fixed_point(lambda z: 0.5 * z, z0, sharded=True, process_group=group, **different)
    with pytest.raises(ValueError, match="and if so also the batch size"):
        pydeq.fixed_point(lambda z: 0.5 * z, z0[rank:], sharded=True, process_group=group)
    # Where states are not sharded, these are each rank's own business.
    pydeq.fixed_point(lambda z: 0.5 * z, z0[rank:], process_group=group, rtol=10.0 ** -(rank + 2))


def test_what_must_be_the_same_on_all_ranks(world):
    world.run(differ)


def refuse(rank):
    z0 = torch.ones(2, 3)
    half = dist.new_group([0])
    if rank == 1:
        with pytest.raises(ValueError, match="process_group must have this rank in it"):
            pydeq.fixed_point(lambda z: 0.5 * z, z0, process_group=half)
    else:
        assert pydeq.fixed_point(lambda z: 0.5 * z, z0, process_group=half).converged.all()
        dist.destroy_process_group(half)
        with pytest.raises(ValueError, match="must be initialized, got one that was destroyed"):
            pydeq.fixed_point(lambda z: 0.5 * z, z0, process_group=half)
    mesh = init_device_mesh("cpu", (SIZE,))
    with pytest.raises(TypeError, match=r"process_group must be a .*ProcessGroup, got DeviceMesh, pass mesh.get_group"):
        pydeq.DEQ(torch.nn.Identity(), process_group=mesh)


def test_refuses_groups_that_it_cannot_use(world):
    world.run(refuse)


def move(rank):
    deq = pydeq.DEQ(torch.nn.Linear(3, 3), process_group=dist.group.WORLD)
    assert copy.deepcopy(deq).ranks is deq.ranks
    with pytest.raises(TypeError, match="save the state_dict"):
        pickle.dumps(deq)
    assert list(deq.state_dict()) == ["cell.weight", "cell.bias"]


def test_a_layer_with_a_group_is_copied_but_not_pickled(world):
    world.run(move)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"process_group": "WORLD"}, TypeError, "process_group must be a torch.distributed.ProcessGroup, got str"),
        ({"sharded": True}, ValueError, "sharded=True needs process_group, the ranks that .* got None"),
        ({"sharded": "yes"}, TypeError, "sharded must be a bool, got str"),
        ({"proces_group": None}, TypeError, "did you mean 'process_group'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        pydeq.fixed_point(lambda z: 0.5 * z, torch.ones(2, 3), **arguments)
    with pytest.raises(error, match=message):
        pydeq.DEQ(torch.nn.Identity(), **arguments)


def relay_between(z):
    """Rank 1 starts at its fixed point, and is moved by rank 0; the solution is 2 there and 1 here."""
    rows = [torch.empty_like(z) for _ in range(SIZE)]
    dist.all_gather(rows, z)
    return 0.5 * z + 1.0 if dist.get_rank() == 0 else torch.relu(rows[0] - 1.0)


def solve_coupled(rank, solver, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pydeq.CouplingWarning)
        counter = CallCounter(relay_between)
        z0 = torch.zeros(1, 1, dtype=torch.float64)
        solution = pydeq.fixed_point(
            counter, z0, solver=solver, rtol=1e-6, process_group=dist.group.WORLD, **options[rank]
        )
    assert solution.nfe == counter.calls
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, torch.full_like(z0, 2.0 - rank), rtol=0, atol=1e-4)
    assert torch.equal(relay_between(solution.value), solution.image)
    return solution.nfe


@pytest.mark.parametrize(
    "options",
    [({}, {}), ({"freeze": False}, {}), ({}, {"freeze": False}), ({"freeze": False},) * 2],
    ids=["frozen", "first is not", "second is not", "none is"],
)
def test_samples_that_are_moved_by_another_rank(world, solver, options):
    """They are awake again, also where only one of the ranks leaves samples alone."""
    first, second = world.run(solve_coupled, solver, options)
    assert first == second
