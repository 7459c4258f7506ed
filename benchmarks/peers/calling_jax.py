"""The same for JAX: a problem's map from its formula, counted also under jit, vmap and differentiation.

A solver sees the whole batch as one state, or one sample: then ``jax.vmap`` maps it over the samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.experimental import io_callback
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from torch import Tensor

from benchmarks.peers.contender import Claim, Contender, Counts
from benchmarks.problems.base import Problem


def precision(problem: Problem) -> AbstractContextManager[Any]:
    """Context in which JAX computes in the problem's dtype: to trace, to compile and to run in."""
    return jax.enable_x64(problem.z0.dtype == torch.float64)


def array(tensor: Tensor) -> jax.Array:
    if tensor.dtype == torch.bfloat16:  # which NumPy does not have
        return jnp.asarray(tensor.float().numpy(), jnp.bfloat16)
    return jnp.asarray(tensor.numpy())


def tensor(array: jax.Array) -> Tensor:
    """A copy on torch's side, once the array has been computed."""
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(np.array(array, np.float32)).bfloat16()
    return torch.from_numpy(np.array(array))


@dataclass(frozen=True)
class Maps:
    """The functions of a problem, for JAX.

    Args:
        fn: The map, of z and the constants.
        difference: z - fn(z), of z and the constants: B r(z) if the problem was stated so, and B is a number.
        equation: r(z) if the problem was stated so, otherwise z - fn(z): for root finders that do not depend on scale.
    """

    fn: Callable[[Any, Any], Any]
    difference: Callable[[Any, Any], Any]
    equation: Callable[[Any, Any], Any]


# run(functions, z0, constants, tolerance) returns a value and whether it converged. tolerance [B] is the residual that
# solves each sample; mapped over samples, it is a number, and z0 and the constants are those of one sample.
Run = Callable[[Maps, Any, Any, Any], tuple[Any, Any]]


def refusal_to_map(problem: Problem) -> str | None:
    """Why a solver cannot be mapped over the samples; None if it can."""
    if problem.coupled:
        return "the samples depend on each other"
    return "it has one sample, so that mapping changes nothing" if len(problem.z0) == 1 else None


@dataclass(frozen=True)
class _Kept:
    """A compiled solver of one problem, for any tolerance.

    Args:
        contender, problem: The solver and the problem.
        solve: solve(tolerance) returns a value and whether it converged.
        counts: Counts of all solves so far.
    """

    contender: Contender
    problem: Problem
    solve: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    counts: Counts


# By a contender's key and whether it is counted, for the last problem: the contest takes one after the other.
_kept: dict[tuple[str, bool], _Kept] = {}


def jitted(
    contender: Contender, problem: Problem, run: Run, tolerance: Tensor, counts: Counts | None = None,
    mapped: bool = False,
) -> Callable[[], Claim]:  # fmt: skip
    """Make a function that solves a problem with a formula; its first call compiles, unless it is counted.

    Args:
        contender: The solver.
        run: The solver, as a function of JAX's arrays.
        tolerance: The residual that solves each sample, [B].
        counts: Each solve adds to it; mapped over samples, evaluations of the whole batch.
        mapped: Map ``run`` over the samples.
    """
    key = (contender.key, counts is not None)
    kept = _kept.get(key)
    with precision(problem):
        allowed = array(tolerance.to(problem.z0.dtype))
    if kept is None or kept.problem is not problem or kept.contender != contender:
        kept = _kept[key] = _compiled(contender, problem, run, allowed, counts is not None, mapped)
    share, wide = len(problem.z0) if mapped else 1, problem.z0.dtype == torch.float64

    def solve() -> Claim:
        before = dataclasses.replace(kept.counts) if counts is not None else None
        if jax.config.jax_enable_x64 == wide:  # pyright: ignore[reportAttributeAccessIssue]
            value, converged = jax.block_until_ready(kept.solve(allowed))
        else:  # entering the context takes as long as a short solve: see Contender.session
            with precision(problem):
                value, converged = jax.block_until_ready(kept.solve(allowed))
        if counts is not None and before is not None:
            jax.effects_barrier()
            counts.evaluations += (kept.counts.evaluations - before.evaluations) // share
            counts.products += (kept.counts.products - before.products) // share
        return Claim(
            lambda: tensor(value).reshape(problem.z0.shape),
            lambda: torch.from_numpy(np.array(converged)).expand(len(problem.z0)),
        )

    return solve


