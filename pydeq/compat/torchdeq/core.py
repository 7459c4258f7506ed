"""The modules: solve, then give the states gradients."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pydeq.cell.torch_compile import Compiler, skipped
from pydeq.compat.mode import is_legacy, legacy
from pydeq.compat.torchdeq.dropout import reset_dropout
from pydeq.compat.torchdeq.grad import backward_factory, make_pair
from pydeq.compat.torchdeq.loss import power_method
from pydeq.compat.torchdeq.norm import reset_norm
from pydeq.compat.torchdeq.solver import get_solver, simple_fixed_point_iter
from pydeq.compat.torchdeq.utils.arg_utils import ARGUMENTS
from pydeq.compat.torchdeq.utils.config import DEQConfig
from pydeq.compat.torchdeq.utils.layer_utils import DEQWrapper, deq_decorator

__all__ = ["DEQBase", "DEQIndexing", "DEQSliced", "get_deq", "register_deq", "reset_deq"]


class DEQBase(nn.Module):
    """Base class of the cores: solvers and their options.

    An option is looked up in ``args`` first, then among the keywords.

    Args:
        args: A namespace, a mapping or a :class:`DEQConfig`; not modified.
        f_solver, b_solver: Names of the forward and the backward solver.
        no_stat: Keep the tensors of a tuple separate, for a solver that measures nothing; by default if the solver is
            simple_fixed_point_iter.
        f_max_iter, b_max_iter: Maximum numbers of their steps.
        f_tol, b_tol: Their tolerances.
        f_stop_mode, b_stop_mode: Whether the tolerances are for absolute ("abs") or relative ("rel") residuals.
        eval_factor: In evaluation mode f_max_iter is multiplied by this ...
        eval_f_max_iter: ... or is this, if above 0.
        kwargs: Further options. ``f_solver_kwargs`` and ``b_solver_kwargs`` are passed on to the solvers, and
            ``legacy=True`` reproduces the original's iterates.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> deq = torchdeq.get_deq(f_max_iter=30)
        >>> isinstance(deq, torchdeq.DEQBase), deq.f_max_iter
        (True, 30)
    """

    def __init__(
        self,
        args: Any = None,
        f_solver: str = "fixed_point_iter",
        b_solver: str = "fixed_point_iter",
        no_stat: bool | None = None,
        f_max_iter: int = 40,
        b_max_iter: int = 40,
        f_tol: float = 1e-3,
        b_tol: float = 1e-6,
        f_stop_mode: str = "abs",
        b_stop_mode: str = "abs",
        eval_factor: float = 1.0,
        eval_f_max_iter: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.args = DEQConfig(args)
        self.args.update(**kwargs)
        get = self.args.get
        self.f_solver: Callable[..., Any] = get_solver(get("f_solver", f_solver))
        self.b_solver: Callable[..., Any] = get_solver(get("b_solver", b_solver))
        self.f_solver_kwargs = dict(get("f_solver_kwargs") or {})
        self.b_solver_kwargs = dict(get("b_solver_kwargs") or {})
        self.no_stat = self.f_solver is simple_fixed_point_iter if no_stat is None else no_stat
        self.f_max_iter = get("f_max_iter", f_max_iter)
        self.b_max_iter = get("b_max_iter", b_max_iter)
        self.f_tol = get("f_tol", f_tol)
        self.b_tol = get("b_tol", b_tol)
        self.f_stop_mode = get("f_stop_mode", f_stop_mode)
        self.b_stop_mode = get("b_stop_mode", b_stop_mode)
        eval_f_max_iter = get("eval_f_max_iter", eval_f_max_iter)
        factor = get("eval_factor", eval_factor)
        self.eval_f_max_iter = eval_f_max_iter if eval_f_max_iter > 0 else int(self.f_max_iter * factor)
        self.legacy = get("legacy")
        self.hook = None

    def _sradius(self, deq_func: Callable[..., Any], z_star: Any) -> Tensor:
        """Estimate the spectral radius at ``z_star`` of each sample, (B,)."""
        with torch.enable_grad():
            z = z_star.detach().requires_grad_()
            image = deq_func(z)
        return power_method(image, z, n_iters=100)[1]

    def _solve_fixed_point(
        self,
        deq_func: Callable[..., Any],
        z_init: Any,
        f_max_iter: Any = None,
        solver_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Solve without a gradient. The result depends on the core. A subclass may override it.

        Args:
            deq_func: The map, of one tensor.
            z_init: Where to start.
            f_max_iter: Maximum number of steps.
            solver_kwargs: Options of the forward solver for this call.
        """
        raise NotImplementedError

    def _run_solver(
        self, deq_func: Callable[..., Any], z_init: Any, f_max_iter: Any, options: dict[str, Any] | None, **more: Any
    ) -> tuple[Any, list[Any], Any]:
        """Run the forward solver; no gradient."""
        given: dict[str, Any] = {"tol": self.f_tol, "stop_mode": self.f_stop_mode}
        given |= more | self.f_solver_kwargs | (options or {})
        given.pop("f_max_iter", None)
        with torch.no_grad():
            return self.f_solver(deq_func, x0=z_init, max_iter=int(f_max_iter), **given)

    def forward(
        self,
        func: Callable[..., Any],
        z_init: Any = None,
        solver_kwargs: dict[str, Any] | None = None,
        sradius_mode: bool = False,
        backward_writer: Callable[[Any], Any] | None = None,
        **kwargs: Any,
    ) -> tuple[list[Any], Any]:
        """Solve z = func(z).

        Args:
            func: The map; the states of a tuple are separate arguments.
            z_init: Where to start, a tensor or a tuple of tensors.
            solver_kwargs: Options of the forward solver for this call; ``f_max_iter`` among them replaces the steps.
            sradius_mode: In evaluation mode, also estimate the spectral radius.
            backward_writer: Called with the statistics of each backward solve.

        Returns:
            The pair (states, statistics of the last solve). In training, states have gradients; in evaluation mode
            there is only the solution. For a tuple of states, each is a list.
        """
        raise NotImplementedError


