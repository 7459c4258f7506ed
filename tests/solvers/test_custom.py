"""Solvers that users write: their rule for the next iterates, and all else as in every solve."""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pydeq
from pydeq import CustomSolver, Status
from pydeq.testing import CallCounter, assert_close, assert_identical, linear_map, softsign_map

DOCUMENT = Path(__file__).parents[2] / "docs" / "solvers.md"
RHOS = [0.1, 0.3, 0.5, 0.9, 0.97]


class Plain(CustomSolver):
    def propose(self, z, f, state):
        return f


class Configured(Plain):
    def __init__(self, share):
        self.share = share


@dataclass(frozen=True)
class HeavyBall(CustomSolver):
    momentum: float = 0.3

    def init(self, z0):
        return {"previous": z0}

    def propose(self, z, f, state):
        momentum = self.momentum * (z - state["previous"])
        state["previous"] = z
        return f + momentum


@dataclass
class Secant:
    """What Aitken's method remembers: an object with attributes."""

    f: torch.Tensor
    residual: torch.Tensor
    taken: torch.Tensor


class Aitken(CustomSolver):
    """Irons and Tuck 1969: z' = f - (f - f_before) <g, g - g_before> / ||g - g_before||^2, g = f - z."""

    def init(self, z0):
        return Secant(z0, torch.zeros_like(z0), torch.zeros(len(z0), dtype=torch.int64, device=z0.device))

    def propose(self, z, f, state):
        g = f - z
        change = g - state.residual
        share = (g * change).sum(1, keepdim=True) / change.square().sum(1, keepdim=True)
        found = torch.where(state.taken[:, None] > 0, f - share * (f - state.f), f)
        state.f, state.residual = f, g
        state.taken += 1
        return found


def spoiled(problem, places):
    """The map of ``problem``, with a bad value in given rows of given evaluations."""
    calls = CallCounter(problem.fn)

    def fn(z, *context):
        image = calls(z, *context).clone()
        for (call, row), bad in places.items():
            if call == calls.calls:
                image[row] = bad
        return image

    return fn


def test_print_shows_the_settings():
    assert repr(Plain()) == "Plain()"
    assert repr(Configured(0.5)) == "Configured(share=0.5)"
    assert repr(HeavyBall(0.2)) == "HeavyBall(momentum=0.2)"


def first_block(document: Path) -> str:
    found = re.search(r"^```python\n(.*?)^```", document.read_text(encoding="utf-8"), re.S | re.M)
    assert found is not None
    return found[1]


def test_the_example_of_the_document():
    names: dict[str, Any] = {}
    exec(first_block(DOCUMENT), names)
    solver = names["HeavyBall"](0.6)
    assert_close(names["solution"].image, torch.full((3,), 0.7390851332151607), condition=1e4)  # cos(x) = x
    assert isinstance(names["deq"].solver, names["HeavyBall"])

    # The same recursion written out in float64, and the exact solution.
    problem = linear_map(0.95, 30, dtype=torch.float64)
    solution = problem.solve(solver=solver, rtol=1e-8, max_steps=300)
    assert solution.converged.all()
    assert_close(solution.image, problem.solution, condition=1e-7 / torch.finfo(torch.float64).eps)
    z = previous = problem.z0
    for _ in range(9):
        z, previous = problem.fn(z, *problem.context) + 0.6 * (z - previous), z
    tenth = problem.solve(solver=solver, rtol=0.0, max_steps=10, trace=True)
    expected = (problem.fn(z, *problem.context) - z).norm(dim=1) / problem.fn(z, *problem.context).norm(dim=1)
    assert_close(tenth.trace[9], expected, size=30, condition=100.0)

    # The roots of l^2 - (a + .6) l + .6 have the modulus .6^.5 for every eigenvalue |a| <= .949 of f.
    plain = problem.solve(solver=pydeq.Picard(), rtol=1e-8, max_steps=1000)
    assert plain.converged.all()
    assert solution.nfe < plain.nfe / 3