def _compiled(
    contender: Contender, problem: Problem, run: Run, tolerance: jax.Array, counted: bool, mapped: bool
) -> _Kept:
    formula, root = problem.formula, problem.root
    assert formula is not None
    counts = Counts()

    def call(equation: Callable[..., Any], z: Any, constants: Any) -> Any:
        if not mapped:
            return equation(jnp, z, **constants)
        shares = {name: jnp.expand_dims(constants[name], axis) for name, axis in problem.sample_axes.items()}
        return equation(jnp, z[None], **constants | shares)[0]

    def solver(z0: Any, constants: Any, tolerance: Any, one: Any) -> Any:
        # All samples share the columns of the identity, so vmap would count them once. A factor of 1 for each sample
        # makes it count them for each sample.
        count = _counted(counts, one if mapped else None) if counted else lambda z: z

        def fn(z: Any, constants: Any) -> Any:
            return call(formula, count(z), constants)

        def equation(z: Any, constants: Any) -> Any:
            return z - fn(z, constants) if root is None else call(root, count(z), constants)

        def difference(z: Any, constants: Any) -> Any:
            return z - fn(z, constants) if problem.step is None else problem.step * equation(z, constants)

        return run(Maps(fn, difference, equation), z0, constants, tolerance)

    axes: dict[str, int | None] = dict.fromkeys(problem.constants) | dict(problem.sample_axes)
    with precision(problem):
        compiled = jax.jit(jax.vmap(solver, in_axes=(0, axes, 0, 0)) if mapped else solver)
        z0, constants = array(problem.z0), {name: array(value) for name, value in problem.constants.items()}
        ones = jnp.ones(len(problem.z0), z0.dtype)
        if counted:  # at once, so that the seconds of a counted solve are not those of the compiler
            compiled = compiled.lower(z0, constants, tolerance, ones).compile()
    return _Kept(contender, problem, lambda tolerance: compiled(z0, constants, tolerance, ones), counts)


# An identity that counts its executions: as evaluations, and where it is the derivative of one, as products.
# Under vmap, it counts one for each element: a Jacobian by n columns is n products.
_count_p = Primitive("count")


def _counted(counts: Counts, factor: Any) -> Callable[[Any], Any]:
    def count(z: Any) -> Any:
        z = z if factor is None else factor * z
        return _count_p.bind(z, counts=_Identity(counts), product=False, weight=1)

    return count


@dataclass(frozen=True, eq=False)
class _Identity:
    """Counts as a parameter of a primitive, which must be hashable."""

    counts: Counts

    def add(self, product: bool, weight: int) -> None:
        if product:
            self.counts.products += weight
        else:
            self.counts.evaluations += weight


def _execute(x: Any, *, counts: _Identity, product: bool, weight: int) -> Any:
    def add() -> np.ndarray:
        counts.add(product, weight)
        return np.zeros((), np.int32)

    io_callback(add, jax.ShapeDtypeStruct((), np.int32))
    return x


def _jvp(primals: Any, tangents: Any, *, counts: _Identity, product: bool, weight: int) -> Any:
    (x,), (t,) = primals, tangents
    y = _count_p.bind(x, counts=counts, product=product, weight=weight)
    if type(t) is not ad.Zero:
        t = _count_p.bind(t, counts=counts, product=True, weight=weight)
    return y, t


def _transpose(cotangent: Any, x: Any, **parameters: Any) -> Any:
    return [cotangent if type(cotangent) is ad.Zero else _count_p.bind(cotangent, **parameters)]


def _batch(arguments: Any, axes: Any, *, counts: _Identity, product: bool, weight: int) -> Any:
    (x,), (axis,) = arguments, axes
    return _count_p.bind(x, counts=counts, product=product, weight=weight * x.shape[axis]), axis


_count_p.def_impl(_execute)
_count_p.def_abstract_eval(lambda x, **_: x)
ad.primitive_jvps[_count_p] = _jvp
ad.primitive_transposes[_count_p] = _transpose
batching.primitive_batchers[_count_p] = _batch
mlir.register_lowering(_count_p, mlir.lower_fun(_execute, multiple_results=False))
