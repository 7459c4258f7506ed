"""Fixed-point processes, one evaluation of f at a time, for loops that stop and count by other packages' rules.

A process calls f at its iterate z, measures the residual g = f(z) - z of every sample, and moves on. The loop that
drives it decides when to stop and which state to return.

:class:`Stepped` takes pydeq's own steps, by the same operations as :func:`pydeq.fixed_point`. The other processes are
in plain torch: they reproduce methods of the originals that pydeq does not have, and options that pydeq's operations
lack.
"""

from __future__ import annotations

import functools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pydeq.compat.warning import warn_of_modification
from pydeq.ops.constants import RUNNING, Counter, Progress, Scalar, Status
from pydeq.ops.termination import Rules
from pydeq.solvers import Anderson, Broyden, Solver
from pydeq.solvers.base import empty

# Armijo's condition and the shortest step of the line search, as in both originals.
_DECREASE, _SHORTEST = 1e-4, 1e-2
_RUNNING_COLUMN, _RESIDUAL, _BEST = int(Progress.RUNNING), int(Scalar.RESIDUAL), int(Scalar.BEST)
_LARGEST = sys.float_info.max
# The default lam of both originals, 1e-4, becomes pydeq's default ridge, 1e-6 of the diagonal.
_RIDGE_PER_LAM = 1e-2


@functools.cache
def _rules(dtype: torch.dtype) -> Rules:
    """Rules that iterate every sample until it diverges or is lost; the caller decides when to stop."""
    return Rules(rtol=0.0, atol=0.0, eps=torch.finfo(dtype).eps, freeze=False, stall=False)


class Process(ABC):
    """A solve, one evaluation of f at a time.

    Args:
        func: f, on tensors of x0's shape. Its result is reshaped and cast to x0's shape and dtype.
        x0: Where to start, [B, ...]; 0-d and 1-d tensors are batches of scalars.

    Attributes:
        z, f: The iterate evaluated last and its image, [B, D].
        calls: Calls of f so far.
    """

    z: Tensor
    f: Tensor

    def __init__(self, func: Callable[..., Any], x0: Tensor) -> None:
        self.func, self.shape = func, x0.shape
        self.flat = flat = flatten(x0.detach()).contiguous()
        self.flat_shape, self.dtype = flat.shape, x0.dtype
        self.calls = 0

    @abstractmethod
    def advance(self) -> np.ndarray:
        """Evaluate f once more and measure; a new array, float64 [B, len(Scalar)].

        Its columns RESIDUAL and NORM hold ||f(z) - z|| and ||f(z)||; residuals are inf where f is not finite. BEST is
        the smallest residual so far, for :class:`Stepped` only. The other columns have no meaning here.
        """

    @property
    def damped(self) -> Tensor:
        """(1 - damping) z + damping f(z), [B, D]."""
        return self.f

    @property
    def hopeless(self) -> np.ndarray | None:
        """Samples that are given up, bool [B]; None if there are none."""
        return None

    def call(self, z: Tensor, view: Tensor) -> Tensor:
        """Evaluate f at z; [B, D]. ``view`` is z in the shape of x0."""
        self.calls += 1
        return self.result(self.func(view))

    def result(self, image: Tensor) -> Tensor:
        """Convert the result of f to contiguous [B, D] in x0's dtype."""
        f = image if image.shape == self.flat_shape else image.reshape(self.flat_shape)
        if f.dtype != self.dtype:  # autocast
            f = f.to(self.dtype)
        if f.requires_grad:
            f = f.detach()
        return f if f.is_contiguous() else f.contiguous()


