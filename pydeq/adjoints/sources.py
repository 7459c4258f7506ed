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
