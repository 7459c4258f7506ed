"""The inputs of an evaluation's graph: leaves, and results of other computations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pydeq.adjoints.explicit import Explicit
from pydeq.cell.linearization import Linearization


def graph_inputs(
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
    leaves, edges = graph_ends(at, first_node)
    found.update({id(x): x for x in leaves if id(x) not in state})
    known = {edge_of(x): x for x in held if x.grad_fn is not None}
    found.update({id(known[edge]): known[edge] for edge in edges if edge in known})
    known_edges = {edge_of(x) for x in context if x.grad_fn is not None} | known.keys()
    return tuple(found.values()), not edges <= known_edges


def edge_of(x: Tensor) -> tuple[Any, int]:
    """Where the gradient of a computed tensor goes; results of one operation (chunk) differ by their numbers."""
    return x.grad_fn, x.output_nr


def graph_ends(at: Linearization, first_node: int) -> tuple[list[Tensor], set[tuple[Any, int]]]:
    """Where the graph of y ends: leaves, and edges to nodes from before ``first_node``."""
    leaves: list[Tensor] = []
    edges_out: set[tuple[Any, int]] = set()
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
            edges_out.add(edge)
    return leaves, edges_out


def _casts_a_leaf(node: Any) -> bool:
    """Whether this is autocast's copy of a parameter, which may be from an earlier evaluation."""
    (source, _), *others = node.next_functions or ((None, 0),)
    return node.name() == "ToCopyBackward0" and not others and hasattr(source, "variable")
