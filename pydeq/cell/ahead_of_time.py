"""A map compiled ahead of time by torch's AOTInductor, to be called by C++.

All tensors that the map uses are inputs of the compiled code: the state, the context, and what torch.export found in
the map itself, such as parameters. So the code holds no copies, and sees later changes of their values.
"""

from __future__ import annotations

import ctypes
import tempfile
import warnings
import weakref
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from pydeq.cell.prepared import module_of
from pydeq.state import Layout

# torch's numbers of its dtypes, which do not change.
_NUMBERS = {
    torch.uint8: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.int64: 4, torch.float16: 5, torch.float32: 6,
    torch.float64: 7, torch.complex64: 9, torch.complex128: 10, torch.bool: 11, torch.bfloat16: 15,
}  # fmt: skip
# The threads of torch at the call, not those at compilation.
_OPTIONS = {"cpp.dynamic_threads": True}


class AheadOfTimeMap:
    """fn(z, *context) for flat states z [B, D], compiled for these shapes.

    Args:
        fn: The map, of states of this layout.
        cell: The user's callable in ``fn``, whose parameters are looked for.
        layout: Of the states.
        context: Passed on after z; other values are read from each solve's context.

    Attributes:
        run: The address of the C function that evaluates the map.
        model: Its first argument.
        inputs: Descriptions of the inputs: dimensions, sizes, strides, and torch's number of the dtype.

    Raises:
        RuntimeError: If torch cannot export or compile the map.
        ValueError: If the map draws random numbers, or writes to tensors that it does not return.
    """

    def __init__(self, fn: Callable[..., Any], cell: Any, layout: Layout, context: Sequence[Any]) -> None:
        leaves, self._spec = tree_flatten(tuple(context))
        self._fixed = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]  # what is not a tensor
        self._flat = len(leaves) == len(context) and all(isinstance(entry, Tensor) for entry in context)
        flat = torch.zeros(layout.batch, layout.size, dtype=layout.dtype, device=layout.device)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        root = _Flat(fn, cell, layout, self._spec, self._fixed)
        program = _export(root, (flat, *map(_plain, tensors)))
        given = iter(range(1 + len(tensors)))
        self._own: list[Callable[[], Tensor]] = []  # the tensors that the map itself holds
        self._order: list[int] = []  # for each input its place among z, the context's tensors and the map's own
        for spec in program.graph_signature.input_specs:
            if spec.kind.name == "USER_INPUT":
                self._order.append(next(given))
                continue
            self._order.append(1 + len(tensors) + len(self._own))
            self._own.append(_finder(root, program, spec))
        first = self._order.index(0)  # the loop has z as the first input
        self._order.insert(0, self._order.pop(first))
        self._examples = [(tuple(t.shape), t.dtype) for t in tensors]
        self._own_examples = [(tuple(t.shape), t.dtype) for t in (find() for find in self._own)]
        inputs = [flat, *map(_plain, tensors), *(_plain(find()) for find in self._own)]
        _check(program)
        self._load(_compiled(program.graph_module, [inputs[i] for i in self._order], first))
        self.inputs = [_describe(inputs[i]) for i in self._order]

    def tensors(self, z: Tensor, context: Sequence[Any]) -> list[Tensor]:
        """The inputs of the compiled map for a state [B, D] and a context.

        Raises:
            ValueError: If the context differs from the one that the map was compiled for in more than values.
        """
        tensors = []
        if self._flat and len(context) == len(self._fixed):
            leaves = context
        else:
            leaves, spec = tree_flatten(tuple(context))
            if spec != self._spec:
                raise ValueError(f"the context must be as at compilation, {_shown(self._spec)}, got {_shown(spec)}")
        for leaf, fixed in zip(leaves, self._fixed, strict=True):
            if fixed is None:
                tensors.append(leaf)
            elif isinstance(leaf, Tensor) or leaf != fixed[0]:
                raise ValueError(f"the context had {fixed[0]!r} at compilation, got {leaf!r}: compile for it")
        for tensor, (shape, dtype) in zip(tensors, self._examples, strict=True):
            if not isinstance(tensor, Tensor) or tensor.shape != shape or tensor.dtype is not dtype:
                raise ValueError(f"the context had a tensor of {dtype} {shape} at compilation, got {_got(tensor)}")
        found = [_plain(tensor) for tensor in (z, *tensors, *[find() for find in self._own])]
        for tensor, (shape, dtype) in zip(found[1 + len(tensors) :], self._own_examples, strict=True):
            if tensor.shape != shape or tensor.dtype is not dtype:
                raise ValueError(f"fn had a tensor of {dtype} {shape} at compilation, got {_got(tensor)}")
        return [found[i] for i in self._order]

    def error(self) -> str:
        """Why the last evaluation failed, as far as torch tells."""
        text = ctypes.c_char_p()
        last = getattr(self._library, "AOTInductorGetLastError", None)  # not in torch 2.11
        if last is not None:
            last(ctypes.byref(text))
        reason = (text.value or b"torch has printed why").decode()
        if "proxy_executor" in reason:
            return "AOTInductor has no C function for an operator in it, as for those of torch.linalg"
        return reason

    def _load(self, library: ctypes.CDLL) -> None:
        self._library = library
        model = ctypes.c_void_p()
        if library.AOTInductorModelContainerCreateWithDevice(ctypes.byref(model), ctypes.c_size_t(1), b"cpu", None):
            raise RuntimeError(f"the compiled map does not load: {self.error()}")
        self.model = model.value
        self.run = ctypes.cast(library.AOTInductorModelContainerRun, ctypes.c_void_p).value
        weakref.finalize(self, library.AOTInductorModelContainerDelete, model).atexit = False