class Stepped(Process):
    """The steps of one of pydeq's solvers.

    f gets a view of the solver's memory. If a call modifies its argument or keeps a reference to it, f gets copies from
    that call on.

    Args:
        func, x0: As in :class:`Process`.
        solver: One of pydeq's solvers.
        evaluations: Maximum number of calls of f, at least 1.
        damping: The solver's damping; for :attr:`damped`.
    """

    def __init__(
        self, func: Callable[..., Any], x0: Tensor, solver: Solver, evaluations: int, damping: float = 1.0
    ) -> None:
        super().__init__(func, x0)
        # The last step of a workspace replaces the newest iterate by the best one, so no step here is the last.
        self.workspace = workspace = solver.start(self.flat, _rules(x0.dtype), evaluations + 1)
        self.damping = damping
        self.step = workspace.step
        self._look_at_buffers()
        self.copies = False
        # Views of the memory that a step writes, if it is on the CPU.
        on_cpu = x0.device.type == "cpu"
        self.scalars = workspace.scalars.numpy() if on_cpu else None
        self.counters = workspace.counters.numpy() if on_cpu else None
        self.progress = workspace.progress.numpy()
        self.batch = len(self.flat)
        # Tensors made in inference mode do not count their versions.
        self.watch = not torch.is_inference_mode_enabled()
        self.k = 0

    def advance(self) -> np.ndarray:
        k = self.k
        parity = k % 2
        z, view = self.buffers[parity], self.views[parity]
        if self.copies:
            f = self.call(z, view.clone())
        else:
            version = z._version if self.watch else 0
            references = sys.getrefcount(view), storage_references(self.storage)
            f = self.call(z, view)
            if self.watch and z._version != version:
                f = self._after_modification(z, view, f)
            elif (sys.getrefcount(view), storage_references(self.storage)) != references:
                self._leave_buffers()
                z = self.buffers[parity]
        self.step(f, k)
        self.z, self.f, self.k = z, f, k + 1
        scalars = self.scalars
        self.newest = self.workspace.scalars.cpu().numpy() if scalars is None else scalars.copy()
        return self.newest

    def _look_at_buffers(self) -> None:
        self.buffers = self.workspace.z
        self.views = [z.view(self.shape) for z in self.buffers]
        self.storage = self.buffers[0].untyped_storage()._cdata

    def _leave_buffers(self) -> None:
        """Leave the memory of the iterates to f, which keeps a reference to it, and give f copies from now on."""
        both = torch.stack(self.workspace.z)
        self.workspace.z = (both[0], both[1])
        self._look_at_buffers()
        self.copies = True

    def _after_modification(self, z: Tensor, view: Tensor, f: Tensor) -> Tensor:
        """Return the image of z, [B, D], after f has modified z; f gets copies from now on."""
        warn_of_modification()
        self.copies = True
        if self.k == 0:
            f = f.clone()  # it may be z itself
            z.copy_(self.flat)
            return f
        return self.call(z, view.clone())  # the iterate is lost: continue from the modified one

    @property
    def damped(self) -> Tensor:
        return self.f if self.damping == 1.0 else torch.lerp(self.z, self.f, self.damping)

    @property
    def hopeless(self) -> np.ndarray | None:
        if self.progress[_RUNNING_COLUMN] == self.batch:
            return None
        status = self._counters(Counter.STATUS)
        return (status != RUNNING) & (status != Status.CONVERGED)

    def best(self, state: str) -> Tensor:
        """For each sample the iterate with the smallest residual so far, its image, or their mixture; a new tensor [B,
        D].

        x0 if f was never finite.

        Args:
            state: "z", "f" or "damped".
        """
        row = self.newest
        lowest = row[:, _BEST]
        if np.count_nonzero(row[:, _RESIDUAL] <= np.minimum(lowest, _LARGEST)) == self.batch:  # the newest one
            found = self.z if state == "z" else self.f if state == "f" else self.damped
            return found if found is not self.z and found is not self.f else found.clone()
        fresh = self._counters(Counter.FRESH) == 1  # best, and not copied to ``best`` before another evaluation
        value, image = self.workspace.best
        if state != "f":
            value = torch.where(column(fresh, value), self.z, value)
        if state != "z":
            image = torch.where(column(fresh, image), self.f, image)
        damped = state == "damped" and self.damping != 1.0
        found = value if state == "z" else torch.lerp(value, image, self.damping) if damped else image
        lost = np.isinf(lowest)
        return torch.where(column(lost, found), self.flat, found) if lost.any() else found

    def _counters(self, which: Counter) -> np.ndarray:
        """One column of the counters, int32 [B]."""
        return self.workspace.counters[:, which].cpu().numpy() if self.counters is None else self.counters[:, which]


