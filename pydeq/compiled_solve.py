"""``CompiledSolve``: a solve as machine code, for small systems."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pydeq.arguments import check_max_steps, shown, unknown_keyword
from pydeq.cell.adapter import Adapter
from pydeq.cell.ahead_of_time import AheadOfTimeMap
from pydeq.cell.torch_compile import Compiler, skipped
from pydeq.ops import kernels
from pydeq.ops.compiled_loop import MAP_FAILED, Input, Loop
from pydeq.ops.constants import Counter, Scalar
from pydeq.solution import Solution
from pydeq.solve.iteration import warn_of_coupling
from pydeq.solve.solve import stopping_rules
from pydeq.solvers import Anderson, Broyden, Picard, Solver
from pydeq.solvers.buffers import empty
from pydeq.state import layout_of

_LINE = 64  # bytes of a cache line, at which each buffer starts
_SCALARS, _COUNTERS = len(Scalar), len(Counter)  # an enum takes long to count its members


class CompiledSolve:
    """A solve of z = fn(z, *context) without Python: fn compiled ahead of time, and the loop in C++.

    ``CompiledSolve(fn, z0, *context)`` compiles for states and context of these shapes, which takes 10 to 20 s and a
    C++ compiler. Calls then take the same arguments without fn, and return what :func:`pydeq.fixed_point` returns::

        solve = pydeq.CompiledSolve(fn, z0, x, solver=pydeq.Anderson(), rtol=1e-6)
        solution = solve(z0, x)

    An evaluation of a small map takes torch 20 to 100 us, and the loop around it as long; compiled, both together take
    a few. So this is for small systems that are solved often. Where an evaluation takes milliseconds, it saves little.

    Everything that fn takes from elsewhere is fixed when it is compiled, as by torch.export, but the values of tensors
    are read anew at each call: those of the parameters and buffers of a module, and of tensors that a function refers
    to, as long as they change in place. There is no gradient; :class:`pydeq.DEQ` has one.

    For states on the CPU, of float64 or float32. Threads may share it. It cannot be copied or pickled.

    Args:
        fn: As in :func:`pydeq.fixed_point`. torch.export must be able to record it: values must not decide what it
            computes. It must not draw random numbers or modify tensors.
        z0: An initial state.
        context: Passed on to fn. Entries that are not tensors are fixed.
        solver: :class:`pydeq.Anderson` by default; it, :class:`pydeq.Picard`, or :class:`pydeq.Broyden` without a line
            search.
        rtol, atol, max_steps, stall: See :func:`pydeq.fixed_point`.

    Raises:
        TypeError, ValueError: If an argument is of the wrong type or out of range; if fn draws random numbers or
            modifies tensors. In a call: if the arguments have other shapes or dtypes.
        RuntimeError: If fn cannot be exported or compiled, or pydeq has no compiled kernels. In a call: if the compiled
            map fails.

    Examples:
        >>> z0, x = torch.zeros(2), torch.tensor([0.0, 0.5])
        >>> solve = pydeq.CompiledSolve(lambda z, x: torch.cos(z) + x, z0, x, rtol=1e-5)
        >>> solve(z0, x).value, solve(z0, x + 0.1).converged
        (tensor([0.7391, 1.0218]), tensor([True, True]))
    """

    @skipped
    def __init__(
        self,
        fn: Callable[..., Any],
        z0: Any,
        *context: Any,
        solver: Solver | None = None,
        rtol: float | None = None,
        atol: float = 0.0,
        max_steps: int = 50,
        stall: bool = True,
    ) -> None:
        if not callable(fn):
            raise TypeError(f"fn must be callable, got {type(fn).__name__}")
        adapter = Adapter(z0)
        layout = self._layout = layout_of(adapter.z0)
        self._converts = adapter.structure is not None
        if layout.device.type != "cpu":
            raise ValueError(f"CompiledSolve is for states on the CPU, got {layout.device}: use pydeq.fixed_point")
        if layout.dtype not in (torch.float64, torch.float32):
            raise ValueError(f"CompiledSolve is for states of float64 or float32, got {layout.dtype}")
        self._prepare(Anderson() if solver is None else solver, rtol, atol, max_steps, stall)
        with Compiler():
            self._map = map = AheadOfTimeMap(adapter.inside(fn), fn, layout, context)
        self._inputs = (Input * len(map.inputs))(*[_input(*each) for each in map.inputs])
        self._complete()
        self.replace(max_steps=1)(z0, *context)  # a map that does not run raises here

    def _prepare(self, solver: Solver, rtol: float | None, atol: float, max_steps: int, stall: bool) -> None:
        """Check the options of the solve, and plan its memory."""
        layout = self._layout
        self._max_steps = check_max_steps("max_steps", max_steps)
        self._rules = stopping_rules(layout, rtol, atol, stall=stall)
        self._plan = _plan(solver, layout.batch, layout.size, layout.dtype, self._max_steps)
        self._function = kernels.compiled_solve(self._plan.function)
        self.solver = solver

    def _complete(self) -> None:
        """Fill in what all calls have in common."""
        layout, map, rules = self._layout, self._map, self._rules
        self._template = Loop(
            bytes=ctypes.sizeof(Loop), run=map.run, model=map.model, inputs=self._inputs, count=len(self._inputs),
            batch=layout.batch, state=layout.size, single=layout.dtype == torch.float32, rtol=rules.rtol,
            atol=rules.atol, eps=rules.eps, stall=rules.stall, max_steps=self._max_steps, damping=self._plan.damping,
        )  # fmt: skip

    def replace(self, **options: Any) -> CompiledSolve:
        """The same solve with other options, by the same compiled map.

        Args:
            options: Any of ``solver``, ``rtol``, ``atol``, ``max_steps`` and ``stall``; the others stay.

        Raises:
            TypeError, ValueError: If an option is unknown, of the wrong type, or out of range.
        """
        rules = self._rules
        kept = {
            "solver": self.solver, "rtol": rules.rtol, "atol": rules.atol, "max_steps": self._max_steps,
            "stall": rules.stall,
        }  # fmt: skip
        for name in options.keys() - kept.keys():
            raise unknown_keyword("CompiledSolve.replace", name, kept)
        other = object.__new__(CompiledSolve)
        other._layout, other._converts, other._map, other._inputs = (
            self._layout, self._converts, self._map, self._inputs,
        )  # fmt: skip
        other._prepare(**(kept | options))
        other._complete()
        return other

    @skipped
    def __call__(self, z0: Any, *context: Any) -> Solution:
        """Solve from ``z0``; see :class:`CompiledSolve`."""
        with Compiler():
            return self._solve(z0, context)

    def _solve(self, z0: Any, context: Sequence[Any]) -> Solution:
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError("a CompiledSolve does not work under torch.func transforms: use pydeq.DEQ, which does")
        layout = self._layout
        adapter = Adapter(z0) if self._converts else None
        state = z0 if adapter is None else adapter.z0
        if (given := layout_of(state)) != layout:
            raise ValueError(f"z0 must be as at compilation, {layout}, got {given}: compile for it")
        flat = layout.flatten(state)
        tensors = self._map.tensors(flat, context)
        loop = Loop.from_buffer_copy(self._template)
        loop.data = (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])
        flat, batch = tensors[0], layout.batch
        best = empty(flat, 2, batch, layout.size)
        scalars = flat.new_empty(batch, _SCALARS, dtype=torch.float64)
        counters = flat.new_empty(batch, _COUNTERS, dtype=torch.int32)
        memory = empty(flat, self._plan.bytes, dtype=torch.uint8)
        loop.best, loop.scalars, loop.counters = best.data_ptr(), scalars.data_ptr(), counters.data_ptr()
        start = memory.data_ptr()
        loop.z, loop.other, *own = [None if at is None else start + at for at in self._plan.places]
        nfe = self._function(loop, *own, *self._plan.settings)
        if nfe < 0:
            why = self._map.error() if nfe == MAP_FAILED else "pydeq's library was built from other sources"
            raise RuntimeError(f"the compiled map failed: {why}")
        if loop.woken:
            warn_of_coupling(loop.woken, batch)
        value, image = best.unbind()
        if not layout.is_flat:
            value, image = layout.view(value), layout.view(image)
        solution = Solution(value, image, nfe, scalars, counters, None)
        return solution if adapter is None else adapter.solution(solution)

    def __reduce__(self) -> Any:
        raise TypeError("a CompiledSolve holds machine code, and cannot be copied or pickled: compile it again")

    def __repr__(self) -> str:
        return f"CompiledSolve({self.solver!r}, {self._layout})"


class _Plan:
    """The memory of one solve, and the arguments of its C function.

    Args:
        function: Its name.
        damping: Of a plain step.
        sizes: Bytes of the two iterates and the solver's own buffers; None for one that is not needed.
        settings: The arguments after the buffers.

    Attributes:
        places: Where the buffers start, in bytes; None for one that is not needed.
        bytes: Of all buffers.
    """

    def __init__(self, function: str, damping: float, sizes: Sequence[int | None], settings: tuple[float, ...]) -> None:
        self.function, self.damping, self.settings = function, damping, settings
        self.places: list[int | None] = []
        self.bytes = 0
        for size in sizes:
            self.places.append(None if size is None else self.bytes)
            self.bytes += -(-(size or 0) // _LINE) * _LINE


def _plan(solver: Solver, batch: int, size: int, dtype: torch.dtype, max_steps: int) -> _Plan:
    vector, double = batch * size * dtype.itemsize, torch.float64.itemsize
    if type(solver) is Picard:
        return _Plan("pydeq_solve_picard", solver.damping, [vector, vector], ())
    if type(solver) is Anderson:
        memory = min(solver.memory, max_steps)
        slots = max(memory, 2)
        sizes = [vector, vector, slots * vector, slots * vector, batch * slots * slots * double]
        return _Plan("pydeq_solve_anderson", solver.damping, sizes, (slots, memory, solver.ridge))
    if type(solver) is Broyden and not solver.line_search:
        capacity = max(1, min(solver.memory + 1, max_steps - 1))
        restart = vector if solver.memory + 2 < max_steps else None
        gram, thetas = batch * capacity * capacity * double, batch * capacity * double
        sizes = [vector, vector, capacity * vector, restart, gram, thetas]
        return _Plan("pydeq_solve_broyden", 1.0, sizes, (capacity, solver.memory))
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a solver like pydeq.Anderson(), got {shown(solver)}")
    raise TypeError(f"CompiledSolve takes Anderson, Picard, and Broyden without a line search, got {solver!r}")


def _input(dims: int, sizes: tuple[int, ...], strides: tuple[int, ...], dtype: int) -> Input:
    numbers = ctypes.c_int64 * max(1, dims)
    return Input(dims, numbers(*sizes), numbers(*strides), dtype)