class _Flat(nn.Module):
    """The map of flat states, with the tensors of its context as arguments."""

    fn: Callable[..., Any]

    def __init__(
        self, fn: Callable[..., Any], cell: Any, layout: Layout, spec: Any, fixed: Sequence[tuple[Any] | None]
    ) -> None:
        super().__init__()
        self.__dict__["fn"] = fn  # not a submodule: that is ``cell``
        self.cell = module_of(cell)
        self.layout, self.spec, self.fixed = layout, spec, fixed

    def forward(self, flat: Tensor, *tensors: Tensor) -> Tensor:
        layout, rest = self.layout, iter(tensors)
        leaves = [next(rest) if value is None else value[0] for value in self.fixed]
        image = self.fn(layout.view(flat), *tree_unflatten(leaves, self.spec))
        return layout.flatten(layout.check(image, torch.is_autocast_enabled(layout.device.type)))


class _Reordered(nn.Module):
    """A graph whose input ``first`` comes first."""

    def __init__(self, graph: nn.Module, first: int) -> None:
        super().__init__()
        self.graph, self.first = graph, first

    def forward(self, z: Tensor, *others: Tensor) -> Tensor:
        return self.graph(*others[: self.first], z, *others[self.first :])[0]


def _export(module: nn.Module, arguments: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(module, arguments, strict=False)
    except (TypeError, ValueError):  # those of Layout.check
        raise
    except Exception as error:  # of any type
        raise RuntimeError(f"torch.export cannot record fn: {_first_line(error)}") from error


def _check(program: torch.export.ExportedProgram) -> None:
    """Raise if the map draws random numbers or has side effects on tensors."""
    for node in program.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and _draws(node):
            raise ValueError(f"fn draws random numbers ({node.target}), so it has no fixed point: call .eval()")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        signature = program.run_decompositions({}).graph_signature  # without decompositions it knows no side effects
    if mutated := [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]:
        raise ValueError(f"fn must not modify tensors ({', '.join(mutated)}): call .eval(), or work on copies")


def _draws(node: torch.fx.Node) -> bool:
    """Whether an operator that may draw random numbers does so, as dropout does not in evaluation mode."""
    names = [argument.name for argument in node.target._schema.arguments]  # pyright: ignore
    values = {argument.name: argument.default_value for argument in node.target._schema.arguments}  # pyright: ignore
    values |= dict(zip(names, node.args, strict=False)) | node.kwargs
    return all(values.get(name, True) for name in ("train", "dropout_p"))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


def _finder(root: nn.Module, program: torch.export.ExportedProgram, spec: Any) -> Callable[[], Tensor]:
    """A function that returns the current tensor of an input that is not an argument."""
    kind = spec.kind.name
    if kind == "PARAMETER" or (kind == "BUFFER" and spec.target not in program.constants):
        path, _, name = spec.target.rpartition(".")
        owner = root.get_submodule(path)
        kept = owner._parameters if kind == "PARAMETER" else owner._buffers
        return lambda: kept[name]  # pyright: ignore[reportReturnType]
    if kind not in ("BUFFER", "CONSTANT_TENSOR"):
        raise RuntimeError(f"fn uses {spec.target}, which is not a tensor, and cannot be compiled ahead of time")
    tensor: Any = program.constants[spec.target]
    return lambda: tensor


def _compiled(graph: nn.Module, inputs: list[Tensor], first: int) -> ctypes.CDLL:
    """The library of a graph with these inputs."""
    from torch._inductor import aoti_compile_and_package

    program = _export(_Reordered(graph, first), tuple(inputs))
    with tempfile.TemporaryDirectory(prefix="pydeq-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            package = aoti_compile_and_package(program, package_path=f"{folder}/map.pt2", inductor_configs=_OPTIONS)
        except Exception as error:  # of any type
            raise RuntimeError(f"torch cannot compile fn ahead of time: {_first_line(error)}") from error
        with zipfile.ZipFile(package) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".so")]
            path = Path(archive.extract(name, folder))
        return ctypes.CDLL(str(path))  # loaded, it does not need its file


def _plain(tensor: Tensor) -> Tensor:
    """``tensor`` as its memory is read by compiled code."""
    tensor = tensor.detach()
    if tensor.layout is not torch.strided or not tensor.is_cpu:
        raise ValueError(
            f"all tensors that fn takes must be dense and on the CPU, got one of {tensor.layout} on {tensor.device}"
        )
    if tensor.is_neg() or tensor.is_conj():
        tensor = tensor.resolve_neg().resolve_conj()
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _describe(tensor: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...], int]:
    if tensor.dtype not in _NUMBERS:
        raise ValueError(f"fn takes a tensor of {tensor.dtype}, which compiled maps do not")
    return tensor.dim(), tuple(tensor.shape), tensor.stride(), _NUMBERS[tensor.dtype]


def _shown(spec: Any) -> str:
    return f"{spec.num_children} arguments with {spec.num_leaves} entries"


def _got(value: Any) -> str:
    return f"one of {value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
