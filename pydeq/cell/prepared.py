"""``PreparedCell``: a user's cell with the wrappers that one call needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pydeq.cell.adapter import Adapter
from pydeq.cell.parameters import fill_parametrization_cache
from pydeq.cell.replay_rng import Replayed, random_modules
from pydeq.cell.running_statistics import MovedOnce, learned_statistics
from pydeq.cell.scope import InScope, scope_of, share_weights
from pydeq.cell.torch_compile import Compiler, uncompiled
from pydeq.state import State, layout_of


class PreparedCell:
    """A user's cell, prepared for one call of a layer or of a solve.

    Its callables are maps of states, fn(z, *context) -> like z. A state is a tensor or a tuple of tensors. From the
    inside out, such a map

    - turns the compiler's hook on around the cell (:mod:`pydeq.cell.torch_compile`);
    - converts states, keywords and auxiliary results (:mod:`pydeq.cell.adapter`);
    - moves running statistics once (:mod:`pydeq.cell.running_statistics`);
    - draws the same random numbers at every call (:mod:`pydeq.cell.replay_rng`);
    - enters the scope that keeps dropout masks and normalized weights (:mod:`pydeq.cell.scope`).

    Steps that a cell does not need are left out: a module that takes and returns a tensor is called directly.

    Args:
        cell: cell(z, *context, **keywords) -> like z.
        z0: The initial state, of any type that the user has.
        keywords: Passed on to the cell by name.
        has_aux: Whether the cell returns a pair of the state and something else.
        compiler: The compiler's hook outside of this call.
        freeze_rng: Whether all evaluations draw the same random numbers.
        scoped: Whether evaluations enter a scope of this call. Otherwise they use the active scope.

    Attributes:
        call: The map for a solve, and for an evaluation with gradients.
        adapter: Converts between the user's states and the package's.
        module: The module that holds the cell's parameters; None if the cell is neither a module nor a module's method.
        is_compiled: Whether ``call`` runs compiled code.
    """

    def __init__(
        self,
        cell: Callable[..., Any],
        z0: Any,
        keywords: dict[str, Any] | None = None,
        has_aux: bool = False,
        *,
        compiler: Compiler,
        freeze_rng: bool = False,
        scoped: bool = True,
    ) -> None:
        if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            raise RuntimeError(
                "torch.jit.trace cannot record a solve, whose number of evaluations depends on values: export the model"
                " by torch.export.export or torch.onnx.export(..., dynamo=True), see pydeq.export_mode"
            )
        self.cell = cell
        self.adapter = adapter = Adapter(z0, keywords, has_aux)
        self.module = module_of(cell)
        self.is_compiled = compiler.compiles(cell)
        modules = self.modules
        self._scope = scope_of(cell, modules) if scoped else None
        fn = adapter.inside(compiler.compiled(cell))
        # Under torch.func, buffers are inputs of the map: see pydeq.adjoints.functional.
        learned = learned_statistics(modules) if scoped and not torch._C._are_functorch_transforms_active() else []
        self._moved = MovedOnce(fn, learned) if learned else None
        fn = self._moved or fn
        self._replayed = Replayed(fn, layout_of(adapter.z0).device) if freeze_rng else None
        self.call = self._in_scope(self._replayed or fn)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """``module`` and all modules that it has now, each once."""
        return () if self.module is None else _modules_in(self.module)

    @property
    def z0(self) -> State:
        """The initial state in the package's type, a tensor or a tuple of tensors."""
        return self.adapter.z0

    def settle(self) -> None:
        """Say that the layer's call is over: later evaluations do not move running statistics."""
        if self._moved is not None:
            self._moved.settle()

    def sharing_weights(self) -> Callable[..., Any]:
        """``call`` for evaluations with gradients that end in one graph: normalized weights are computed once."""
        return share_weights(self.call)

    def for_penalty(self, differentiates_twice: bool) -> Callable[..., Any]:
        """The map for a penalty on its Jacobian; without the compiler if compiled code lacks the derivatives.

        Args:
            differentiates_twice: Whether the penalty differentiates twice; compiled code does not support this.

        Raises:
            RuntimeError: If the map without the compiler would draw other random numbers.
        """
        if not (differentiates_twice and self.is_compiled):
            return self.call
        fn = self.adapter.inside(uncompiled(self.cell))
        if self._moved is not None:
            fn = self._moved.of(fn)
        if self._replayed is None:
            return self._in_scope(fn)
        if random_modules(self.module):
            raise RuntimeError(
                "a compiled cell draws other random numbers than the uncompiled one that a penalty needs: use"
                " pydeq.nn.VariationalDropout or mode='difference', or do not compile"
            )
        return self._in_scope(self._replayed.of(fn))

    def fill_parametrization_cache(self) -> None:
        """Inside ``parametrize.cached()``: let the cache hold parametrized tensors with their graphs."""
        if self.module is not None:
            fill_parametrization_cache(self.module)

    def _in_scope(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return fn if self._scope is None else InScope(fn, self._scope)

    def __repr__(self) -> str:
        around = {
            "compiled": self.is_compiled,
            "structured state": self.adapter.structure is not None,
            f"keywords {', '.join(self.adapter.keywords)}": bool(self.adapter.keywords),
            "has_aux": self.adapter.has_aux,
            "replayed random numbers": self._replayed is not None,
            "in a scope": self._scope is not None,
        }
        return (
            f"PreparedCell({', '.join([type(self.cell).__name__, *(text for text, is_so in around.items() if is_so)])})"
        )


def _modules_in(module: nn.Module) -> tuple[nn.Module, ...]:
    """``module`` and all modules in it, each once. This is faster than ``module.modules()``, which also makes names."""
    found, seen = [module], {module}
    for parent in found:
        for child in parent._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return tuple(found)


def module_of(cell: Any) -> nn.Module | None:
    """The module of a cell that is a module or a module's bound method; None for other cells."""
    if isinstance(cell, nn.Module):
        return cell
    owner = getattr(cell, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None