class _Plain(Process):
    """Base class of methods in plain torch."""

    def __init__(self, func: Callable[..., Any], x0: Tensor) -> None:
        super().__init__(func, x0)
        self.x = self.flat.clone()

    def evaluate(self, x: Tensor) -> Tensor:
        return self.call(x, x.view(self.shape))

    @staticmethod
    def measured(residual: Tensor, image: Tensor) -> np.ndarray:
        """Norms of the rows, as ``advance`` returns them."""
        both = torch.stack([norms(residual), norms(image)]).double().cpu().numpy()
        both[0, ~np.isfinite(both).all(0)] = np.inf
        scalars = np.zeros((both.shape[1], len(Scalar)))
        scalars[:, [Scalar.RESIDUAL, Scalar.NORM]] = both.T
        return scalars


class Damped(_Plain):
    """x' = tau f(x) + (1 - tau) x for any tau.

    Args:
        func, x0: As in :class:`Process`.
        tau: Damping, or relaxation above 1.
        scaled: Measure x' - x, which is tau (f(x) - x), relative to x', as torchdeq does.
    """

    def __init__(self, func: Callable[..., Any], x0: Tensor, tau: float, scaled: bool) -> None:
        super().__init__(func, x0)
        self.tau, self.scaled = tau, scaled

    def advance(self) -> np.ndarray:
        self.z = self.x
        self.f = self.evaluate(self.z)
        self.x = self.tau * self.f + (1 - self.tau) * self.z
        image = self.x if self.scaled else self.f
        return self.measured(image - self.z, image)

    @property
    def damped(self) -> Tensor:
        return self.x


class AbsoluteRidgeAnderson(_Plain):
    """Anderson mixing with an absolute ridge, by the bordered system of both originals.

    With G the residuals of the last columns,

        [ 0     1^T        ] [ mu ]   [ 1 ]
        [ 1   G G^T + lam I ] [ a  ] = [ 0 ],    x' = tau sum a_j f(x_j) + (1 - tau) sum a_j x_j

    If a sample's system cannot be solved, this sample takes a plain step.

    Args:
        func, x0: As in :class:`Process`.
        m: Columns, at least 1.
        lam: Ridge, in units of the squared residual.
        tau: Damping.
    """

    def __init__(self, func: Callable[..., Any], x0: Tensor, m: int, lam: float, tau: float) -> None:
        super().__init__(func, x0)
        if m < 1:
            raise ValueError(f"m must be at least 1, got {m}")
        self.m, self.lam, self.tau = m, lam, tau
        batch, dim = self.flat.shape
        self.X, self.F = empty(self.flat, batch, m, dim), empty(self.flat, batch, m, dim)
        self.k = 0

    def advance(self) -> np.ndarray:
        k, m = self.k, self.m
        if k == 1:  # the first two evaluations are plain iteration
            self.x = self.F[:, 0].clone()
        elif k > 1:
            self.x = self._mix(min(k, m))
        slot = k % m
        self.z = self.X[:, slot] = self.x
        self.f = self.F[:, slot] = self.evaluate(self.x)
        self.k = k + 1
        return self.measured(self.f - self.z, self.f)

    def _mix(self, n: int) -> Tensor:
        X, F = self.X[:, :n], self.F[:, :n]
        # Half types have no dense solver.
        G = (F - X).to(torch.promote_types(self.dtype, torch.float32))
        H = G.new_ones(len(G), n + 1, n + 1)
        H[:, 0, 0] = 0
        H[:, 1:, 1:] = torch.bmm(G, G.transpose(1, 2)) + self.lam * torch.eye(n, dtype=G.dtype, device=G.device)
        right = G.new_zeros(len(G), n + 1, 1)
        right[:, 0] = 1
        solution, failed = torch.linalg.solve_ex(H, right)
        a = solution[:, 1:, 0]
        plain = torch.zeros_like(a)
        plain[:, (self.k - 1) % self.m] = 1
        sound = (failed == 0) & a.isfinite().all(1)
        a = torch.where(sound[:, None], a, plain).to(self.dtype)[:, None]
        return self.tau * (a @ F)[:, 0] + (1 - self.tau) * (a @ X)[:, 0]


