"""States of any type: solvers see a tensor or a tuple of tensors, fn sees the user's type.

Inside the package a state is a real tensor, or a tuple of real tensors, its parts. Dicts, lists, namedtuples, other
types that are registered with torch's pytree, and complex tensors are converted to parts, and converted back for every
call of fn. Types may be nested.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from pydeq.state import State, as_tuple, layout_of


class Structure:
    """The type of a state: splits a state into parts, and makes a state from parts.

    Args:
        z0: A state of that type.

    Raises:
        TypeError: If it holds something that is not a tensor.
        ValueError: If it holds no tensor, or tensors that do not belong to one state.
    """

    def __init__(self, z0: Any) -> None:
        paths, self.spec = tree_flatten_with_path(z0)
        self.names = tuple(f"z0{keystr(path)}" for path, _ in paths)
        leaves = [leaf for _, leaf in paths]
        for name, leaf in zip(self.names, leaves, strict=True):
            _check_leaf(name, leaf)
        if not leaves:
            raise ValueError(f"z0 must have at least one tensor, got an empty {type(z0).__name__}")
        self.complex = tuple(leaf.is_complex() for leaf in leaves)
        self.dtypes = tuple(leaf.dtype for leaf in leaves)
        # A state that has the index of each part in the part's place.
        self.template = tree_unflatten(range(len(leaves)), self.spec)
        layout = layout_of(self._pack(leaves), self.names)
        self.shapes = layout.shapes

    def parts(self, z0: Any) -> State:
        """Split a state of this type into its real parts."""
        return self._pack(tree_flatten(z0)[0])

    def restore(self, state: State) -> Any:
        """Make a state of this type from its parts."""
        leaves = [
            torch.complex(*part.unbind(-1)) if is_complex else part
            for part, is_complex in zip(as_tuple(state), self.complex, strict=True)
        ]
        return tree_unflatten(leaves, self.spec)

    def of_result(self, result: Any) -> State:
        """The parts of a result of fn. The result may have a tuple in place of a list or a namedtuple.

        Raises:
            TypeError, ValueError: If the result has another type or shape, or is real instead of complex.
        """
        leaves: list[Any] = [None] * len(self.names)
        _collect(self.template, result, "z0", leaves)
        for name, leaf, dtype in zip(self.names, leaves, self.dtypes, strict=True):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"fn must return a tensor like {name}, got {type(leaf).__name__}")
            if dtype.is_complex != leaf.is_complex():
                raise ValueError(f"fn must return the dtype of {name}, {dtype}, got {leaf.dtype}")
        state = self._pack(leaves)
        for name, part, shape in zip(self.names, as_tuple(state), self.shapes, strict=True):
            if part.shape[1:] != shape:
                lacking = len(part.shape) > 1 and part.shape[2:] == shape
                hint = ": if it lacks the batch dimension, which comes first, give it one" if lacking else ""
                raise ValueError(
                    f"fn must return the shape of {name}, expected (batch, {', '.join(map(str, shape))}), got"
                    f" {tuple(part.shape)}{hint}"
                )
        return state

    def _pack(self, leaves: Sequence[Tensor]) -> State:
        parts = tuple(torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in leaves)
        return parts[0] if self.spec.is_leaf() else parts


def structure_of(z0: Any) -> Structure | None:
    """The type of a state; None for real tensors and tuples of them, which need no conversion."""
    if type(z0) is tuple and z0:
        return None if all(isinstance(part, Tensor) and not part.is_complex() for part in z0) else Structure(z0)
    if isinstance(z0, Tensor) and not z0.is_complex():
        return None
    return Structure(z0)


def _check_leaf(name: str, leaf: Any) -> None:
    if isinstance(leaf, Tensor):
        return
    advice = ""
    if hasattr(leaf, "__array__"):
        advice = ": convert it by torch.as_tensor"
    elif not isinstance(leaf, int | float | complex | str | bytes | None):
        advice = ": register a type of your own by torch.export.register_dataclass or with torch's pytree"
    if name == "z0":
        raise TypeError(
            f"z0 must be a tensor or tensors in tuples, lists, dicts and namedtuples, got {type(leaf).__name__}{advice}"
        )
    raise TypeError(f"{name} must be a tensor, got {type(leaf).__name__}{advice}")


def _collect(template: Any, got: Any, name: str, leaves: list[Any]) -> None:
    """Put the entries of ``got`` into ``leaves``, at the indices that ``template`` has in the same places."""
    if isinstance(template, int):
        leaves[template] = got
    elif isinstance(template, Mapping):
        if not isinstance(got, Mapping):
            raise TypeError(f"fn must return a {type(template).__name__} like {name}, got {type(got).__name__}")
        if got.keys() != template.keys():
            raise ValueError(f"fn must return the keys of {name}, {list(template)}, got {list(got)}")
        for key, part in template.items():
            _collect(part, got[key], f"{name}[{key!r}]", leaves)
    elif isinstance(template, tuple | list):
        kind = type(template).__name__
        if not isinstance(got, tuple | list):
            raise TypeError(f"fn must return a {kind} like {name}, got {type(got).__name__}")
        if len(got) != len(template):
            raise ValueError(f"fn must return a {kind} of {len(template)} like {name}, got {len(got)}")
        fields = getattr(template, "_fields", None)
        for i, (part, of) in enumerate(zip(template, got, strict=True)):
            _collect(part, of, f"{name}.{fields[i]}" if fields else f"{name}[{i}]", leaves)
    else:  # a registered type
        numbers, spec = tree_flatten(template)
        found, other = tree_flatten(got)
        if spec != other:
            raise TypeError(f"fn must return a {type(template).__name__} like {name}, got {type(got).__name__}")
        for number, leaf in zip(numbers, found, strict=True):
            leaves[number] = leaf
