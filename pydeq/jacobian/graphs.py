"""Checks of the graph of an evaluation: whether second derivatives exist, and whether third derivatives are correct."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pydeq.cell.linearization import Linearization

# For each set of node kinds in a graph: the reason why there is no second derivative, or None. Custom C++ functions
# share one node type, and differ by name.
_verdicts: dict[frozenset[tuple[type, str]], str | None] = {}
_KEPT = 256

_FROM_STATISTICS = frozenset(
    f"{name}Backward0" for name in ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "BatchNormWithUpdate")
)


def nodes_of(y: Sequence[Tensor], first_node: int) -> list[Any]:
    """The nodes of the graph of y, from number ``first_node`` on."""
    nodes = [part.grad_fn for part in y if part.grad_fn is not None]
    seen = set(nodes)
    found: list[Any] = []
    while nodes:
        node: Any = nodes.pop()
        if node._sequence_nr() < first_node:
            continue
        found.append(node)
        new = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= new
        nodes.extend(new)
    return found


def nodes_to(z: Sequence[Tensor], nodes: Sequence[Any]) -> list[Any]:
    """The nodes that lie on a path to one of the leaves z.

    Products with the Jacobian go through these nodes. The gradient of a penalty differentiates only these nodes twice.
    """
    above: dict[Any, list[Any]] = {}
    for node in nodes:
        for below, _ in node.next_functions:
            above.setdefault(below, []).append(node)
    found = {node for node in nodes if any(getattr(node, "variable", None) is part for part in z)}
    waiting = list(found)
    while waiting:
        new = {node for node in above.get(waiting.pop(), ()) if node not in found}
        found |= new
        waiting.extend(new)
    return [node for node in nodes if node in found]


def is_compiled_graph(nodes: Sequence[Any]) -> bool:
    """Whether torch.compile made one of the nodes."""
    return any(node.name() == "CompiledFunctionBackward" for node in nodes)


def wrong_third_derivative(nodes: Sequence[Any]) -> str | None:
    """The operator whose third derivative is wrong in torch, without an error; None if there is none.

    It is wrong for layer norm, and for norms that use statistics of a batch or an instance, such as batch norm with
    ``training=True`` (pytorch#175754, #196699, #196700). Group norm and norms that use running statistics are correct.
    """
    for node in nodes:
        name = node.name()
        if name == "NativeLayerNormBackward0":
            return "layer norm"
        if name in _FROM_STATISTICS and getattr(node, "_saved_training", True):
            return "batch or instance norm"
    return None


def no_second_derivative(at: Linearization, nodes: Sequence[Any]) -> str | None:
    """The reason why the graph of ``at`` cannot be differentiated twice; None if it can.

    Nodes that do not depend on z, such as nodes of context, are differentiated only once and do not count. The first
    graph of each kind is differentiated twice as a test, which does not change the gradients of parameters. The test is
    needed: operators raise an error only if they are differentiated twice, and functions with a backward pass that
    leaves no graph raise no error.
    """
    if any(getattr(n, "_forward_cls", int).__module__.startswith("torch.distributed.fsdp") for n in nodes):
        return "FSDP2 frees parameters after each backward pass"
    nodes = nodes_to(at.z, nodes)
    if not nodes:
        return None
    kind = frozenset((type(node), node.name()) for node in nodes)
    try:
        return _verdicts[kind]
    except KeyError:
        verdict = _try(at, nodes)
        if len(_verdicts) >= _KEPT:
            _verdicts.clear()
        _verdicts[kind] = verdict
        return verdict


def _try(at: Linearization, nodes: Sequence[Any]) -> str | None:
    functions = [node for node in nodes if hasattr(node, "_forward_cls")]
    once = next((n for n in functions if is_once_differentiable(n._forward_cls)), None)
    if once is not None:
        return f"the backward pass of {once._forward_cls.__name__} is marked with once_differentiable"
    silent: list[str] = []
    seeds = tuple(torch.ones_like(part, requires_grad=True) for part in at.y)
    handles = [node.register_hook(_Recorded(node, silent)) for node in functions]
    try:
        with torch.enable_grad():
            products = [p for p in at.vjp(seeds, create_graph=True) if p is not None and p.requires_grad]
            if silent or not products:
                return silent[0] if silent else None
            total = torch.stack([p.square().sum() for p in products]).sum()
            torch.autograd.grad(total, [*at.z, *seeds], retain_graph=True, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        at.vjp(tuple(seed.detach() for seed in seeds))  # raises errors that have nothing to do with second derivatives
        return str(error).split("\n", 1)[0] or type(error).__name__
    finally:
        for handle in handles:
            handle.remove()
    return silent[0] if silent else None


class _Recorded:
    """A hook that records a Function if its backward pass gets tensors with a graph and returns some without one."""

    def __init__(self, node: Any, silent: list[str]) -> None:
        self.name, self.silent = node._forward_cls.__name__, silent

    def __call__(self, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None]) -> None:
        followed = any(x is not None and x.requires_grad for x in outputs)
        if followed and any(x is not None and not x.requires_grad for x in inputs):
            self.silent.append(f"the backward pass of {self.name} leaves no graph")


_ONCE = once_differentiable(lambda ctx: None).__code__


def is_once_differentiable(function: Any) -> bool:
    """Whether the backward pass of an autograd.Function is marked with once_differentiable."""
    backward = function.backward
    while backward is not None:
        if getattr(backward, "__code__", None) is _ONCE:
            return True
        backward = getattr(backward, "__wrapped__", None)  # for example by torch.amp.custom_bwd
    return False


def advice(reason: str) -> str:
    """Advice on how to get second derivatives, given the ``reason`` why there are none."""
    if "scaled_dot_product" in reason or "attention" in reason:
        return (
            "for exact derivatives call the layer, or fn, inside"
            " torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), which takes more memory"
        )
    if "torch.compile" in reason:
        return (
            "for exact derivatives do not compile parts of the cell; if the whole cell is compiled, a layer's penalty"
            " with mode='vjp' evaluates it without the compiler"
        )
    if "FSDP2" in reason:
        return "for exact derivatives use pydeq.jacobian_penalty with mode='jvp'"
    return "for exact derivatives write it in operations that can be differentiated twice"