class LowRankBroyden(_Plain):
    """Good Broyden on g(x) = f(x) - x, with the inverse Jacobian -I + U V^T, as in both originals.

        x' = x + s d,   d = -(-I + U V^T) g(x)
        v^T = dx^T (-I + U V^T),   u = (dx - (-I + U V^T) dg) / (v^T dg)

    Args:
        func, x0: As in :class:`Process`.
        memory: Pairs (u, v) kept; a full memory overwrites the oldest one.
        search: None for s = 1; "batch" chooses one s for the whole batch, as the originals do, "sample" one for each
            sample.
    """

    def __init__(self, func: Callable[..., Any], x0: Tensor, memory: int, search: str | None) -> None:
        super().__init__(func, x0)
        if memory < 1:
            raise ValueError(f"LBFGS_thres must be at least 1, got {memory}")
        batch, dim = self.flat.shape
        self.memory, self.search = memory, search
        self.U, self.V = self.flat.new_empty(batch, dim, memory), self.flat.new_empty(batch, memory, dim)
        self.k = 0

    def advance(self) -> np.ndarray:
        if self.k == 0:
            g = self.evaluate(self.x) - self.x
            self.update = g
        else:
            if self.search is None:
                x = self.x + self.update
                g = self.evaluate(x) - x
            else:
                x, g = self._line_search()
            self._learn(x - self.x, g - self.g)
            used = min(self.k, self.memory)
            self.update = g - self.U[:, :, :used].bmm(self.V[:, :used].bmm(g[:, :, None]))[:, :, 0]
            self.x = x
        self.g, self.z, self.f = g, self.x, g + self.x
        self.k += 1
        return self.measured(g, self.f)

    def _learn(self, dx: Tensor, dg: Tensor) -> None:
        used = min(self.k - 1, self.memory)
        U, V = self.U[:, :, :used], self.V[:, :used]
        v = -dx + dx[:, None].bmm(U).bmm(V)[:, 0]
        u = dx + dg - U.bmm(V.bmm(dg[:, :, None]))[:, :, 0]
        u = u / (v * dg).sum(1, keepdim=True)
        slot = (self.k - 1) % self.memory
        # A denominator near 0 would spoil every later step.
        self.V[:, slot], self.U[:, :, slot] = v.nan_to_num(0.0, 0.0, 0.0), u.nan_to_num(0.0, 0.0, 0.0)

    def _line_search(self) -> tuple[Tensor, Tensor]:
        """The next iterate and its residual, by Armijo's rule with quadratic and cubic interpolation."""
        wide = torch.float64
        whole = self.search == "batch"

        def measure(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x = self.x + s.to(self.dtype)[:, None] * self.update
            g = self.evaluate(x) - x
            return x, g, square(g)

        def square(g: Tensor) -> Tensor:
            squares = g.to(wide).square().sum(1)
            squares = squares.sum().expand(len(g)) if whole else squares
            return squares.nan_to_num(torch.inf, torch.inf)

        def enough(s: Tensor, phi: Tensor) -> Tensor:
            return phi <= (1 - _DECREASE * s) * phi0

        phi0 = square(self.g)
        s0 = torch.ones_like(phi0)
        x, g, p0 = measure(s0)
        done = enough(s0, p0)
        if bool(done.all()):
            return x, g
        # A full step also ends a search that fails, unless f is not finite there.
        lost = ~p0.isfinite()
        least = p0.clone()

        def take(new_x: Tensor, new_g: Tensor, rows: Tensor) -> None:
            nonlocal x, g
            x, g = torch.where(rows[:, None], new_x, x), torch.where(rows[:, None], new_g, g)

        def rescue(new_x: Tensor, new_g: Tensor, phi: Tensor) -> None:
            nonlocal least
            better = lost & ~done & (phi < least)
            take(new_x, new_g, better)
            least = torch.where(better, phi, least)

        # The minimizer of the parabola that has the value and the slope (assumed to be -phi0) at 0, and the value at 1.
        s1 = phi0 / 2 / p0
        s1 = torch.where(lost, torch.full_like(s1, 0.0 if whole else 0.5), s1)
        new_x, new_g, p1 = measure(torch.where(done, s0, s1))
        if not whole:
            rescue(new_x, new_g, p1)
        # As in the originals, it is used only in the cubic interpolation that follows.
        searching = ~done & (s1 > _SHORTEST)
        while bool(searching.any()):
            scale = s0**2 * s1**2 * (s1 - s0)
            e1, e0 = p1 - phi0 + phi0 * s1, p0 - phi0 + phi0 * s0
            a = (s0**2 * e1 - s1**2 * e0) / scale
            b = (s1**3 * e0 - s0**3 * e1) / scale
            s2 = (-b + (b**2 + 3 * a * phi0).abs().sqrt()) / (3 * a)
            s2 = torch.where(s2.isfinite(), s2, s1 / 2)
            new_x, new_g, p2 = measure(torch.where(searching, s2, 0.0))
            found = searching & enough(s2, p2)
            take(new_x, new_g, found)
            done = done | found
            if not whole:
                rescue(new_x, new_g, torch.where(searching, p2, torch.inf))
            shorter = ((s1 - s2) > s1 / 2) | (1 - s2 / s1 < 0.96)
            s2 = torch.where(shorter, s1 / 2, s2)
            s0, s1, p0, p1 = s1, s2, p1, p2
            searching = searching & ~found & (s1 > _SHORTEST)
        return x, g


def anderson_process(
    func: Callable[..., Any], x0: Tensor, m: int, lam: float, tau: float, evaluations: int, legacy: bool
) -> Process:
    """Make Anderson mixing: pydeq's, or the originals' in legacy mode and for damping outside of (0, 1]."""
    if legacy or not 0.0 < tau <= 1.0:
        return AbsoluteRidgeAnderson(func, x0, m, lam, tau)
    solver = Anderson(memory=m, damping=tau, ridge=_RIDGE_PER_LAM * lam)
    process = Stepped(func, x0, solver, evaluations, tau)
    if tau != 1.0:
        _begin_undamped(process, tau)
    return process


def _begin_undamped(process: Stepped, tau: float) -> None:
    """Make f(x0) the first step, as in the originals: tau damps only mixed steps."""
    workspace = process.workspace
    workspace.damping = 1.0

    def first(f: Tensor, k: int) -> None:
        workspace.step(f, k)
        workspace.damping, process.step = tau, workspace.step

    process.step = first


def broyden_process(
    func: Callable[..., Any], x0: Tensor, memory: int, ls: bool, evaluations: int, legacy: bool
) -> Process:
    """Make Broyden's method: pydeq's, or the originals' in legacy mode and with a line search."""
    if legacy or ls:
        return LowRankBroyden(func, x0, memory, search=("batch" if legacy else "sample") if ls else None)
    return Stepped(func, x0, Broyden(memory=memory), evaluations)


def storage_references(storage: int) -> int:
    """Count the tensors that hold a storage, given by its ``_cdata``."""
    return torch._C._storage_Use_Count(storage)  # pyright: ignore


def flatten(x: Tensor) -> Tensor:
    """[B, ...] -> [B, D]; every element of a 0-d or 1-d tensor is a sample."""
    return x.flatten(1) if x.dim() >= 2 else x.reshape(x.numel(), 1)


def column(mask: np.ndarray, like: Tensor) -> Tensor:
    """Turn a mask of samples, bool [B], into [B, 1] on the device of ``like``."""
    return torch.from_numpy(mask).to(like.device)[:, None]


def norms(x: Tensor) -> Tensor:
    """Norms of the rows, at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).norm(dim=1)