class _Sampling(DEQBase):
    """Base class of cores that sample states of a solve and give them gradients.

    Args:
        ift, hook_ift: Differentiate the last state implicitly.
        grad: Number of steps of the phantom gradients: one for all states, or a list.
        tau: Damping of these steps.
        sup_gap, sup_loc: Which of these steps to return, see :func:`backward_factory`.
        n_states: States to sample uniformly.
        indexing: Otherwise, the steps to sample states at; the last state is always included.
        kwargs: As :class:`DEQBase`.
    """

    def __init__(
        self,
        args: Any = None,
        ift: bool = False,
        hook_ift: bool = False,
        grad: int | Sequence[int] = 1,
        tau: float = 1.0,
        sup_gap: int = -1,
        sup_loc: Sequence[int] | None = None,
        n_states: int = 1,
        indexing: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(args=args, **kwargs)
        get = self.args.get
        steps = get("grad", grad)
        steps = [steps] if isinstance(steps, int) else steps
        if not isinstance(steps, list | tuple):
            raise AssertionError(f"grad must be an int, or a list of them, got {steps!r}")
        self.arg_n_states = n_states
        self.arg_indexing = [] if indexing is None else indexing
        self.indexing = self._compute_f_iter(self.f_max_iter)
        self.produce_grad = [
            backward_factory(
                grad_type=count,
                tau=get("tau", tau),
                sup_gap=get("sup_gap", sup_gap),
                sup_loc=get("sup_loc", sup_loc),
            )
            for count in make_pair(self.indexing, steps)
        ]
        if get("ift", ift) or get("hook_ift", hook_ift):
            options = {"max_iter": self.b_max_iter, "tol": self.b_tol, "stop_mode": self.b_stop_mode}
            self.produce_grad[-1] = backward_factory(
                grad_type="ift", b_solver=self.b_solver, b_solver_kwargs=options | self.b_solver_kwargs
            )

    def _compute_f_iter(self, f_max_iter: Any) -> list[int]:
        """The steps that states are sampled at, or between samples."""
        raise NotImplementedError

    def _train(
        self,
        deq_func: DEQWrapper,
        z: Any,
        steps: list[int],
        f_max_iter: Any,
        solver_kwargs: dict[str, Any],
        writer: Any,
    ) -> tuple[list[Any], Any]:
        """The states with gradients, in the solvers' format, and the statistics."""
        raise NotImplementedError

    @skipped
    def forward(
        self,
        func: Callable[..., Any],
        z_init: Any = None,
        solver_kwargs: dict[str, Any] | None = None,
        sradius_mode: bool = False,
        backward_writer: Callable[[Any], Any] | None = None,
        **kwargs: Any,
    ) -> tuple[list[Any], Any]:
        z_init = kwargs.get("z_star") if z_init is None else z_init  # its name in the original's DEQSliced
        options = solver_kwargs or {}
        with Compiler() as compiler, legacy(is_legacy(options.get("legacy", self.legacy))):
            func = compiler.compiled(func)
            deq_func, z = deq_decorator(func, z_init, no_stat=self.no_stat and self._measures_nothing)
            if self.training:
                given = options.get("f_max_iter")
                override = isinstance(given, int | float)
                steps = self._compute_f_iter(given) if override else self.indexing
                f_max_iter = given if override else self.f_max_iter
                states, info = self._train(deq_func, z, steps, f_max_iter, options, backward_writer)
            else:
                f_max_iter = options.get("f_max_iter", self.eval_f_max_iter)
                found = self._solve_fixed_point(deq_func, z, f_max_iter=f_max_iter, solver_kwargs=options)
                z, info = found[0], found[-1]
                first = z if isinstance(z, Tensor) else z[0]
                info["sradius"] = self._sradius(deq_func, z) if sradius_mode else torch.zeros(1, device=first.device)
                states = [z]
            return [deq_func.vec2list(state) for state in states], info

    @property
    def _measures_nothing(self) -> bool:
        """Whether several tensors can stay separate, because no solver needs them as one."""
        return self.f_solver is simple_fixed_point_iter and not any(hasattr(g, "b_solver") for g in self.produce_grad)


class DEQIndexing(_Sampling):
    """One solve with states sampled along the way, each with gradients; options as in :class:`DEQBase`.

    Args:
        ift, hook_ift, grad, tau, sup_gap, sup_loc: How a state gets its gradient.
        n_states, indexing: Which states are sampled.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> deq = torchdeq.DEQIndexing(f_max_iter=20, n_states=4)
        >>> z_out, info = deq(torch.cos, torch.zeros(2, 1))
        >>> len(z_out)
        4
    """

    def _compute_f_iter(self, f_max_iter: Any) -> list[int]:
        count = self.args.get("n_states", self.arg_n_states)
        if count <= 1:
            return [*self.args.get("indexing", self.arg_indexing), f_max_iter]
        count = max(min(f_max_iter, count), 1)
        gap = int(f_max_iter // count)
        return [f_max_iter - (count - k - 1) * gap for k in range(count)]

    def _solve_fixed_point(
        self,
        deq_func: Callable[..., Any],
        z_init: Any,
        f_max_iter: Any = None,
        indexing: Sequence[int] | None = None,
        solver_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, list[Any], Any]:
        """The solution, the states of the steps ``indexing``, and the statistics; no gradient."""
        return self._run_solver(deq_func, z_init, f_max_iter, solver_kwargs, indexing=indexing)

    def _train(
        self,
        deq_func: DEQWrapper,
        z: Any,
        steps: list[int],
        f_max_iter: Any,
        solver_kwargs: dict[str, Any],
        writer: Any,
    ) -> tuple[list[Any], Any]:
        _, trajectory, info = self._solve_fixed_point(
            deq_func, z, f_max_iter=f_max_iter, indexing=steps, solver_kwargs=solver_kwargs
        )
        produce = self.produce_grad
        if not is_legacy():  # with fewer states, the last gradient still belongs to the last state
            produce = produce[max(0, len(produce) - len(trajectory)) :]
        states = []
        for state, produce_grad in zip(trajectory, produce, strict=False):
            states += produce_grad(self, deq_func, deq_func.detach(state), writer=writer)
        return states, info


class DEQSliced(_Sampling):
    """Several solves in a row; each starts from the state after the previous solve's gradient steps.

    Args:
        ift, hook_ift, grad, tau, sup_gap, sup_loc: How a state gets its gradient.
        n_states, indexing: Where one solve ends and the next begins.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> deq = torchdeq.DEQSliced(f_max_iter=20, n_states=4)
        >>> z_out, info = deq(torch.cos, torch.zeros(2, 1))
        >>> len(z_out)
        4
    """

    def _compute_f_iter(self, f_max_iter: Any) -> list[int]:
        count = self.args.get("n_states", self.arg_n_states)
        if count > 1:
            return [int(f_max_iter // count)] * count
        return np.diff([0, *self.args.get("indexing", self.arg_indexing), f_max_iter]).tolist()

    def _solve_fixed_point(
        self,
        deq_func: Callable[..., Any],
        z_init: Any,
        f_max_iter: Any = None,
        solver_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """The solution and the statistics; no gradient."""
        z, _, info = self._run_solver(deq_func, z_init, f_max_iter, solver_kwargs)
        return z, info

    def _train(
        self,
        deq_func: DEQWrapper,
        z: Any,
        steps: list[int],
        f_max_iter: Any,
        solver_kwargs: dict[str, Any],
        writer: Any,
    ) -> tuple[list[Any], Any]:
        states: list[Any] = []
        info = None
        for count, produce_grad in zip(steps, self.produce_grad, strict=False):
            found = self._solve_fixed_point(deq_func, z, f_max_iter=count, solver_kwargs=solver_kwargs)
            z, info = found[0], found[-1]  # an overridden method may also return intermediate states
            states += produce_grad(self, deq_func, deq_func.detach(z), writer=writer)
            z = states[-1]
        return states, info


_core: dict[str, Callable[..., Any]] = {"indexing": DEQIndexing, "sliced": DEQSliced}


def register_deq(deq_type: str, core: Callable[..., Any]) -> None:
    """Make a core available to :func:`get_deq` as ``deq_type``."""
    _core[deq_type] = core


def get_deq(args: Any = None, **kwargs: Any) -> Any:
    """Make the module that ``args`` and ``kwargs`` describe.

    Args:
        args: A namespace, a mapping or a :class:`DEQConfig`; not modified.
        kwargs: Options, which override ``args``: ``core``, "sliced" or "indexing", and the options of
            :class:`DEQIndexing` and :class:`DEQBase`. A warning names an option that no core knows.

    Raises:
        AssertionError: If the core is unknown.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> deq = torchdeq.get_deq(f_solver="anderson", f_tol=1e-5)
        >>> z_out, info = deq(torch.cos, torch.zeros(2, 1))
        >>> z_out[-1]
        tensor([[0.7391],
                [0.7391]])
    """
    config = DEQConfig(args)
    config.update(**kwargs)
    name = config.get("core", "sliced")
    if name not in _core:
        raise AssertionError(f"core must be one of {', '.join(_core)}, got {name!r}")
    core = _core[name]
    if core in (DEQIndexing, DEQSliced):
        for key in kwargs:
            if key not in _OPTIONS:
                nearest = difflib.get_close_matches(key, _OPTIONS, n=1)
                advice = f": did you mean {nearest[0]!r}?" if nearest else ""
                warnings.warn(f"get_deq has no option {key!r}{advice}", stacklevel=2)
    return core(config)


_OPTIONS = (
    set(ARGUMENTS)
    | {name for kind in (DEQBase, _Sampling) for name in inspect.signature(kind.__init__).parameters}
    | {"f_solver_kwargs", "b_solver_kwargs", "legacy"}
)


def reset_deq(model: nn.Module) -> None:
    """Compute normed weights again and drop the dropout masks. Call it once before each training step.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> cell = torch.nn.Sequential(torch.nn.Linear(4, 4), torchdeq.VariationalDropout(0.5))
        >>> torchdeq.apply_norm(cell)
        >>> torchdeq.reset_deq(cell)
        >>> cell[1].mask is None
        True
    """
    reset_norm(model)
    reset_dropout(model)
