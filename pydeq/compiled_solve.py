"""``CompiledSolve``: a solve as machine code, for small systems."""

from __future__ import annotations

import ctypes
import dataclasses
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor

from pydeq.arguments import check_max_steps, shown, unknown_keyword
from pydeq.cell.adapter import Adapter
from pydeq.cell.ahead_of_time import AheadOfTimeMap
from pydeq.cell.torch_compile import Compiler, compiling, skipped, uncompiled
from pydeq.ops import kernels
from pydeq.ops.capture import exporting
from pydeq.ops.compiled_loop import MAP_FAILED, Input, Loop
from pydeq.ops.constants import Counter, Scalar
from pydeq.solution import Solution
from pydeq.solve.iteration import warn_of_coupling
from pydeq.solve.solve import stopping_rules
from pydeq.solvers import Anderson, Broyden, Picard, Solver
from pydeq.solvers.buffers import empty
from pydeq.state import Layout, State, layout_of

_OPTIONS = ("solver", "rtol", "atol", "max_steps", "stall")
_LINE = 64  # bytes of a cache line, at which each buffer starts
_SCALARS, _COUNTERS = len(Scalar), len(Counter)  # an enum takes long to count its members
_DOUBLE = 8  # bytes


class CompiledSolve:
    """A solve of z = fn(z, *context) in compiled code: fn compiled ahead of time, and the loop in C++.

    ``CompiledSolve(fn, z0, *context)`` compiles for states and context of these shapes, and evaluates fn once. This
    takes 10 to 20 s and a C++ compiler. The object is then called with the same arguments without fn, and returns what
    :func:`pydeq.fixed_point` returns::

        solve = pydeq.CompiledSolve(fn, z0, x, solver=pydeq.Anderson(), rtol=1e-6)
        solution = solve(z0, x)

    An evaluation of a small map takes torch 20 to 100 us, and the loop around it as long; compiled, both together take
    a few. So this is for small systems on a CPU that are solved thousands of times. Where an evaluation takes
    milliseconds, it saves little.

    What fn reads from elsewhere than its arguments is fixed when it is compiled: numbers and flags, such as
    ``training``, keep their values, and so do submodules, autocast and torch's number of threads. No error says that
    they have changed. Only the values of tensors are read at each call. The parameters and buffers of modules that fn
    is, or refers to by a variable, may also be replaced by others of the same shape. All other tensors must change in
    place.

    Results have no gradient, also if inputs require grad: train with :class:`pydeq.DEQ`. No warning says that samples
    did not converge. Threads may share the object, and take turns. A solve cannot be interrupted. The object cannot be
    copied or saved. It keeps the memory of a solve, and its machine code stays in the process.

    Args:
        fn: As in :func:`pydeq.fixed_point`, without keywords. torch.export must be able to record it: values must not
            decide what it computes. It must not draw random numbers or modify tensors.
        z0: An initial state, of float64 or float32, on the CPU.
        context: Passed on to fn. Numbers and other values that are not tensors are fixed.
        solver: :class:`pydeq.Anderson` by default; it, :class:`pydeq.Picard`, or :class:`pydeq.Broyden` without a line
            search.
        rtol, atol, max_steps, stall: See :func:`pydeq.fixed_point`, whose other options it does not have.

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
        **unknown: NoReturn,
    ) -> None:
        for name in unknown:
            raise unknown_keyword("CompiledSolve", name, _OPTIONS)
        if not callable(fn):
            raise TypeError(f"fn must be callable, got {type(fn).__name__}")
        adapter = Adapter(z0)
        layout = self._layout = layout_of(adapter.z0)
        self._structure = adapter.structure
        if layout.device.type != "cpu":
            raise ValueError(
                f"CompiledSolve is for states on the CPU, got {layout.device}: use pydeq.fixed_point there"
            )
        if layout.dtype not in (torch.float64, torch.float32):
            raise ValueError(f"CompiledSolve is for states of float64 or float32, got {layout.dtype}")
        self._prepare(Anderson() if solver is None else solver, rtol, atol, max_steps, stall)
        cell = uncompiled(fn)
        with Compiler():
            self._map = map = AheadOfTimeMap(adapter.inside(cell), cell, layout, context)
        self._lock = threading.Lock()
        self._inputs = (Input * len(map.inputs))(*[_input(*each) for each in map.inputs])
        self._complete()
        self.replace(max_steps=1)(z0, *context)  # a map that does not run raises here

    def _prepare(
        self, solver: Solver, rtol: float | None, atol: float, max_steps: int, stall: bool, eps: float | None = None
    ) -> None:
        """Check the options of the solve, and plan its memory."""
        layout = self._layout
        self._max_steps = check_max_steps("max_steps", max_steps)
        rules = stopping_rules(layout, rtol, atol, stall=stall)
        # Autocast counts when the map is compiled, not in ``replace``.
        self._rules = rules if eps is None else dataclasses.replace(rules, eps=eps)
        self._plan = _plan(solver, layout.batch, layout.size, layout.dtype, self._max_steps)
        self._function = kernels.compiled_solve(self._plan.function)
        self.solver = solver

    def _complete(self) -> None:
        """Fill in what all calls have in common."""
        layout, map, rules, plan = self._layout, self._map, self._rules, self._plan
        self._memory = empty(torch.empty(0, device="cpu"), plan.bytes, dtype=torch.uint8)
        start = self._memory.data_ptr()
        z, other, best, *own = [None if at is None else start + at for at in plan.places]
        self._data = (ctypes.c_void_p * len(self._inputs))()
        loop = self._loop = Loop(
            bytes=ctypes.sizeof(Loop), run=map.run, model=map.model, inputs=self._inputs, data=self._data,
            count=len(self._inputs), batch=layout.batch, state=layout.size, single=layout.dtype == torch.float32, z=z,
            other=other, best=best, rtol=rules.rtol, atol=rules.atol, eps=rules.eps, stall=rules.stall,
            max_steps=self._max_steps, damping=plan.damping,
        )  # fmt: skip
        self._arguments = (loop, *own, *plan.settings)
        shape = (layout.batch, *layout.shapes[0]) if self._structure is None and not layout.is_tuple else None
        self._usual = shape, layout.dtype
        self._record = layout.batch * _SCALARS + (layout.batch * _COUNTERS + 1) // 2  # doubles and pairs of int32
        weakref.finalize(self, kernels.forget_views, loop).atexit = False

    def replace(self, **options: Any) -> CompiledSolve:
        """The same solve with other options, by the same compiled map, for the same shapes.

        Args:
            options: Any of ``solver``, ``rtol``, ``atol``, ``max_steps`` and ``stall``; the others stay.

        Raises:
            TypeError, ValueError: If an option is unknown, of the wrong type, or out of range.
        """
        rules = self._rules
        values: tuple[Any, ...] = self.solver, rules.rtol, rules.atol, self._max_steps, rules.stall
        for name in options.keys() - set(_OPTIONS):
            raise unknown_keyword("CompiledSolve.replace", name, _OPTIONS)
        other = object.__new__(CompiledSolve)
        for name in ("_layout", "_structure", "_map", "_inputs", "_lock"):
            setattr(other, name, getattr(self, name))
        other._prepare(**(dict(zip(_OPTIONS, values, strict=True)) | options), eps=rules.eps)
        other._complete()
        return other

    @skipped
    def __call__(self, z0: Any, *context: Any) -> Solution:
        """Solve from ``z0``; see :class:`CompiledSolve`."""
        if not compiling():
            return self._solve(z0, context)
        with Compiler():
            return self._solve(z0, context)

    # When a solve begins, little of this code is in the caches. So a call that is saved here saves several times what
    # it takes in a loop.
    def _solve(self, z0: Any, context: Sequence[Any]) -> Solution:
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError("a CompiledSolve does not work under torch.func transforms: use pydeq.DEQ, which does")
        if exporting() or torch._C._is_tracing():
            raise RuntimeError("a CompiledSolve cannot be exported: use pydeq.DEQ, which can, see pydeq.export_mode")
        layout, adapter, loop, batch = self._layout, None, self._loop, self._layout.batch
        shape, dtype = self._usual
        usual = type(z0) is Tensor and z0.shape == shape and z0.dtype is dtype and z0.layout is torch.strided
        if usual and z0.is_cpu and z0.is_contiguous():
            flat = z0 if z0.dim() == 2 else z0.view(batch, layout.size)
        else:
            adapter, state = self._checked(z0)
            flat = layout.flatten(state)
        tensors, addresses = self._map.tensors(flat, context)
        flat = tensors[0]
        value, image = torch.empty_like(flat), torch.empty_like(flat)
        record = flat.new_empty(self._record, dtype=torch.float64)
        with self._lock:
            self._data[:] = addresses
            loop.value, loop.image, loop.scalars = value.data_ptr(), image.data_ptr(), record.data_ptr()
            loop.counters = loop.scalars + batch * _SCALARS * _DOUBLE
            if torch._C._is_any_autocast_enabled():
                with torch._C._DisableAutocast():
                    nfe = self._function(*self._arguments)
            else:
                nfe = self._function(*self._arguments)
            woken = loop.woken
        if nfe < 0:
            why = (
                self._map.error() if nfe == MAP_FAILED else "pydeq's library is of another version: install pydeq again"
            )
            raise RuntimeError(f"the compiled map failed: {why}")
        if woken:
            warn_of_coupling(woken, batch)
        if not layout.is_flat:
            value, image = layout.view(value), layout.view(image)
        solution = _Solution(value, image, nfe, record, batch)
        return solution if adapter is None else adapter.solution(solution)

    def _checked(self, z0: Any) -> tuple[Adapter | None, State]:
        """The conversions of an initial state that is not the usual tensor, and its tensors."""
        structure, layout = self._structure, self._layout
        adapter = None if structure is None else Adapter(z0)
        state = z0 if adapter is None else adapter.z0
        if adapter is not None and structure is not None and _spec(adapter) != structure.spec:
            raise ValueError("z0 must have the type, and its dicts the order of keys, that it had at compilation")
        if (given := layout_of(state)) != layout:
            raise ValueError(
                f"z0 must be as at compilation, {_shown(layout)}, got {_shown(given)}: make another CompiledSolve"
            )
        return adapter, state

    def __reduce__(self) -> Any:
        raise TypeError("a CompiledSolve holds machine code, and cannot be copied or pickled: compile it again")

    def __repr__(self) -> str:
        rules = self._rules
        return (
            f"CompiledSolve({_shown(self._layout)}, solver={self.solver!r}, rtol={rules.rtol:g}, atol={rules.atol:g},"
            f" max_steps={self._max_steps})"
        )


class _Solution(Solution):
    """A solution whose scalars and counters are parts of one tensor, and made when they are read."""

    def __init__(self, value: State, image: State, nfe: int, record: Tensor, batch: int) -> None:
        super().__init__(value, image, nfe, record, record, None)
        del self._scalars, self._counters
        self._record, self._batch = record, batch

    @cached_property
    def _scalars(self) -> Tensor:
        return self._record[: self._batch * _SCALARS].view(self._batch, _SCALARS)

    @cached_property
    def _counters(self) -> Tensor:
        counters = self._record[self._batch * _SCALARS :].view(torch.int32)
        return counters[: self._batch * _COUNTERS].view(self._batch, _COUNTERS)


class _Plan:
    """The memory of one solve, and the arguments of its C function.

    Args:
        function: Its name.
        damping: Of a plain step.
        sizes: Bytes of the two iterates, the best values and the solver's own buffers; None for one that is not needed.
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
        return _Plan("pydeq_solve_picard", solver.damping, [vector, vector, 2 * vector], ())
    if type(solver) is Anderson:
        memory = min(solver.memory, max_steps)
        slots = max(memory, 2)
        sizes = [vector, vector, 2 * vector, slots * vector, slots * vector, batch * slots * slots * double]
        return _Plan("pydeq_solve_anderson", solver.damping, sizes, (slots, memory, solver.ridge))
    if type(solver) is Broyden and not solver.line_search:
        capacity = max(1, min(solver.memory + 1, max_steps - 1))
        restart = vector if solver.memory + 2 < max_steps else None
        gram, thetas = batch * capacity * capacity * double, batch * capacity * double
        sizes = [vector, vector, 2 * vector, capacity * vector, restart, gram, thetas]
        return _Plan("pydeq_solve_broyden", 1.0, sizes, (capacity, solver.memory))
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a solver like pydeq.Anderson(), got {shown(solver)}")
    raise TypeError(f"CompiledSolve takes Anderson, Picard, and Broyden without a line search, got {solver!r}")


def _spec(adapter: Adapter) -> Any:
    return None if adapter.structure is None else adapter.structure.spec


def _shown(layout: Layout) -> str:
    """The shapes and the dtype of states."""
    shapes = ", ".join(str((layout.batch, *shape)) for shape in layout.shapes)
    return f"{shapes} of {layout.dtype}"


def _input(dims: int, sizes: tuple[int, ...], strides: tuple[int, ...], dtype: int) -> Input:
    numbers = ctypes.c_int64 * max(1, dims)
    return Input(dims, numbers(*sizes), numbers(*strides), dtype)
