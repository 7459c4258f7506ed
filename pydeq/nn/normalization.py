"""Weight norm and spectral norm, computed once per solve.

Both are parametrizations (``torch.nn.utils.parametrize``). Their names in checkpoints are the same as in torch's own.
``module.weight`` is the normalized weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from pydeq.arguments import check_integer
from pydeq.cell.scope import Scoped, active_scope, outside_inference_mode

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class _Norm(Scoped):
    """A parametrization whose value is kept in the scope."""

    def _normalized(self, *sources: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, *sources: Tensor) -> Tensor:
        scope = active_scope()
        if scope is None:
            return self._normalized(*sources)
        return scope.weight(self, sources, self._normalized)


class WeightNorm(_Norm):
    """w = g v / ||v||, the norm over all dimensions but ``dim``."""

    def __init__(self, dim: int | None) -> None:
        super().__init__()
        self.dim = dim

    def _norm(self, v: Tensor) -> Tensor:
        over = [dim for dim in range(v.dim()) if dim != self.dim]
        return torch.linalg.vector_norm(v, dim=over, keepdim=True, dtype=_wide(v))

    def _normalized(self, g: Tensor, v: Tensor) -> Tensor:
        return v * (g / self._norm(v)).to(v.dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        norm = self._norm(weight)
        if not weight.is_meta and bool((norm == 0).any()):
            raise ValueError(
                "weight must not be zero where its norm is taken"
                + ("" if self.dim is None else f", along each index of dim {self.dim}")
                + ": a direction of norm 0 cannot be normalized; initialize it differently, or do not normalize it"
            )
        return norm.to(weight.dtype), weight

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class SpectralNorm(_Norm):
    """w = bound v / sigma(v), or w = min(1, bound / sigma(v)) v; sigma comes from power iteration, once per solve."""

    def __init__(self, weight: Tensor, dim: int, bound: float, clip: bool, n_power_iterations: int, eps: float) -> None:
        super().__init__()
        self.dim, self.bound, self.clip, self.n_power_iterations, self.eps = dim, bound, clip, n_power_iterations, eps
        matrix = self._matrix(weight.detach())
        self._u: Tensor
        self._v: Tensor
        rows, columns = matrix.shape
        self.register_buffer("_u", functional.normalize(torch.randn_like(matrix[:, 0]).view(rows), dim=0, eps=eps))
        self.register_buffer("_v", functional.normalize(torch.randn_like(matrix[0]).view(columns), dim=0, eps=eps))
        self._iterate(matrix, 15)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.movedim(self.dim, 0).flatten(1).to(_wide(weight))

    @torch.no_grad()
    def _iterate(self, matrix: Tensor, steps: int) -> None:
        # In place, so that replicas and compiled graphs that hold the buffers see the change.
        u, v = self._u, self._v.to(matrix.dtype)
        for _ in range(steps):
            u = functional.normalize(matrix @ v, dim=0, eps=self.eps)
            v = functional.normalize(matrix.mT @ u, dim=0, eps=self.eps)
        self._u.copy_(u)
        self._v.copy_(v)

    def _directions(self, weight: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Left and right singular vectors, with their values from the first call in the solve."""
        scope = active_scope()
        kept = None if scope is None else scope.direction(self, weight)
        if kept is None:
            if self.training:
                self._iterate(matrix.detach(), self.n_power_iterations)
            with outside_inference_mode():
                kept = self._u.clone(), self._v.clone()  # the next solve changes the buffers
            if scope is not None:
                scope.keep_direction(self, weight, kept)
        return kept[0].to(matrix), kept[1].to(matrix)

    def _normalized(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            matrix = self._matrix(weight)
            u, v = self._directions(weight, matrix)
            factor = self.bound / torch.vdot(u, matrix @ v)
            return weight * (factor.clamp(max=1.0) if self.clip else factor).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def extra_repr(self) -> str:
        return f"dim={self.dim}, bound={self.bound}, clip={self.clip}, n_power_iterations={self.n_power_iterations}"


def weight_norm(module: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    """Replace a parameter by length times direction, w = g v / ||v||; computed once per solve.

    Like ``torch.nn.utils.parametrizations.weight_norm``. It also reads that function's checkpoints, and older
    checkpoints with ``<name>_g`` and ``<name>_v``. g starts as ||w||, v as w.

    Args:
        module: Module with the parameter.
        name: Name of the parameter.
        dim: The dimension that keeps its lengths: g has the size of w there and 1 elsewhere. None: one length.

    Returns:
        The module.

    Raises:
        ValueError: If there is no such parameter, it is normalized already, dim is out of range, or a direction of the
            parameter has length 0.

    Source: Salimans and Kingma, Weight Normalization, NeurIPS 2016.

    Examples:
        >>> layer = pydeq.nn.weight_norm(torch.nn.Linear(3, 2))
        >>> [name for name, _ in layer.named_parameters()]
        ['bias', 'parametrizations.weight.original0', 'parametrizations.weight.original1']
    """
    weight = _parameter(module, name)
    norm = WeightNorm(None if dim is None else _check_dim(dim, weight))
    return _register(module, name, norm, {"_g": "original0", "_v": "original1"}, "_g")


def spectral_norm(
    module: nn.Module,
    name: str = "weight",
    dim: int | None = None,
    *,
    bound: float = 1.0,
    clip: bool = False,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
) -> nn.Module:
    """Divide a parameter by its largest singular value, w = bound v / sigma(v); computed once per solve.

    sigma is the largest singular value of v as a matrix, with ``dim`` as rows and all other dimensions as columns,
    estimated by power iteration. In training mode each solve begins with ``n_power_iterations`` steps of it; outside of
    solves every access does. Evaluation mode takes no steps. With a bound below 1 and 1-Lipschitz activations, a cell
    of linear layers contracts, up to the error of the estimate. The norm of a k x k convolution with zero padding can
    be k times sigma: there, divide the bound by k. Like ``torch.nn.utils.parametrizations.spectral_norm``. It also
    reads that function's checkpoints, and older checkpoints with ``<name>_orig``.

    Args:
        module: Holds the parameter, of two dimensions at least.
        name: Name of the parameter.
        dim: The dimension of outputs; by default 0, and 1 for transposed convolutions.
        bound: The largest singular value of w, greater than 0.
        clip: Leave a parameter unchanged if its sigma is below the bound.
        n_power_iterations: Steps of power iteration per solve, at least 1.
        eps: Lower bound of the norms in the power iteration.

    Returns:
        The module.

    Raises:
        TypeError, ValueError: If there is no such parameter, it is normalized already, or an argument is out of range.

    Source: Miyato, Kataoka, Koyama and Yoshida, Spectral Normalization for GANs, ICLR 2018.

    Examples:
        >>> layer = pydeq.nn.spectral_norm(torch.nn.Linear(8, 8), bound=0.9)
        >>> bool(torch.linalg.matrix_norm(layer.weight, 2) < 1)
        True
    """
    weight = _parameter(module, name)
    if weight.dim() < 2:
        raise ValueError(f"{name} must have two dimensions or more, got shape {tuple(weight.shape)}")
    if not bound > 0:
        raise ValueError(f"bound must be greater than 0, got {bound}")
    n_power_iterations = check_integer("n_power_iterations", n_power_iterations, 1)
    dim = (1 if isinstance(module, _TRANSPOSED) else 0) if dim is None else _check_dim(dim, weight)
    norm = SpectralNorm(weight, dim, float(bound), bool(clip), n_power_iterations, eps)
    return _register(module, name, norm, {"_orig": "original", "_u": "0._u", "_v": "0._v"}, "_orig")


def apply_norm(
    model: nn.Module,
    norm: Literal["weight_norm", "spectral_norm"] = "weight_norm",
    names: str | Sequence[str] | None = None,
    filter: Callable[[str, nn.Module], bool] | None = None,
    **options: Any,
) -> list[str]:
    """Normalize the parameters of a whole model.

    Args:
        model: Its submodules, and itself, are looked through.
        norm: "weight_norm" or "spectral_norm".
        names: Names of the parameters. They are normalized in every module where they have at least two dimensions. By
            default "weight" of linear and convolutional layers.
        filter: filter(qualified name of the module, module) -> whether to take it.
        options: Options of :func:`weight_norm` or :func:`spectral_norm`. ``dim`` is by default 0, and 1 for transposed
            convolutions.

    Returns:
        The qualified names of the normalized parameters.

    Raises:
        TypeError, ValueError: If the norm is unknown, it does not take an option, or nothing was found to normalize.

    Examples:
        >>> cell = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh())
        >>> pydeq.nn.apply_norm(cell, "spectral_norm", bound=0.9)
        ['0.weight']
    """
    known = {"weight_norm": weight_norm, "spectral_norm": spectral_norm}
    if norm not in known:
        raise ValueError(f"norm must be 'weight_norm' or 'spectral_norm', got {norm!r}")
    wanted = ("weight",) if names is None else (names,) if isinstance(names, str) else tuple(names)
    found = []
    for prefix, module in list(model.named_modules()):
        if names is None and not isinstance(module, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)):
            continue
        if filter is not None and not filter(prefix, module):
            continue
        for name in wanted:
            parameter = module._parameters.get(name)
            if parameter is not None and parameter.dim() >= 2:
                default = {"dim": 1} if isinstance(module, _TRANSPOSED) else {}
                known[norm](module, name, **{**default, **options})
                found.append(f"{prefix}.{name}" if prefix else name)
    if not found:
        raise ValueError(f"model must have parameters to normalize, found none named {' or '.join(wanted)}")
    return found


def remove_norm(model: nn.Module) -> list[str]:
    """Replace the parameters normalized by :func:`weight_norm` or :func:`spectral_norm` by plain ones of equal value.

    Args:
        model: Its submodules, and itself, are looked through.

    Returns:
        The qualified names of the parameters.

    Examples:
        >>> cell = torch.nn.Sequential(pydeq.nn.weight_norm(torch.nn.Linear(8, 8)), torch.nn.Tanh())
        >>> pydeq.nn.remove_norm(cell)
        ['0.weight']
    """
    found = []
    for prefix, module in list(model.named_modules()):
        if not parametrize.is_parametrized(module):
            continue
        for name, chain in list(_parametrizations(module).items()):
            norms = [part for part in chain.children() if isinstance(part, _Norm)]
            if norms:
                for part in norms:
                    part.eval()  # removal evaluates once more, without a step of power iteration
                parametrize.remove_parametrizations(module, name)
                found.append(f"{prefix}.{name}" if prefix else name)
    return found


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _parametrizations(module: nn.Module) -> nn.ModuleDict:
    found = module.parametrizations
    assert isinstance(found, nn.ModuleDict)
    return found


def _parameter(module: nn.Module, name: str) -> Tensor:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if parametrize.is_parametrized(module, name) and any(
        isinstance(part, _Norm) for part in _parametrizations(module)[name].children()
    ):
        raise ValueError(f"{name} of {type(module).__name__} is normalized already")
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        has = ", ".join(parameter for parameter, _ in module.named_parameters(recurse=False)) or "none"
        raise ValueError(f"name must be that of a parameter of {type(module).__name__} (it has: {has}), got {name!r}")
    return weight


def _check_dim(dim: int, weight: Tensor) -> int:
    dim = check_integer("dim", dim)
    if not -weight.dim() <= dim < weight.dim():
        raise ValueError(f"dim must be a dimension of the parameter's shape {tuple(weight.shape)}, got {dim}")
    return dim % weight.dim()


def _register(module: nn.Module, name: str, norm: _Norm, old_names: dict[str, str], telling: str) -> nn.Module:
    """Parametrize a module so that it can be pickled and reads older checkpoints.

    Args:
        old_names: Ending of the key in an older checkpoint -> where the tensor is now.
        telling: The ending of a key by which an older checkpoint is recognized.
    """
    parametrize.register_parametrization(module, name, norm, unsafe=True)
    type(module).__reduce_ex__ = _reduce
    hook = functools.partial(_load_old_names, name=name, kind=type(norm), names=old_names, telling=telling)
    module.register_load_state_dict_pre_hook(hook)
    return module


def _load_old_names(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    *_: Any,
    name: str,
    kind: type,
    names: dict[str, str],
    telling: str,
) -> None:
    if f"{prefix}{name}{telling}" not in state_dict or not parametrize.is_parametrized(module, name):
        return
    if isinstance(_parametrizations(module)[name][0], kind):  # pyright: ignore[reportIndexIssue]
        for ending, now in names.items():
            key = f"{prefix}{name}{ending}"
            if key in state_dict:
                state_dict[f"{prefix}parametrizations.{name}.{now}"] = state_dict.pop(key)


def _reduce(module: nn.Module, protocol: object) -> tuple[Any, ...]:
    """Pickle a parametrized module: its class is made at run time, so unpickling makes it again."""
    base = parametrize.type_before_parametrizations(module)
    return _rebuild, (base, tuple(_parametrizations(module))), module.__dict__


def _rebuild(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """Make an empty module of the parametrized class; unpickling fills it."""
    module = base.__new__(base)
    nn.Module.__init__(module)
    for name in names:
        module.register_buffer(name, torch.empty(0))
        parametrize.register_parametrization(module, name, nn.Identity(), unsafe=True)
    type(module).__reduce_ex__ = _reduce
    return module
