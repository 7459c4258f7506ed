"""Norms, attention and GLU in plain operations, with correct derivatives of any order and in any mode.

In torch, some derivatives of these operators are wrong or missing. The derivatives of layer norm and of batch
statistics treat saved values as constants. They are silently wrong if differentiated twice more, or once more after
forward mode (pytorch#175754, #196699, #196700). Fused attention has no second derivative (pytorch#116350). GLU's
forward-mode derivative has no derivative. Inside :func:`any_order`, plain operations replace these operators. Values
are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import batch_norm, glu, instance_norm, layer_norm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


def layer_norm_composed(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """``torch.nn.functional.layer_norm``."""
    y = _standardized(input, range(input.dim() - len(normalized_shape), input.dim()), eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(input.dtype)


def batch_norm_composed(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.batch_norm``; running statistics are read, and not updated."""
    if not training:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return _scaled(_standardized(input, [0, *range(2, input.dim())], eps), weight, bias).to(input.dtype)


def instance_norm_composed(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.instance_norm``; running statistics are read, and not updated."""
    if not use_input_stats:
        return instance_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return _scaled(_standardized(input, range(2, input.dim()), eps), weight, bias).to(input.dtype)


def glu_composed(input: Tensor, dim: int = -1) -> Tensor:
    """``torch.nn.functional.glu``, whose forward-mode derivative torch cannot differentiate."""
    value, gate = input.chunk(2, dim)
    return value * gate.sigmoid()


def _standardized(x: Tensor, dims: Sequence[int], eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over these dimensions, at least in float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    centered = x - x.mean(list(dims), keepdim=True)
    return centered * (centered.square().mean(list(dims), keepdim=True) + eps).rsqrt()


def _scaled(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = (-1, *[1] * (y.dim() - 2))
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def _with_flag(composed: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Accept and ignore the C++ function's last argument, ``cudnn_enabled``."""

    def call(*args: Any, cudnn_enabled: bool = True, **kwargs: Any) -> Tensor:
        return composed(*args[:8], **kwargs)

    return call


_COMPOSED: dict[Any, Callable[..., Tensor]] = {
    layer_norm: layer_norm_composed,
    torch.layer_norm: lambda *args, cudnn_enable=True, **kwargs: layer_norm_composed(*args, **kwargs),
    batch_norm: batch_norm_composed,
    torch.batch_norm: _with_flag(batch_norm_composed),
    instance_norm: instance_norm_composed,
    torch.instance_norm: _with_flag(instance_norm_composed),
    glu: glu_composed,
}


class _Composed(TorchFunctionMode):
    """Replace calls of norms, also those in modules of ``torch.nn``, by plain operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call: Callable[..., Any] = _COMPOSED.get(func) or func
        return call(*args, **(kwargs or {}))


@contextmanager
def any_order() -> Iterator[None]:
    """Context manager for evaluations that are differentiated more than twice, or again after forward mode."""
    with composed_norms(), sdpa_kernel(SDPBackend.MATH):  # pyright: ignore
        yield


def composed_norms() -> TorchFunctionMode:
    """Like :func:`any_order`, but only for norms: fused attention raises where it cannot be differentiated."""
    return _Composed()


_NORMS = {"native_layer_norm": "layer norm"} | dict.fromkeys(
    (
        "native_batch_norm",
        "_native_batch_norm_legit",
        "_batch_norm_with_update",
        "cudnn_batch_norm",
        "miopen_batch_norm",
    ),
    "batch or instance norm",
)
# The forward-mode derivative of this operator treats the factors of the matrix as constants.
_NORMS["_linalg_solve_ex"] = "torch.linalg.solve"


class RefuseNorms(TorchDispatchMode):
    """Raise at the end if an operator ran that has wrong higher derivatives in torch, for example in TorchScript.

    Raises:
        RuntimeError: If such an operator ran.
    """

    norm: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        norm = _NORMS.get(func._schema.name.removeprefix("aten::"))
        if norm is not None and (norm == "layer norm" or _argument(func, "training", args, kwargs)):
            self.norm = norm
        return func(*args, **kwargs)

    def __exit__(self, kind: Any, error: Any, at: Any) -> None:
        super().__exit__(kind, error, at)
        if error is None and self.norm is not None:
            if self.norm == "torch.linalg.solve":
                raise RuntimeError(
                    "a gradient of torch.linalg.solve's forward-mode derivative is needed, which torch has wrong: use"
                    " mode='vjp' or 'difference'"
                )
            raise RuntimeError(
                f"a derivative of {self.norm} is needed that torch has wrong (pytorch#175754, #196699, #196700), and fn"
                " calls it where pydeq cannot put plain operations in its place, like TorchScript: use mode='vjp' or"
                " 'difference'"
            )


def _argument(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    names = [argument.name for argument in func._schema.arguments]
    if name in kwargs or name not in names:
        return kwargs.get(name, True)
    return args[names.index(name)]
