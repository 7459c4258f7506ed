"""Products with the Jacobian of fn, from one evaluation with gradients on."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore  # recognizes transformed tensors
from torch.autograd.graph import _engine_run_backward
from torch.utils._pytree import tree_map_only

from pydeq.cell.torch_compile import allow_reuse, reusable_graphs
from pydeq.state import Layout, State, as_tuple, layout_of


@dataclass(frozen=True)
class Linearization:
    """One evaluation y = fn(z, *context) with its graph.

    It forms products with J = dy/dz from either side, and never J itself.

    Args:
        layout: The shapes of z and y.
        z: The parts of the point; leaves that require grad.
        y: The parts of the image. They have a graph if they depend on z, parameters or context.
        first_node: The number of the first node that belongs to the evaluation.
    """

    layout: Layout
    z: tuple[Tensor, ...]
    y: tuple[Tensor, ...]
    first_node: int = 0

    def vjp(self, v: State, create_graph: bool = False) -> tuple[Tensor | None, ...]:
        """v^T J by parts, with None for parts of z that y does not depend on. The graph is kept."""
        outputs, seeds = self.y, as_tuple(v)
        if len(outputs) == 1 and type(v) is Tensor and not create_graph and outputs[0].requires_grad:
            # torch.autograd.grad without its checks of seeds: they take half the time of a small product.
            return _engine_run_backward(outputs, seeds, True, False, self.z, True, accumulate_grad=False)
        pairs = [(part, seed) for part, seed in zip(outputs, seeds, strict=True) if part.requires_grad]
        if not pairs:
            return (None,) * len(self.z)
        outputs, seeds = zip(*pairs, strict=True)
        return torch.autograd.grad(
            outputs, self.z, seeds, retain_graph=True, create_graph=create_graph, allow_unused=True
        )

    def flat_vjp(self, v: Tensor, create_graph: bool = False) -> Tensor:
        """v^T J for v [B, D], as [B, D]; zero where y does not depend on z."""
        return self._flat(self.vjp(self.layout.view(v), create_graph))

    def flat_vjps(self, v: Tensor, create_graph: bool = False) -> Tensor:
        """v_k^T J for v [K, B, D], as [K, B, D], by vectorized products."""

        def batched(v: Tensor) -> Tensor:
            pairs = [(y, part) for y, part in zip(self.y, self._parts(v), strict=True) if y.requires_grad]
            if not pairs:
                return torch.zeros_like(v)
            outputs, seeds = zip(*pairs, strict=True)
            products = torch.autograd.grad(
                outputs,
                self.z,
                seeds,
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
                is_grads_batched=True,
            )
            return self._flat(products, len(v))

        return vectorize(batched, lambda v: self.flat_vjp(v, create_graph), v, self._at_once(v))

    def flat_jvps(self, v: Tensor, create_graph: bool = False) -> Tensor:
        """J v_k for v [K, B, D], as [K, B, D], by vectorized products.

        Uses neither forward mode nor an evaluation of fn: J v is the derivative of u^T J v by u. Costs K + 1 products.
        """
        u, used = self._transposed()
        if not used:
            return torch.zeros_like(v)

        def product(v: Sequence[Tensor], batched: bool) -> Tensor:
            (result,) = torch.autograd.grad(
                list(used.values()),
                u,
                [v[i] for i in used],
                retain_graph=True,
                create_graph=create_graph,
                is_grads_batched=batched,
            )
            return result

        return vectorize(
            lambda v: product(self._parts(v), True),
            lambda v: product(as_tuple(self.layout.view(v)), False),
            v,
            self._at_once(v),
        )

    def right_products(self) -> Callable[[Tensor], Tensor]:
        """The map v -> J v for v [B, D], without a graph: :meth:`flat_jvps` one by one, with its first product once."""
        u, used = self._transposed()

        def product(v: Tensor) -> Tensor:
            if not used:
                return torch.zeros_like(v)
            parts = as_tuple(self.layout.view(v))
            seeds = [parts[i] for i in used]
            return torch.autograd.grad(list(used.values()), u, seeds, retain_graph=True)[0]

        return product

    def _transposed(self) -> tuple[Tensor, dict[int, Tensor]]:
        """u [B, D], and the parts of u^T J that depend on it, by their numbers, with a graph."""
        u = torch.zeros(self.layout.batch, self.layout.size, dtype=self.layout.dtype, device=self.layout.device)
        u.requires_grad_()
        with torch.enable_grad():
            g = self.vjp(self.layout.view(u), create_graph=True)
        return u, {i: part for i, part in enumerate(g) if part is not None and part.requires_grad}

    def reaches_z(self) -> bool:
        """Whether a part of z is in the graph of y: it is not if fn computes y with gradients off."""
        return any(getattr(node, "variable", None) is part for node in self._nodes for part in self.z)

    def has_functions(self) -> bool:
        """Whether the graph of y has a node of a ``torch.autograd.Function``, such as that of compiled code."""
        return any(hasattr(node, "_forward_cls") for node in self._nodes)

    def _at_once(self, v: Tensor) -> int:
        """The number of the K vectors to take in one product.

        On a GPU, all of them. On a CPU, an operator is fast if its input, the previous operator's result, is still in
        the cache. More vectors at once save only the reads of weights and the sums of their gradients. This pays only
        if the weights are much larger than a state.
        """
        if v.device.type != "cpu" or v.numel() == 0:
            return max(1, len(v))
        each = v[0].numel() * v.element_size()
        if each * len(v) <= CACHED_BYTES:
            return len(v)
        return max(1, min(len(v), max(CACHED_BYTES, self._leaf_bytes() // 2) // each))

    def _leaf_bytes(self) -> int:
        """The size of the leaves of the graph of y, without z."""
        leaves: dict[int, int] = {}
        for node in self._nodes:
            leaf = getattr(node, "variable", None)
            if leaf is not None and all(leaf is not part for part in self.z):
                leaves[id(leaf)] = leaf.numel() * leaf.element_size()
        return sum(leaves.values())

    @functools.cached_property
    def _nodes(self) -> list[Any]:
        """The nodes of the graph of y, each once."""
        nodes: list[Any] = list(dict.fromkeys(part.grad_fn for part in self.y if part.grad_fn is not None))
        seen = set(nodes)
        for node in nodes:  # which grows
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    nodes.append(following)
        return nodes

    def _parts(self, v: Tensor) -> tuple[Tensor, ...]:
        """[K, B, D] -> its parts, [K, B, *shape] each."""
        parts = v.split(self.layout.sizes, dim=2)
        return tuple(part.reshape(*v.shape[:2], *shape) for part, shape in zip(parts, self.layout.shapes, strict=True))

    def _flat(self, products: Sequence[Tensor | None], *probes: int) -> Tensor:
        """Products by parts, None for zero, as contiguous [*probes, B, D]."""
        shape = (*probes, self.layout.batch)
        parts = [
            (z.new_zeros(()).expand(*probes, *z.shape) if p is None else p).reshape(*shape, size)
            for p, z, size in zip(products, self.z, self.layout.sizes, strict=True)
        ]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=-1)


def vectorize(
    batched: Callable[[Tensor], Tensor], single: Callable[[Tensor], Tensor], v: Tensor, at_once: int | None = None
) -> Tensor:
    """Stack single(v[k]) for all k, computed by ``batched``, or one by one if an operator does not vectorize.

    Args:
        at_once: The number of vectors in one call of ``batched``; all by default.
    """
    if v.numel() == 0:
        return torch.zeros_like(v)
    if len(v) == 1:
        return single(v[0])[None]
    if at_once == 1:
        return torch.stack([single(one) for one in v])
    try:
        if at_once is None or at_once >= len(v):
            return batched(v)
        return torch.cat([batched(some) for some in v.split(at_once)])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        products = torch.stack([single(one) for one in v])  # an error of fn itself is raised here
        _warn_once(str(error).split("\n", 1)[0])
        return products


def unwrapped(x: Tensor) -> Tensor:
    """The tensor in the wrappers of torch.func's transforms, with all elements that ``torch.vmap`` maps over."""
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x


