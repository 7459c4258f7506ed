"""What the graph of an evaluation was made from, and whether it still is what it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pydeq.linearization import Linearization
from pydeq.nn.scope import Scoped


def sources_of(at: Linearization, context: Sequence[Any], first_node: int) -> tuple[tuple[Tensor, ...], bool]:
    """What the graph of y was made from, beside z, and whether it also reaches results of other computations.

    Args:
        first_node: The number of the first node that belongs to the evaluation of y.
    """
    found = {id(x): x for x in tree_leaves(list(context)) if isinstance(x, Tensor) and x.requires_grad}
    known = {(x.grad_fn, x.output_nr) for x in found.values()}
    state = {id(part) for part in at.z}
    found.update({id(x): x for x in at.y if x.requires_grad and x.is_leaf and id(x) not in state})
    hidden = False
    # Edges, since results of one operation (chunk) are told apart by them alone.
    edges = [(part.grad_fn, part.output_nr) for part in at.y if part.grad_fn is not None]
    seen = set(edges)
    while edges:
        edge = edges.pop()
        node = edge[0]
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            if id(leaf) not in state:
                found[id(leaf)] = leaf
        elif node._sequence_nr() >= first_node or _casts_a_leaf(node):  # pyright: ignore
            new = [(n, i) for n, i in node.next_functions if n is not None and (n, i) not in seen]
            seen.update(new)
            edges.extend(new)
        elif edge not in known:
            hidden = True
    return tuple(found.values()), hidden


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
    """Tensors that must not be modified in place until fn is evaluated with them again."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # Tensors of inference mode count no versions.
        self._known = [(x, x._version) for x in tensors if not x.is_inference()]

    def check(self, why: str) -> None:
        """Raise where one was modified since it is watched.

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

    def unchanged(self) -> list[Tensor]:
        """Those that were not."""
        return [x for x, version in self._known if x._version == version]


def held(module: nn.Module | None, context: Sequence[Any]) -> list[Tensor]:
    """What an evaluation may read: the tensors of the context, and parameters and buffers of the module.

    Without those of modules in whose place the scope of a solve remembers: they may change.
    """
    found = {id(x): x for x in tree_leaves(list(context)) if isinstance(x, Tensor)}
    for part in module.modules() if module is not None else ():
        if not isinstance(part, Scoped):
            found.update({id(x): x for x in (part._parameters | part._buffers).values() if x is not None})
    return list(found.values())
