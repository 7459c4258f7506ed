"""What the graph of an evaluation was made from, and whether it still is what it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pydeq.adjoints.explicit import Explicit
from pydeq.cell.linearization import Linearization
from pydeq.cell.scope import Scoped


def sources_of(
    at: Linearization, explicit: Explicit, first_node: int, tensors: Sequence[Tensor] | None = None
) -> tuple[tuple[Tensor, ...], bool]:
    """What the graph of y was made from, next to z, and whether it also reaches results of other computations.

    Args:
        explicit: Which tensors are known: those of the context are always among the result where they require grad.
        first_node: The number of the first node that belongs to the evaluation of y.
        tensors: Where the evaluation had others in the place of ``explicit.tensors``.
    """
    tensors = explicit.tensors if tensors is None else tensors
    context, held = tensors[: explicit.given], tensors[explicit.given :]
    found = {id(x): x for x in context if x.requires_grad}
    state = {id(part) for part in at.z}
    found.update({id(x): x for x in at.y if x.requires_grad and x.is_leaf and id(x) not in state})
    leaves, edges = borders_of(at, first_node)
    found.update({id(x): x for x in leaves if id(x) not in state})
    known = {edge_of(x): x for x in held if x.grad_fn is not None}
    found.update({id(known[edge]): known[edge] for edge in edges if edge in known})
    known_edges = {edge_of(x) for x in context if x.grad_fn is not None} | known.keys()
    return tuple(found.values()), not edges <= known_edges


def edge_of(x: Tensor) -> tuple[Any, int]:
    """Where the gradient of a computed tensor goes; results of one operation (chunk) differ by their numbers."""
    return x.grad_fn, x.output_nr


def borders_of(at: Linearization, first_node: int) -> tuple[list[Tensor], set[tuple[Any, int]]]:
    """Where the graph of y ends: leaves, and edges to nodes from before ``first_node``."""
    leaves: list[Tensor] = []
    borders: set[tuple[Any, int]] = set()
    edges = [edge_of(part) for part in at.y if part.grad_fn is not None]
    seen = set(edges)
    while edges:
        edge = edges.pop()
        node = edge[0]
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves.append(leaf)
        elif node._sequence_nr() >= first_node or _casts_a_leaf(node):  # pyright: ignore
            new = [(n, i) for n, i in node.next_functions if n is not None and (n, i) not in seen]
            seen.update(new)
            edges.extend(new)
        else:
            borders.add(edge)
    return leaves, borders


def _casts_a_leaf(node: Any) -> bool:
    """Whether this is autocast's copy of a parameter, which may be from an earlier evaluation."""
    (source, _), *others = node.next_functions or ((None, 0),)
    return node.name() == "ToCopyBackward0" and not others and hasattr(source, "variable")


@contextmanager
def hooks_postponed(sources: Sequence[Tensor]) -> Iterator[None]:
    """Inside, no hook of these tensors runs where their gradients are formed: it does where autograd is handed them."""
    postponed = [(hooks, list(hooks.items())) for x in sources if (hooks := x._backward_hooks)]
    for hooks, _ in postponed:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, items in postponed:
            hooks.update(items)


class Watched:
    """What must stay as it is until fn is evaluated again: tensors, and whether the parts of a module train.

    Args:
        tensors: Not to be modified in place.
        module: Not to be put into another mode.
    """

    def __init__(self, tensors: Sequence[Tensor], module: nn.Module | None = None) -> None:
        # Tensors of inference mode count no versions.
        self._known = [(x, x._version) for x in tensors if not x.is_inference()]
        self._modes = [] if module is None else [(part, part.training) for part in module.modules()]

    def check(self, why: str) -> None:
        """Raise where something was changed since it is watched.

        Args:
            why: Why that matters, for the message.

        Raises:
            RuntimeError: If so.
        """
        if any(x._version != version for x, version in self._known):
            raise RuntimeError(
                "a parameter, a buffer or a tensor of the context was modified in place between forward and backward,"
                f" but {why}: differentiate first, or modify a copy"
            )
        for part, training in self._modes:
            if part.training != training:
                forward, now = ("train", "eval") if training else ("eval", "train")
                raise RuntimeError(
                    f"{type(part).__name__} was in {forward} mode in forward and is in {now} mode in backward, but"
                    f" {why}: differentiate before the mode is changed"
                )

    def with_tensors(self, tensors: Sequence[Tensor]) -> Watched:
        """Of what is watched, what was not modified so far, and these tensors."""
        unchanged = [x for x, version in self._known if x._version == version]
        later = Watched([*tensors, *unchanged])
        later._modes = self._modes
        return later


def held(module: nn.Module | None, context: Sequence[Any]) -> list[Tensor]:
    """What an evaluation may read: the tensors of the context, and parameters and buffers of the module.

    Without those of modules in whose place the scope of a solve remembers: they may change.
    """
    found = {id(x): x for x in tree_leaves(list(context)) if isinstance(x, Tensor)}
    for part in module.modules() if module is not None else ():
        if not isinstance(part, Scoped):
            for holder in (part._parameters, part._buffers):
                # TorchScript's containers have items only.
                found.update({id(x): x for _, x in holder.items() if x is not None})
    return list(found.values())
