"""``audit``: evaluate fn at what a solver returns, and check what the solver says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from pydeq.cell.adapter import Adapter
from pydeq.cell.linearization import unwrapped
from pydeq.cell.prepared import module_of
from pydeq.cell.scope import solve_scope
from pydeq.diagnosis.subject import (
    Residual,
    Subject,
    buffers_restored,
    exact_cotangent,
    flat,
    gradients,
    graph_leaves,
    same_bits,
)
from pydeq.solution import Solution
from pydeq.solve.solve import solve as solve_flat
from pydeq.solvers import Anderson, Broyden
from pydeq.state import State, as_tuple, layout_of

# A claim is false if the residual is larger by more than this: other norms and denominators explain less.
_FALSE_CLAIM = 3.0
# Two numbers are the same quantity if they agree to this relative difference, and different ones if not.
_SAME = 0.01
# A solver that is left with this residual has found nothing. Plain iteration must then not be this much better.
_NOTHING, _WORSE = 0.1, 3.0
# With a smaller residual, plain iteration must not be this much better, unless the solver stopped at its tolerance:
# then it needs at most this share of its evaluations, or this few, if it starts from its result. Residuals below the
# last number of rounding errors are all the same.
_FAR_WORSE, _STOPS, _FEW, _ROUNDED = 100.0, 0.1, 5, 10.0
# The largest relative error of a gradient that approximate solves explain; a smaller one is a fault from _DOUBTFUL on,
# if the gradient is recognized as another one.
_GRADIENT, _DOUBTFUL = 0.05, 0.005
# A gradient is compared with its exact value, or with this fraction of the largest gradient if that is larger.
_FLOOR = 0.1
# A gradient by this many steps at most is recognized.
_PHANTOM_STEPS = 10


@dataclass
class Audit:
    """What :func:`audit` found.

    Attributes:
        faults: Sentences, one for each claim that is false; empty if all is sound.
        notes: Sentences about what could not be checked, and about fn.
        residual: The true relative residual ||fn(z) - z|| / ||fn(z)|| of each sample, float64 (batch,); None if the
            result is no state like z0.
        claimed: The residual that the solver claims, float64 (batch,) or 0-d; None if it claims none.
        plain_residual: The smallest relative residual of plain iteration with as many evaluations, float64 (batch,).
        evaluations: How often the solver called fn.
        gradient_error: The largest relative error of a gradient; None if gradients were not checked.
        gradient_errors: The relative error of each gradient, by the tensor's name: its name in fn if fn is a module,
            else its shape.

    Examples:
        >>> audit = pydeq.audit(lambda fn, z0: pydeq.fixed_point(fn, z0), torch.cos, torch.zeros(1))
        >>> audit.faults
        []
    """

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    residual: Tensor | None = None
    claimed: Tensor | None = None
    plain_residual: Tensor | None = None
    evaluations: int = 0
    gradient_errors: dict[str, float] = field(default_factory=dict)

    @property
    def gradient_error(self) -> float | None:
        return max(self.gradient_errors.values(), default=None)

    def __repr__(self) -> str:
        text = "1 fault" if len(self.faults) == 1 else f"{len(self.faults) or 'no'} faults"
        facts = [text, f"{self.evaluations} evaluations"]
        for name, values in (
            ("relative residual", self.residual),
            ("claimed", self.claimed),
            ("plain iteration", self.plain_residual),
        ):
            if values is not None and values.numel():
                facts.append(f"{name} {float(values.max()):.2g}")
        if self.gradient_error is not None:
            facts.append(f"gradient error {self.gradient_error:.2g}")
        lines = [f"Audit({', '.join(facts)})"]
        lines += [f"  fault: {sentence}" for sentence in self.faults]
        lines += [f"  note: {sentence}" for sentence in self.notes]
        return "\n".join(lines)


def audit(
    solve: Callable[[Callable[[Any], Any], Any], Any],
    fn: Callable[[Any], Any],
    z0: Any,
    *,
    claims: Literal["relative", "absolute"] = "relative",
) -> Audit:
    """Check a solver of any library on a batch of fixed-point problems z = fn(z).

    ``solve`` is called as ``solve(fn, z0)``, up to four times, with gradients on. Its claims are compared with
    evaluations of fn that it does not see:

    - the result is like z0 and finite, and z0 is unchanged;
    - the claimed relative residual is ||fn(z) - z|| / ||fn(z)|| of each sample, and not larger by a factor of 3;
    - the claimed number of evaluations is the number of calls;
    - plain iteration with as many evaluations is not better by a factor of 3, where the residual is at least 0.1;
    - nor by a factor of 100, where the solver has not met its tolerance: started from its result, it goes on;
    - a sample's result has the same bits if another sample starts somewhere else, if fn's result has, too;
    - gradients are those of the fixed point, for all tensors that require grad and that fn uses. They are compared with
      a solution of the adjoint system by GMRES.

    A residual that is large, and admitted, is not a fault. fn may draw the same random numbers at every call, but not
    different ones: this is noted, and what depends on it is not checked.

        audit = pydeq.audit(lambda f, z: torchdeq.solver.anderson_solver(f, z)[0], fn, torch.zeros(8, 64))
        assert not audit.faults, audit

    Args:
        solve: solve(fn, z0) -> z, or (z, claimed relative residual), or (z, claimed relative residual, claimed number
            of evaluations), or a :class:`pydeq.Solution`. z is like z0; a claim is a number, or one for each sample,
            shape (batch,).
        fn: fn(z) -> like z, with its context bound: ``lambda z: cell(z, x)``.
        z0: The initial state: a tensor (batch, *state), or several such tensors in a tuple, list, dict or namedtuple,
            see :func:`pydeq.fixed_point`.
        claims: The kind of residual that ``solve`` claims: "relative", or "absolute" for ||fn(z) - z||.

    Returns:
        The :class:`pydeq.diagnosis.Audit`, whose ``faults`` are sentences. Buffers of fn, such as running statistics,
        are as before.

    Raises:
        TypeError, ValueError: If an argument or a result of fn is of the wrong type or shape.
        Exception: Whatever ``solve`` raises for z0.

    Examples:
        >>> def solve(fn, z0):
        ...     return fn(z0), 1e-6
        >>> pydeq.audit(solve, torch.cos, torch.zeros(1)).faults
        ['the relative residual of sample 0 is 0.851 where the result is evaluated, but the claim is 1e-06']
    """
    for name, value in (("solve", solve), ("fn", fn)):
        if not callable(value):
            raise TypeError(f"{name} must be callable, got {type(value).__name__}")
    if claims not in ("relative", "absolute"):
        raise ValueError(f"claims must be 'relative' or 'absolute', got {claims!r}")
    adapter = Adapter(z0)
    subject = Subject(adapter.inside(fn), adapter.z0)
    with torch.enable_grad(), solve_scope(), buffers_restored(module_of(fn)):
        return _Auditor(solve, fn, z0, adapter, subject, claims).audit()


class _Result:
    """One call of the solver: its state as parts, and its claims."""

    def __init__(self, result: Any, adapter: Adapter) -> None:
        self.claimed: Any = None
        self.count: Any = None
        self.products = 0
        if isinstance(result, Solution):
            self.products = result.products
            result, self.claimed, self.count = result.value, result.relative_residual, result.nfe
        elif isinstance(result, tuple | list) and not _is_like(result, adapter.outside(adapter.z0)):
            if len(result) not in (2, 3):
                raise TypeError(
                    "solve must return z, (z, relative residual) or (z, relative residual, evaluations), got"
                    f" {type(result).__name__} of {len(result)}"
                )
            result, self.claimed, *count = result
            self.count = count[0] if count else None
        self.state: Any = result
        self.wrong = ""
        if adapter.structure is not None:
            try:
                self.state = adapter.structure.of_result(result)
            except (TypeError, ValueError) as error:
                self.wrong = str(error).replace("fn must return", "the result must be", 1)


class _Watched:
    """fn as the solver sees it. It counts its calls, and knows an iterate and an image again."""

    def __init__(self, fn: Callable[[Any], Any], adapter: Adapter) -> None:
        self.fn, self.adapter = fn, adapter
        self.entries = max(1, sum(part.numel() for part in as_tuple(adapter.z0)))
        self.calls = self.calls_with_gradients = 0
        self.states: list[tuple[Tensor, Tensor, Residual]] = []  # sums of z and of its image

    def __call__(self, z: Any) -> Any:
        self.calls += 1
        self.calls_with_gradients += torch.is_grad_enabled()
        image = self.fn(z)
        leaves = [leaf for leaf in tree_leaves(z) if isinstance(leaf, Tensor)]
        mapped = sum(unwrapped(leaf).numel() for leaf in leaves)
        if mapped > sum(leaf.numel() for leaf in leaves):  # under torch.vmap, over samples or over points
            self.calls += max(1, mapped // self.entries) - 1
            return image
        structure = self.adapter.structure
        with torch.no_grad():
            try:
                parts = [z if structure is None else structure.parts(z)]
                parts.append(image if structure is None else structure.of_result(image))
                layout = layout_of(parts[0])
                one, other = (flat(layout, state) for state in parts)
            except (TypeError, ValueError, RuntimeError):  # a state of the solver's own; it is only counted
                return image
            self.states.append((_fingerprint(one), _fingerprint(other), Residual.of(one, other)))
        return image

    def residuals_of(self, z: Tensor) -> list[Residual]:
        """The residuals of the evaluations whose iterate or image is z [B, D]."""
        key = _fingerprint(z)
        return [
            residual
            for one, other, residual in self.states
            if one.shape == key.shape and (torch.equal(one, key) or torch.equal(other, key))
        ]


class _WatchedModule(nn.Module):
    """The same for a module, so that solvers find its parameters."""

    def __init__(self, watched: _Watched, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = module.training
        self.__dict__["watched"] = watched

    def forward(self, z: Any) -> Any:
        return self.__dict__["watched"](z)


class _Auditor:
    """The state of one audit."""

    def __init__(
        self, solve: Callable[..., Any], fn: Any, z0: Any, adapter: Adapter, subject: Subject, claims: str
    ) -> None:
        self.solve, self.fn, self.z0, self.adapter, self.subject = solve, fn, z0, adapter, subject
        self.claims = claims
        self.found = Audit()

    def audit(self) -> Audit:
        found, subject = self.found, self.subject
        start = subject.start
        first, again = subject.image(start), subject.image(start)
        draws = not bool(same_bits(first, again).all())
        if draws:
            found.notes.append(
                "fn returns different values for the same z, so that it has no fixed point; bits and gradients were not"
                " compared"
            )
        watched = _Watched(self.fn, self.adapter)
        result = self._run(watched, self.z0)
        found.evaluations = watched.calls
        if not bool(same_bits(subject.start, start).all()):
            found.faults.append("the solver modified z0 in place")
            self._reset(start)
        if result.wrong:
            found.faults.append(result.wrong)
        if result.wrong or not self._is_sound(result.state, bool(first.isfinite().all())):
            return found
        z = flat(subject.layout, result.state)
        residual = subject.residual(z)
        found.residual = residual.relative
        self._check_claim(result, watched, z, residual)
        self._check_count(result, watched)
        found.plain_residual = subject.plain_residual(watched.calls)
        worse = (found.residual >= _NOTHING) & (_WORSE * found.plain_residual <= found.residual)
        if bool(worse.any()):
            i = int((found.residual / found.plain_residual).nan_to_num(0.0).mul(worse).argmax())
            found.faults.append(
                f"after {watched.calls} evaluations the relative residual of sample {i} is {found.residual[i]:.3g};"
                f" plain iteration reaches {found.plain_residual[i]:.3g} with as many"
            )
        elif not draws:
            self._check_unfinished(z, watched.calls)
        if draws or not z.numel():
            return found
        coupled = self._check_invariance(z, start)
        self._check_gradients(result.state, z, coupled)
        return found

    def _check_unfinished(self, z: Tensor, calls: int) -> None:
        """Look for a sample that plain iteration solves far better, and that has not met the solver's tolerance."""
        found, subject = self.found, self.subject
        assert found.residual is not None
        assert found.plain_residual is not None
        ratio = found.residual / (found.plain_residual + _ROUNDED * subject.eps)
        if not len(z) or not bool((ratio >= _FAR_WORSE).any()):
            return
        i = int(ratio.nan_to_num(0.0).argmax())
        # Where the other samples are solved already, the solver goes on only for this one.
        solved = self._refined(z, coupled=True)
        if solved is None:
            return
        start = solved.clone()
        start[i] = z[i]
        again = _Watched(self.fn, self.adapter)
        try:
            self._run(again, self.adapter.outside(subject.layout.view(start)))
        except Exception:  # whatever a library raises
            return
        if again.calls > max(_FEW, _STOPS * calls):
            found.faults.append(
                f"after {calls} evaluations the relative residual of sample {i} is {found.residual[i]:.3g}, and the"
                f" solver does not stop there; plain iteration reaches {found.plain_residual[i]:.3g} with as many"
            )

    def _run(self, watched: _Watched, z0: Any) -> _Result:
        fn = _WatchedModule(watched, self.fn) if isinstance(self.fn, nn.Module) else watched
        return _Result(self.solve(fn, z0), self.adapter)

    def _reset(self, start: Tensor) -> None:
        with torch.no_grad():
            parts = as_tuple(self.subject.layout.view(start))
            for part, value in zip(as_tuple(self.subject.z0), parts, strict=True):
                part.copy_(value)

    def _is_sound(self, state: Any, finite: bool) -> bool:
        """Whether the result is like z0 and finite."""
        faults, layout = self.found.faults, self.subject.layout
        parts = state if isinstance(state, tuple | list) else (state,)
        if not all(isinstance(part, Tensor) for part in parts) or isinstance(state, Tensor) is layout.is_tuple:
            faults.append(f"the result must be like z0, got {type(state).__name__}")
            return False
        parts = tuple(parts)
        expected = as_tuple(self.subject.z0)
        if len(parts) != len(expected):
            faults.append(f"the result must have {len(expected)} tensors like z0, got {len(parts)}")
            return False
        sound = True
        for part, like in zip(parts, expected, strict=True):
            for what in ("shape", "dtype", "device"):
                wanted, got = getattr(like, what), getattr(part, what)
                if wanted != got:
                    wanted, got = (tuple(wanted), tuple(got)) if what == "shape" else (wanted, got)
                    faults.append(f"the result must have the {what} of z0, {wanted}, got {got}")
                    sound = False
        if not sound:
            return False
        lost = ~flat(layout, parts if layout.is_tuple else parts[0]).isfinite().all(1)
        if bool(lost.any()):
            text = f"{int(lost.sum())} of {len(lost)} samples of the result are not finite"
            (faults if finite else self.found.notes).append(text + ("" if finite else ", like fn(z0)"))
            return False
        return True

    def _check_claim(self, result: _Result, watched: _Watched, z: Tensor, residual: Residual) -> None:
        if result.claimed is None:
            return
        found, batch = self.found, len(z)
        try:
            claimed = torch.as_tensor(result.claimed, dtype=torch.float64).detach().to(z.device)
        except (TypeError, ValueError, RuntimeError):
            found.faults.append(
                f"the claimed residual must be a number, or one for each sample, got {type(result.claimed).__name__}"
            )
            return
        if claimed.numel() == 1 and batch != 1:
            claimed = claimed.reshape(())
        elif claimed.numel() == batch:
            claimed = claimed.reshape(batch)
        else:
            found.faults.append(
                f"the claimed residual must be a number, or one for each of {batch} samples, got the shape"
                f" {tuple(claimed.shape)}"
            )
            return
        found.claimed = claimed
        others = watched.residuals_of(z)
        if not batch or self._is_true(claimed, others, residual):
            return
        true = self._of_kind(residual)
        exceeds = self._exceeds(true, claimed)
        i = int((true - claimed).where(exceeds, -torch.inf).argmax()) if bool(exceeds.any()) else int(true.argmax())
        claim = float(claimed if claimed.dim() == 0 else claimed[i])
        kind = self._other_kind(claimed, [residual, *others])
        if kind:
            found.faults.append(
                f"the claimed residual is {kind}, not the {self.claims} one of each sample: sample {i} has"
                f" {true[i]:.3g}, the claim is {claim:.3g}"
            )
        elif bool(exceeds.any()) or bool(claimed.isnan().any()):
            found.faults.append(
                f"the {self.claims} residual of sample {i} is {true[i]:.3g} where the result is evaluated, but the"
                f" claim is {claim:.3g}"
            )
        elif bool(self._exceeds(claimed, true).any()):
            found.notes.append("the result is better than the claimed residual says")

    def _of_kind(self, residual: Residual) -> Tensor:
        return residual.relative if self.claims == "relative" else residual.absolute

    def _exceeds(self, a: Tensor, b: Tensor) -> Tensor:
        """Which residuals a are larger than b by more than another norm or rounding explains."""
        return a > _FALSE_CLAIM * b + 8.0 * self.subject.eps

    def _is_true(self, claimed: Tensor, others: list[Residual], residual: Residual) -> bool:
        """Whether the claim is the residual of every sample, or of the worst one, and holds for the result."""
        if bool(self._exceeds(self._of_kind(residual), claimed).any()):
            return False
        values = [self._of_kind(one) for one in (residual, *others)]
        return any(bool(self._same(claimed, one if claimed.dim() else one.max()).all()) for one in values)

    def _other_kind(self, claimed: Tensor, residuals: list[Residual]) -> str:
        """What the claim is, where it is not the residual of each sample; "" if that is not known."""
        if bool((claimed * _SAME <= 8.0 * self.subject.eps).all()):
            return ""  # within rounding, all small residuals are equal
        for one in residuals:
            absolute, together = one.together
            names: dict[str, Any] = {
                "the relative one": one.relative if claimed.dim() else one.relative.max(),
                "the absolute one": one.absolute if claimed.dim() else one.absolute.max(),
                "the absolute one of the whole batch": absolute,
                "the relative one of the whole batch": together,
                "the mean relative one of the batch": one.relative.mean(),
                "the mean absolute one of the batch": one.absolute.mean(),
                "the relative one of the best sample": one.relative.min(),
                "the absolute one of the best sample": one.absolute.min(),
            }
            del names[f"the {self.claims} one"]
            for name, values in names.items():
                values = torch.as_tensor(values, dtype=torch.float64, device=claimed.device)
                if bool(self._same(claimed, values).all()):
                    return name
        return ""

    def _same(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs() <= _SAME * b.abs() + 8.0 * self.subject.eps

    def _check_count(self, result: _Result, watched: _Watched) -> None:
        if result.count is None:
            return
        try:
            count = float(result.count)
        except (TypeError, ValueError, RuntimeError):
            self.found.faults.append(
                f"the claimed number of evaluations must be a number, got {type(result.count).__name__}"
            )
            return
        calls = watched.calls
        # Products by differences are calls, too.
        if count not in (calls, calls - watched.calls_with_gradients, calls - result.products):
            self.found.faults.append(f"the solver says {count:g} evaluations, but called fn {watched.calls} times")

    def _check_invariance(self, z: Tensor, start: Tensor) -> bool:
        """Compare bits where one sample starts somewhere else; return whether fn couples samples."""
        found, subject = self.found, self.subject
        if len(z) < 2:
            found.notes.append("there is one sample, so whether results depend on the batch was not checked")
            return False
        generator = torch.Generator(z.device).manual_seed(0)
        scale = float(z.double().square().mean().sqrt()) or 1.0
        noise = torch.randn(z.shape[1], generator=generator, device=z.device, dtype=torch.float64)
        starts = (start[0].double() + 10.0 * scale * noise).to(z.dtype), z[0]
        for other in starts:
            moved, moved_start = z.clone(), start.clone()
            moved[0] = moved_start[0] = other
            # The last state of z, and the first.
            away = z.clone()
            away[0] = (z[0].double() + scale * noise).to(z.dtype)
            if bool((subject.moved_by_others(start, moved_start) | subject.moved_by_others(z, away)).any()):
                found.notes.append(
                    "the image of a sample depends on other samples, in fn itself or in its rounding errors, so that"
                    " results may depend on the batch"
                )
                return self._is_coupled(z, away)
        for other in starts:
            moved_start = start.clone()
            moved_start[0] = other
            given = self.adapter.outside(subject.layout.view(moved_start))
            try:
                result = self._run(_Watched(self.fn, self.adapter), given)
                there = flat(subject.layout, result.state)
            except Exception as error:  # whatever a library raises is its result
                found.faults.append(f"the solver raises if sample 0 starts somewhere else: {error!r}")
                return False
            changed = ~same_bits(z, there)[1:]
            if bool(changed.any()):
                number = int(changed.sum())
                difference = float((z - there)[1:][changed].double().abs().max())
                found.faults.append(
                    f"results vary with the batch: {number} of {len(changed)} samples change, by {difference:.2g}, if"
                    " another sample starts somewhere else, although their images under fn do not"
                )
                return False
        return False

    def _is_coupled(self, z: Tensor, moved: Tensor) -> bool:
        """Whether rounding does not explain how a sample's image depends on others."""
        difference = (self.subject.image(z) - self.subject.image(moved))[1:].double().abs()
        size = max(1.0, float(self.subject.image(z).double().abs().max()))
        return bool((difference > 100.0 * self.subject.eps * size).any())

    def _check_gradients(self, state: State, z: Tensor, coupled: bool) -> None:
        found, subject = self.found, self.subject
        at = subject.linearize(z)
        leaves = graph_leaves(at.y, at.z)
        if not leaves:
            found.notes.append("fn uses no tensor that requires grad, so gradients were not checked")
            return
        if not any(part.requires_grad for part in as_tuple(state)):
            found.notes.append("the result has no graph, so gradients were not checked")
            return
        generator = torch.Generator(z.device).manual_seed(1)
        v = torch.randn(z.shape, generator=generator, device=z.device, dtype=torch.float64).to(z.dtype)
        exact, left = self._exact(z, v, leaves, coupled)
        if left > _SAME:
            found.notes.append(
                f"the adjoint system was solved only to {left:.2g}, so gradients were not checked: it may be singular"
            )
            return
        # The gradient at a more exact fixed point, to know what the forward residual explains.
        nearer = self._refined(z, coupled)
        moved = exact
        if nearer is not None:
            moved, left = self._exact(nearer, v, leaves, coupled)
        elif float(self.found.residual.max()) > _SAME:  # pyright: ignore[reportOptionalMemberAccess]
            found.notes.append("the result is no fixed point, so gradients were not checked")
            return
        try:
            got = gradients(state, leaves, subject.layout.view(v))
        except Exception as error:  # whatever a library raises is its result
            found.faults.append(f"backward raises {error!r}")
            return
        self._compare(got, exact, moved, leaves, z, v)

    def _exact(self, z: Tensor, v: Tensor, leaves: list[Tensor], coupled: bool) -> tuple[list[Tensor], float]:
        at = self.subject.linearize(z)
        u, left = exact_cotangent(at, v, coupled)
        return gradients(_state(at.y, at.layout), leaves, at.layout.view(u)), left

    def _refined(self, z: Tensor, coupled: bool) -> Tensor | None:
        """A fixed point near z to nearly the precision of the dtype; None if none is found."""
        subject, shape = self.subject, (1, z.numel()) if coupled else z.shape
        rtol = max(1e-9, 100.0 * subject.eps)

        def fn(flat: Tensor) -> Tensor:
            return subject.image(flat.view(z.shape)).view(shape)

        for solver in (Broyden(), Anderson(memory=20)):
            solution = solve_flat(fn, z.view(shape), solver=solver, rtol=rtol, max_steps=200)
            value = solution.image
            assert isinstance(value, Tensor)
            if float(solution.relative_residual.max()) <= 100.0 * rtol:
                return value.view(z.shape)
        return None

    def _compare(
        self, got: list[Tensor], exact: list[Tensor], moved: list[Tensor], leaves: list[Tensor], z: Tensor, v: Tensor
    ) -> None:
        found, names = self.found, _names(leaves, module_of(self.fn))
        largest = max(_norm(e) for e in exact)
        if not largest:
            found.notes.append("the exact gradient is 0, so gradients were not checked")
            return
        bad, doubtful = [], []
        for name, g, e, m in zip(names, got, exact, moved, strict=True):
            size = max(_norm(e), _FLOOR * largest)
            error = min(_norm(g - e), _norm(g - m)) / size
            if not math.isfinite(_norm(g)):
                found.faults.append(f"the gradient of {name} is not finite")
                error = math.inf
            elif _norm(g) == 0.0 and _norm(e) > 1e-3 * largest:
                found.faults.append(f"{name} gets no gradient")
            else:
                explained = 2.0 * _norm(e - m) / size
                bad += [(error, name)] * (error > _GRADIENT + explained)
                doubtful += [(error, name)] * (error > _DOUBTFUL + explained)
            found.gradient_errors[name] = error
        if not doubtful:
            return
        kind = self._kind_of_gradient(got, leaves, z, v, exact)
        if bad or kind:
            wrong = doubtful if kind else bad
            error, name = max(wrong)
            number = f"{len(wrong)} of {len(leaves)} gradients are wrong"
            found.faults.append(f"{number}, {name} by {100 * error:.3g}% of its norm{kind}")

    def _kind_of_gradient(
        self, got: list[Tensor], leaves: list[Tensor], z: Tensor, v: Tensor, exact: list[Tensor]
    ) -> str:
        """Which other gradient it is; "" if that is not known."""
        close = min(2.0 * _SAME, 0.1 * _distance(got, exact))
        factor = _inner(got, exact) / _inner(exact, exact)
        if _distance(got, [factor * e for e in exact]) < close:
            return f": it is {factor:.3g} times the exact one"
        at = self.subject.linearize(z)
        u = v
        for steps in range(1, _PHANTOM_STEPS + 1):
            one = gradients(_state(at.y, at.layout), leaves, at.layout.view(u))
            if _distance(got, one) < close:
                if steps == 1:
                    return ": it is the gradient of one evaluation, which takes the Jacobian as 0"
                return f": it is the gradient of {steps} evaluations, a truncated (phantom) one"
            u = v + at.flat_vjp(u)
        return ""


def _state(parts: tuple[Tensor, ...], layout: Any) -> State:
    return parts if layout.is_tuple else parts[0]


def _fingerprint(z: Tensor) -> Tensor:
    """A number for each row of [B, D] by which it is known again."""
    wide = z.double()
    weights = torch.linspace(1.0, 2.0, z.shape[1], dtype=torch.float64, device=z.device)
    return (wide * weights).sum(1)


def _is_like(result: Any, z0: Any) -> bool:
    """Whether a tuple or list is a state like z0, and no pair of a state and a claim."""
    if isinstance(z0, Tensor):
        return False
    leaves, spec = tree_flatten(result)
    expected, wanted = tree_flatten(z0)
    if len(leaves) != len(expected) or not (spec == wanted or type(result) is not type(z0)):
        return False
    return all(isinstance(a, Tensor) and a.shape == b.shape for a, b in zip(leaves, expected, strict=True))


def _names(leaves: list[Tensor], module: nn.Module | None) -> list[str]:
    """A different name for each tensor."""
    known = {} if module is None else {id(x): name for name, x in module.named_parameters()}
    names: list[str] = []
    for i, leaf in enumerate(leaves):
        name = known.get(id(leaf)) or f"a tensor {tuple(leaf.shape)}"
        names.append(f"{name}, number {i}" if name in names else name)
    return names


def _norm(x: Tensor) -> float:
    return float(x.detach().to(torch.complex128 if x.is_complex() else torch.float64).norm())


def _inner(a: list[Tensor], b: list[Tensor]) -> float:
    """The real part of the inner product of two lists of tensors."""
    parts = ((x, y) for p, q in zip(a, b, strict=True) for x, y in zip(_real(p), _real(q), strict=True))
    return sum(float((x.double() * y.double()).sum()) for x, y in parts)


def _real(x: Tensor) -> tuple[Tensor, ...]:
    """The real and the imaginary part of a tensor, if it has one."""
    return (x.real, x.imag) if x.is_complex() else (x,)


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    """The distance of two lists of tensors over the norm of the second; inf if that is 0."""
    size = math.hypot(*(_norm(y) for y in b))
    return math.hypot(*(_norm(x - y) for x, y in zip(a, b, strict=True))) / size if size else math.inf