# On a CPU: the largest result of an operator in a vectorized product, a part of a core's cache. Measured: eight
# products of a transformer's block took 112 ms at once and 91 ms one by one with states of 256 kB, 12 ms and 15 ms
# with states of 32 kB.
CACHED_BYTES = 256 * 1024

_warned: set[str] = set()


def _warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"products with the Jacobian are formed one by one, since an operator in fn does not vectorize: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )


def linearize(fn: Callable[..., Any], z: State, context: Sequence[Any]) -> Linearization:
    """Evaluate ``fn`` at ``z``, taken as a constant, with gradients on.

    Raises:
        TypeError, ValueError: If fn does not return a state like z.
    """
    if torch.is_inference_mode_enabled() or any(part.is_inference() for part in as_tuple(z)):
        with torch.inference_mode(False):
            z, context = tree_map_only(Tensor, recordable, (z, tuple(context)))
            return _linearize(fn, z, context)
    return _linearize(fn, z, context)


def _linearize(fn: Callable[..., Any], z: State, context: Sequence[Any]) -> Linearization:
    layout = layout_of(z)
    cast = torch.is_autocast_enabled(layout.device.type)
    with torch.enable_grad(), reusable_graphs():
        leaves = tuple(part.detach().requires_grad_() for part in as_tuple(z))
        first_node = torch.autograd._get_sequence_nr()  # pyright: ignore
        y = fn(leaves if layout.is_tuple else leaves[0], *context)
        y = as_tuple(layout.check(y, cast, detach=False))
    allow_reuse(y)
    return Linearization(layout, leaves, y, first_node)


def recordable(x: Tensor) -> Tensor:
    """Copy a tensor that was made in inference mode, which a graph cannot hold."""
    return x.clone() if x.is_inference() else x
