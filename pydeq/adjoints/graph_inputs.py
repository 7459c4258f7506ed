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
    """Find the inputs of the graph of y, without z, and whether it also has inputs that other computations made.

    Args:
        explicit: The known tensors. Those of the context that require grad are always inputs.
        first_node: The number of the first node that belongs to the evaluation of y.
        tensors: The tensors that the evaluation used in place of ``explicit.tensors``, if it did.
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
    """The edge of a computed tensor's gradient: the tensor's node, and its index among the node's results."""
    return x.grad_fn, x.output_nr


def graph_ends(at: Linearization, first_node: int) -> tuple[list[Tensor], set[tuple[Any, int]]]:
    """Find the ends of the graph of y: leaves, and edges to nodes from before ``first_node``."""
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
    """Whether the node is autocast's cast of a parameter, which may be from an earlier evaluation."""
    (source, _), *others = node.next_functions or ((None, 0),)
    return node.name() == "ToCopyBackward0" and not others and hasattr(source, "variable")