@given(
    rhos=st.lists(st.sampled_from([*RHOS, 1.5]), min_size=1, max_size=5),
    dim=st.sampled_from([1, 7, 33]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    freeze=st.booleans(),
    places=st.dictionaries(
        st.tuples(st.integers(1, 12), st.integers(0, 0)), st.sampled_from([torch.nan, torch.inf]), max_size=6
    ),
    seed=st.integers(0, 1000),
)
def test_a_solver_that_returns_f_is_picard_to_the_last_bit(rhos, dim, dtype, freeze, places, seed):
    problem = softsign_map(rhos, dim, dtype=dtype, seed=seed)
    ran = {"freeze": freeze, "trace": True, "max_steps": 30, "states_at": (3, 8)}
    one, other = (
        pydeq.fixed_point(spoiled(problem, places), problem.z0, *problem.context, solver=solver, **ran)
        for solver in (Plain(), pydeq.Picard())
    )
    assert one.nfe == other.nfe
    assert_identical(one, other)
    assert torch.equal(one.trace.nan_to_num(-1.0), other.trace.nan_to_num(-1.0))
    for mine, expected in zip(one.states, other.states, strict=True):
        assert torch.equal(mine.nan_to_num(-1.0), expected.nan_to_num(-1.0))


@pytest.mark.parametrize("solver", [HeavyBall(), Aitken()], ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_samples_are_solved_as_if_alone(solver, dtype):
    problem = softsign_map(RHOS, 33, dtype=dtype)
    calls = CallCounter(problem.fn)
    whole = pydeq.fixed_point(calls, problem.z0, *problem.context, solver=solver, max_steps=200)
    assert (whole.converged | (dtype.itemsize == 2 and whole.status == Status.STALLED)).all()
    assert calls.calls == whole.nfe == whole.sample_nfe.max()
    assert len(set(whole.sample_nfe.tolist())) > 2
    for row in range(len(RHOS)):
        alone = problem.rows([row]).solve(solver=solver, max_steps=200)
        assert alone.nfe == whole.sample_nfe[row]
        assert_identical(alone, whole, [row])
    batches = CallCounter(problem.fn)
    compact = pydeq.fixed_point(
        batches, problem.z0, *problem.context, solver=solver, max_steps=200,
        compact=True, batched_context=(True, True),
    )  # fmt: skip
    assert_identical(compact, whole)
    assert compact.nfe == whole.nfe
    assert batches.batches[-1] == 1


def test_aitken_is_exact_where_the_map_has_one_eigenvalue():
    x = torch.randn(4, 6, dtype=torch.float64)
    solution = pydeq.fixed_point(lambda z: -0.9 * z + x, torch.zeros_like(x), solver=Aitken(), rtol=1e-12)
    assert solution.converged.all()
    assert solution.nfe == 3  # z0, a plain step, and the solution
    assert_close(solution.value, x / 1.9, condition=10.0)


def test_samples_that_are_done_hold_no_residual_and_stay():
    seen: list[torch.Tensor] = []

    class Watching(CustomSolver):
        def propose(self, z, f, state):
            seen.append((f == z).all(1))
            return torch.where((f == z).all(1, keepdim=True), 7.0, f)

    problem = softsign_map([0.0, 0.9], 9)
    solution = problem.solve(solver=Watching(), max_steps=200)
    assert_identical(solution, problem.solve(solver=pydeq.Picard(), max_steps=200))
    done = int(solution.sample_nfe[0])
    assert done < solution.nfe
    assert [rows.tolist() for rows in seen] == [[k >= done - 1, False] for k in range(solution.nfe - 1)]


@pytest.mark.parametrize("norm", ["all", "parts"])
def test_states_of_several_tensors_are_flat_rows(norm):
    problem = linear_map(0.8, 12, dtype=torch.float64)
    x = problem.context[0]
    shapes: set[torch.Size] = set()

    class Watching(HeavyBall):
        def propose(self, z, f, state):
            shapes.add(z.shape)
            return super().propose(z, f, state)

    def fn(state):
        y = problem.fn(torch.cat([state["a"], state["b"].flatten(1)], 1), x)
        return {"a": y[:, :4], "b": y[:, 4:].view(-1, 2, 4)}

    z0 = {"a": x.new_zeros(4, 4), "b": x.new_zeros(4, 2, 4)}
    solution = pydeq.fixed_point(fn, z0, solver=Watching(), rtol=1e-10, max_steps=200, norm=norm)
    assert solution.converged.all()
    found = torch.cat([solution.image["a"], solution.image["b"].flatten(1)], 1)
    assert_close(found, problem.solution, condition=1e-8 / torch.finfo(torch.float64).eps)
    assert shapes == {(4, 12)}


class Cell(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        weight = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
        self.weight = nn.Parameter(0.7 * weight)

    def forward(self, z, x):
        return z @ self.weight.T + x


@pytest.mark.parametrize("backward", [None, HeavyBall(0.1)], ids=["Anderson", "HeavyBall"])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_through_a_layer(backward, compiled):
    """z = (I - W)^-1 x, so that autograd through a dense solve gives the gradients."""
    cell = Cell(8)
    adjoint = pydeq.Implicit(rtol=1e-12, max_steps=300, **({} if backward is None else {"solver": backward}))
    deq: Any = pydeq.DEQ(cell, solver=HeavyBall(0.1), adjoint=adjoint, rtol=1e-12, max_steps=300)
    if compiled:
        deq = torch.compile(deq, backend="eager")
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    z = deq(torch.zeros_like(x), x)
    found = torch.autograd.grad(z.sin().sum(), (cell.weight, x))
    exact = torch.linalg.solve(torch.eye(8, dtype=torch.float64) - cell.weight, x.T).T
    expected = torch.autograd.grad(exact.sin().sum(), (cell.weight, x))
    for one, other in zip((z, *found), (exact, *expected), strict=True):
        assert_close(one, other, condition=1e-10 / torch.finfo(torch.float64).eps)


@dataclass
class Memory:
    """A state of several kinds of entries."""

    velocity: torch.Tensor
    nested: dict[str, list[torch.Tensor]]
    count: int = 0
    new: list[torch.Tensor] = field(default_factory=list)


class Remembering(CustomSolver):
    def __init__(self) -> None:
        self.memories: list[Memory] = []

    def init(self, z0):
        return Memory(z0 + 1.0, {"list": [torch.full_like(z0[:, 0], 5.0)]})

    def propose(self, z, f, state):
        if not state.new:
            state.new.append(torch.zeros_like(z))
        self.memories.append(
            Memory(state.velocity.clone(), {"list": [state.nested["list"][0].clone()]}, new=[state.new[0].clone()])
        )
        state.velocity += 2.0 * (f - z)
        state.nested["list"][0].fill_(9.0)
        state.new[0].fill_(4.0)
        state.count += 1
        return f


def test_a_sample_that_met_nan_is_forgotten():
    problem = softsign_map([0.9, 0.9], 3)
    seen: list[torch.Tensor] = []
    bad = spoiled(problem, {(3, 1): torch.nan})

    def fn(z, *context):
        seen.append(z.clone())
        return bad(z, *context)

    solver = Remembering()
    solution = pydeq.fixed_point(fn, problem.z0, *problem.context, solver=solver, rtol=0.0, max_steps=6)
    assert solution.value.isfinite().all()
    before, at, after = solver.memories[1:4]
    assert torch.equal(at.nested["list"][0], torch.tensor([9.0, 9.0]))  # it is forgotten where it starts again
    assert torch.equal(after.nested["list"][0], torch.tensor([9.0, 5.0]))
    assert torch.equal(after.new[0][:, 0], torch.tensor([4.0, 0.0]))
    assert torch.equal(after.velocity[1], seen[3][1] + 1.0)
    assert not torch.equal(after.velocity[0], seen[3][0] + 1.0)
    assert before.velocity.isfinite().all()
    assert len(solver.memories) == 5  # all evaluations but the last


@pytest.mark.parametrize(
    ("make", "tensor"),
    [
        (lambda z: z + 1.0, lambda state: state),
        (lambda z: OrderedDict(a=(z + 1.0,)), lambda state: state["a"][0]),
        (lambda z: SimpleNamespace(a={"b": z + 1.0}, c=3), lambda state: state.a["b"]),
    ],
    ids=["tensor", "dict", "attributes"],
)
def test_states_of_every_type_forget(make, tensor):
    seen = []

    class Summing(CustomSolver):
        def init(self, z0):
            return make(z0)

        def propose(self, z, f, state):
            seen.append((z, tensor(state).clone()))
            tensor(state).add_(1.0)
            return f

    problem = softsign_map([0.9, 0.9], 3)
    fn = spoiled(problem, {(3, 1): torch.nan})
    pydeq.fixed_point(fn, problem.z0, *problem.context, solver=Summing(), rtol=0.0, max_steps=6)
    z, state = seen[3]
    assert torch.equal(state[1], z[1] + 1.0)
    assert torch.equal(state[0], torch.full((3,), 4.0))


@pytest.mark.parametrize("solver", [HeavyBall(), Aitken()], ids=lambda solver: type(solver).__name__)
def test_nan_stays_in_its_sample_and_is_overcome(solver):
    problem = softsign_map([0.5, 0.9, 0.97], 17, dtype=torch.float64)
    ran = {"solver": solver, "rtol": 1e-8, "max_steps": 300}
    fn = spoiled(problem, {(3, 1): torch.nan, (7, 1): torch.inf})
    solution = pydeq.fixed_point(fn, problem.z0, *problem.context, **ran)
    assert solution.converged.all()
    for row in (0, 2):
        assert_identical(problem.rows([row]).solve(**ran), solution, [row])
    reference = problem.z0
    for _ in range(3000):
        reference = problem.fn(reference, *problem.context)
    assert_close(solution.image, reference, condition=1e-6 / torch.finfo(torch.float64).eps)


def test_a_restart_of_ones_own():
    asked: list[tuple[Any, list[bool]]] = []

    class Mine(Plain):
        def init(self, z0):
            return ["mine"]

        def restart(self, state, z, rows):
            asked.append((state, rows.tolist()))

    problem = softsign_map([0.9, 0.9], 3)
    fn = spoiled(problem, {(3, 1): torch.nan})
    pydeq.fixed_point(fn, problem.z0, *problem.context, solver=Mine(), rtol=0.0, max_steps=6)
    assert asked == [(["mine"], [False, True])]


def test_what_is_not_finite_in_a_proposal_is_a_plain_step():
    class Wild(CustomSolver):
        def propose(self, z, f, state):
            found = f.clone()
            found[0] = torch.nan
            return found

    problem = softsign_map([0.9, 0.5], 9)
    assert_identical(problem.solve(solver=Wild()), problem.solve(solver=pydeq.Picard()))


@pytest.mark.filterwarnings("ignore::pydeq.CouplingWarning")
def test_samples_that_depend_on_each_other_converge_together():
    """A slow sample moves one that was done: both meet the tolerance at the end."""
    rate = torch.tensor([[0.1], [0.9]], dtype=torch.float64)

    def fn(z):
        return rate * z + 1.0 + torch.stack([0.5 * z[1], 0.0 * z[1]])

    z0 = torch.zeros(2, 1, dtype=torch.float64)
    solution = pydeq.fixed_point(fn, z0, solver=HeavyBall(0.1), rtol=1e-6, max_steps=500)
    assert solution.converged.all()
    assert_close(solution.value, torch.tensor([[6.0 / 0.9], [10.0]], dtype=torch.float64), condition=1e12)
    assert float(((fn(solution.value) - solution.value).norm(dim=1) / solution.value.norm(dim=1)).max()) <= 2e-6


def test_nothing_is_asked_of_a_solver_without_need():
    class Counting(Plain):
        def __init__(self) -> None:
            self.asked: list[str] = []

        def init(self, z0):
            self.asked.append("init")

        def propose(self, z, f, state):
            assert state is None
            assert not torch.is_grad_enabled()
            assert not torch.is_autocast_enabled("cpu")
            self.asked.append("propose")
            return f

    solver = Counting()
    for z0, options in ((torch.zeros(0, 3), {}), (torch.ones(2, 3), {"max_steps": 1}), (torch.zeros(2, 3), {})):
        solution = pydeq.fixed_point(lambda z: 0.5 * z, z0, solver=solver, **options)
        assert solution.nfe == (0 if len(z0) == 0 else 1)
    assert solver.asked == []
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        solution = pydeq.fixed_point(lambda z: 0.5 * z + 1.0, torch.zeros(2, 3), solver=solver, rtol=1e-2)
    assert solution.status.eq(int(Status.CONVERGED)).all()
    assert solver.asked == ["init"] + ["propose"] * (solution.nfe - 1)


def returning(found):
    class Mine(CustomSolver):
        def propose(self, z, f, state):
            return found(z, f)

    return Mine()


@pytest.mark.parametrize(
    ("solver", "kind", "message"),
    [
        (returning(lambda z, f: None), TypeError, r"Mine\.propose must return .* a tensor, got NoneType"),
        (returning(lambda z, f: (f, 1)), TypeError, r"Mine\.propose must return .* a tensor, got tuple"),
        (returning(lambda z, f: f[0]), ValueError, r"a tensor of the shape of z, \(2, 3\), got \(3,\)"),
        (returning(lambda z, f: f.double()), ValueError, "of the dtype of z, torch.float32, got torch.float64"),
        (returning(lambda z, f: f.to("meta")), ValueError, "of the device of z, cpu, got meta"),
        (returning(lambda z, f: f.mul_(2.0)), ValueError, r"must not modify f in place: work on a copy, f\.clone\(\)"),
        (returning(lambda z, f: z.add_(f)), ValueError, r"must not modify z in place: work on a copy, z\.clone\(\)"),
    ],
)
def test_what_a_proposal_must_be(solver, kind, message):
    with pytest.raises(kind, match=message):
        pydeq.fixed_point(lambda z: 0.5 * z + 1.0, torch.zeros(2, 3), solver=solver)


def test_what_a_subclass_must_define():
    class Nothing(CustomSolver):
        pass

    with pytest.raises(TypeError, match=r"Nothing must define propose\(self, z, f, state\)"):
        Nothing()
    with pytest.raises(TypeError, match=r"Starting must not define start: create the memory of a solve in init\(z0\)"):

        class Starting(CustomSolver):
            def start(self, z0):  # pyright: ignore[reportIncompatibleMethodOverride]
                return {}


def test_adjoints_that_need_a_solver_of_pydeq_say_so():
    with pytest.raises(TypeError, match=r"pydeq\.Picard or pydeq\.Anderson, got HeavyBall\(momentum=0\.3\)"):
        pydeq.DEQ(Cell(3), solver=HeavyBall(), adjoint=pydeq.Unrolled())
