"""What the graph of an evaluation was made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from pydeq.linearization import Linearization


def sources_of(at: Linearization, context: Sequence[Any], first_node: int) -> tuple[tuple[Tensor, ...], bool]:
    """What the graph of y was made from, beside z, and whether it also reaches results of other computations.

    Args:
        first_node: The number of the first node that belongs to the evaluation of y.
    """
    found = {id(x): x for x in tree_leaves(list(context)) if isinstance(x, Tensor) and x.requires_grad}
    known = {x.grad_fn for x in found.values()}
    state = {id(part) for part in at.z}
    found.update({id(x): x for x in at.y if x.requires_grad and x.is_leaf and id(x) not in state})
    hidden = False
    nodes = [part.grad_fn for part in at.y if part.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            if id(leaf) not in state:
                found[id(leaf)] = leaf
        elif node._sequence_nr() >= first_node or _casts_a_leaf(node):  # pyright: ignore
            new = [n for n, _ in node.next_functions if n is not None and n not in seen]
            seen.update(new)
            nodes.extend(new)
        elif node not in known:
            hidden = True
    return tuple(found.values()), hidden


def _casts_a_leaf(node: Any) -> bool:
    """Whether this is autocast's copy of a parameter, which may be from an earlier evaluation."""
    (source, _), *others = node.next_functions or ((None, 0),)
    return node.name() == "ToCopyBackward0" and not others and hasattr(source, "variable")
