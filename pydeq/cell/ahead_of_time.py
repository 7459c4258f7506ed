"""A map compiled ahead of time by torch's AOTInductor, to be called by C++.

All tensors that the map uses are inputs of the compiled code: the state, the context, and what torch.export found in
the map itself, such as parameters. So the code holds no copies, and sees later changes of their values.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import json
import re
import tempfile
import warnings
import weakref
import zipfile
from collections.abc import Callable, Sequence
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
_PLAIN = (Tensor, nn.Parameter)
_JOINS = (torch.ops.aten.cat.default, torch.ops.aten.stack.default)
_MOST_JOINED, _MOST_ENTRIES = 32, 256  # inputs and entries of a concatenation whose entries are computed in place


class AheadOfTimeMap:
    """fn(z, *context) for flat states z [B, D], compiled for these shapes.

    Args:
        fn: The map, of states of this layout.
        cell: The user's callable in ``fn``, whose parameters are looked for.
        layout: Of the states.
        context: Passed on after z. Its tensors are read from each solve's context, and everything else is fixed.

    Attributes:
        run: The address of the C function that evaluates the map; for one thread at a time.
        model: Its first argument.
        inputs: Descriptions of the inputs: dimensions, sizes, strides, and torch's number of the dtype.

    Raises:
        RuntimeError: If torch cannot export or compile the map.
        TypeError: If the context has something that is not a tensor and cannot be compared, such as an array.
        ValueError: If the map draws random numbers, or modifies tensors.
    """

    def __init__(self, fn: Callable[..., Any], cell: Any, layout: Layout, context: Sequence[Any]) -> None:
        leaves, self._spec = tree_flatten(tuple(context))
        self._fixed = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]  # what is not a tensor
        self._flat = len(leaves) == len(context) and all(isinstance(entry, Tensor) for entry in context)
        for (value,) in filter(None, self._fixed):
            if hasattr(value, "__array__"):
                raise TypeError(f"context must have tensors, numbers or other plain values, got {type(value).__name__}")
        flat = torch.zeros(layout.batch, layout.size, dtype=layout.dtype, device=layout.device)
        examples = [flat, *(_example(leaf) for leaf in leaves if isinstance(leaf, Tensor))]
        root = _Flat(fn, _modules_of(cell), layout, self._spec, self._fixed)
        program = _export(root, tuple(examples))
        given = iter(range(len(examples)))
        self._own: list[Callable[[], Tensor]] = []  # the tensors that the map itself holds
        names = ["z0", *(f"tensor {i} of the context" for i in range(len(examples) - 1))]
        order = []  # for each input its place among z, the context's tensors and the map's own
        for spec in program.graph_signature.input_specs:
            if spec.kind.name == "USER_INPUT":
                order.append(next(given))
                continue
            order.append(len(examples) + len(self._own))
            self._own.append(_finder(root, program, spec))
            names.append(f"fn's {_short(spec.target or '')}")
        examples += [_example(find()) for find in self._own]
        first = order.index(0)  # the loop has z as the first input
        self._order = [order.pop(first), *order]
        self._expected = [
            (name, tuple(each.shape), each.dtype, each.stride()) for name, each in zip(names, examples, strict=True)
        ]
        self.inputs = [_describe(examples[i]) for i in self._order]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            core = program.run_decompositions({})
        _check(program, core.graph_signature)
        options = {"force_pointwise_cat": True} if _joins_few(core) else {}
        self._load(_compiled(program.graph_module, [examples[i] for i in self._order], first, options))

    def tensors(self, z: Tensor, context: Sequence[Any]) -> tuple[list[Tensor], list[int]]:
        """The inputs of the compiled map for a contiguous state [B, D] and a context, and their addresses.

        Raises:
            ValueError: If the context, or what the map holds, is not as at compilation in more than values.
        """
        found = [z]
        if self._flat and len(context) == len(self._fixed):
            leaves = context
        else:
            leaves, spec = tree_flatten(tuple(context))
            if spec != self._spec:
                raise ValueError(
                    f"the context must have the structure that it had at compilation, {self._spec}, got {spec}"
                )
        for leaf, fixed in zip(leaves, self._fixed, strict=True):
            if fixed is None:
                found.append(leaf)
            elif not _is_same(leaf, fixed[0]):
                raise ValueError(
                    f"the context had {fixed[0]!r} at compilation, got {leaf!r}: pass what changes as a tensor"
                )
        found += [find() for find in self._own]
        inputs, addresses = [], []
        for tensor, (name, shape, dtype, strides) in zip(found, self._expected, strict=True):
            # An alias: another thread may give the tensor other memory while the solve reads the old one.
            alias = tensor.detach() if type(tensor) in _PLAIN else None
            if (
                alias is not None
                and alias.shape == shape
                and alias.dtype is dtype
                and alias.is_cpu
                and alias.layout is torch.strided
                and alias.stride() == strides
                and not alias.is_neg()
                and not alias.is_conj()
                and (address := alias.data_ptr())
            ):  # nearly always
                inputs.append(alias)
                addresses.append(address)
            else:
                inputs.append(_laid_out(tensor, name, shape, dtype, strides))
                addresses.append(inputs[-1].data_ptr())
        return inputs, [addresses[i] for i in self._order]

    def error(self) -> str:
        """Why the last evaluation failed, as far as torch tells."""
        text = ctypes.c_char_p()
        last = getattr(self._library, "AOTInductorGetLastError", None)  # not in torch 2.11
        if last is not None:
            last(ctypes.byref(text))
        reason = (text.value or b"torch has printed why to stderr").decode(errors="replace")
        return reason.split("\nException raised from", 1)[0]

    def _load(self, library: ctypes.CDLL) -> None:
        self._library = library
        model = ctypes.c_void_p()
        if library.AOTInductorModelContainerCreateWithDevice(ctypes.byref(model), ctypes.c_size_t(1), b"cpu", None):
            raise RuntimeError(f"the compiled map does not load: {self.error()}")
        self.model = model.value
        self.run = ctypes.cast(library.AOTInductorModelContainerRunSingleThreaded, ctypes.c_void_p).value
        weakref.finalize(self, library.AOTInductorModelContainerDelete, model).atexit = False


class _Flat(nn.Module):
    """The map of flat states, with the tensors of its context as arguments."""

    fn: Callable[..., Any]

    def __init__(
        self,
        fn: Callable[..., Any],
        used: Sequence[nn.Module],
        layout: Layout,
        spec: Any,
        fixed: Sequence[tuple[Any] | None],
    ) -> None:
        super().__init__()
        self.__dict__["fn"] = fn  # not a submodule: those are ``used``
        self.used = nn.ModuleList(used)  # what torch.export finds here are parameters and buffers, with names
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
        return self.graph(*others[: self.first], z, *others[self.first :])[0].contiguous()


def _export(module: nn.Module, arguments: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    try:
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(module, arguments, strict=False)
    except (TypeError, ValueError):  # those of Layout.check
        raise
    except Exception as error:  # of any type
        raise RuntimeError(
            f"torch.export cannot record fn: {_first_line(error)}; if values decide what is computed, take torch.where"
        ) from error


def _check(program: torch.export.ExportedProgram, signature: Any) -> None:
    """Raise if the map draws random numbers or has side effects on tensors.

    Args:
        signature: Of the program after decompositions: without them it knows no side effects.
    """
    graphs = [each for each in program.graph_module.modules() if isinstance(each, torch.fx.GraphModule)]
    for node in (node for graph in graphs for node in graph.graph.nodes):
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and _draws(node):
            raise ValueError(
                f"fn draws random numbers ({node.target}), so it has no fixed point: call .eval() on modules"
            )
    if mutated := [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]:
        names = ", ".join(_short(name) for name in mutated)
        raise ValueError(f"fn must not modify tensors ({names}): call .eval(), or work on copies")


def _joins_few(program: torch.export.ExportedProgram) -> bool:
    """Whether all concatenations have few inputs and entries.

    Then each entry is computed where it belongs: a test of its index for each input is cheaper than the memory and the
    views that each part would take.
    """
    from torch._inductor import config

    joins = [node for node in program.graph.nodes if node.target in _JOINS]
    return hasattr(config, "force_pointwise_cat") and all(
        len(node.args[0]) <= _MOST_JOINED and node.meta["val"].numel() <= _MOST_ENTRIES for node in joins
    )


def _draws(node: torch.fx.Node) -> bool:
    """Whether an operator that may draw random numbers does so, as dropout does not in evaluation mode."""
    names = [argument.name for argument in node.target._schema.arguments]  # pyright: ignore
    values = {argument.name: argument.default_value for argument in node.target._schema.arguments}  # pyright: ignore
    values |= dict(zip(names, node.args, strict=False)) | node.kwargs
    return all(values.get(name, True) for name in ("train", "training", "p", "dropout", "dropout_p"))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


def _short(name: str) -> str:
    """The name of a tensor in the user's module."""
    return re.sub("^used[.][0-9]+[.]", "", name)


def _modules_of(cell: Any) -> list[nn.Module]:
    """The modules that a callable is, or refers to."""
    if isinstance(cell, functools.partial):
        parts = (cell.func, *cell.args, *cell.keywords.values())
        return [module for part in parts for module in _modules_of(part)]
    module = module_of(cell)
    if module is not None:
        return [module]
    try:
        names = inspect.getclosurevars(cell)
    except TypeError:  # no function in Python
        return []
    return [value for value in (*names.nonlocals.values(), *names.globals.values()) if isinstance(value, nn.Module)]


def _finder(root: nn.Module, program: torch.export.ExportedProgram, spec: Any) -> Callable[[], Tensor]:
    """A function that returns the current tensor of an input that is not an argument."""
    kind = spec.kind.name
    if kind in ("PARAMETER", "BUFFER"):
        path, _, name = spec.target.rpartition(".")
        owner = root.get_submodule(path)
        kept = owner._parameters if kind == "PARAMETER" else owner._buffers
        return lambda: kept.get(name)  # pyright: ignore[reportReturnType]
    if kind != "CONSTANT_TENSOR":
        raise RuntimeError(f"fn uses {spec.target}, which is not a tensor, and cannot be compiled ahead of time")
    tensor: Any = program.constants[spec.target]
    return lambda: tensor


def _compiled(graph: nn.Module, inputs: list[Tensor], first: int, options: dict[str, Any]) -> ctypes.CDLL:
    """The library of a graph with these inputs, compiled with these options of Inductor."""
    from torch._inductor import aoti_compile_and_package

    program = _export(_Reordered(graph, first), tuple(inputs))
    with tempfile.TemporaryDirectory(prefix="pydeq-", ignore_cleanup_errors=True) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            package = aoti_compile_and_package(program, package_path=f"{folder}/map.pt2", inductor_configs=options)
        except Exception as error:  # of any type
            raise RuntimeError(
                f"torch cannot compile fn ahead of time, for which it needs a C++ compiler: {_first_line(error)}"
            ) from error
        with zipfile.ZipFile(package) as archive:
            if missing := _without_c_functions(archive):
                raise RuntimeError(
                    f"fn uses {', '.join(missing)}, for which AOTInductor has no C function: use pydeq.fixed_point"
                )
            (name,) = [name for name in archive.namelist() if name.endswith(".so")]
            path = archive.extract(name, folder)
        try:
            return ctypes.CDLL(path)  # loaded, it does not need its file
        except OSError as error:
            raise RuntimeError(f"the compiled map does not load: {error}") from error


def _without_c_functions(archive: zipfile.ZipFile) -> list[str]:
    """The operators that compiled code would call by their names, through a dispatcher that a solve does not have."""
    found = []
    for name in archive.namelist():
        if name.endswith(".json"):
            nodes = json.loads(archive.read(name)).get("nodes", [])
            found += [node["node"]["target"] for node in nodes]
    return sorted(set(found))


def _example(tensor: Tensor) -> Tensor:
    """A tensor whose strides compiled code is made for."""
    return _laid_out(tensor, "a tensor of fn", tuple(tensor.shape), tensor.dtype, _dense_strides(tensor))


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of a tensor that fills its memory without gaps or overlaps; otherwise those of a contiguous one."""
    if tensor.layout is not torch.strided:
        return ()
    return torch.empty_like(tensor.detach(), memory_format=torch.preserve_format).stride()


def _laid_out(tensor: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype, strides: tuple[int, ...]) -> Tensor:
    """``tensor`` as its memory is read by compiled code.

    Raises:
        ValueError: If it is not a plain tensor on the CPU of this shape and dtype.
    """
    if not isinstance(tensor, Tensor) or tensor.shape != shape or tensor.dtype is not dtype:
        raise ValueError(
            f"{name} must be as at compilation, {dtype} {shape}, and is {_got(tensor)}: make another CompiledSolve"
        )
    tensor = tensor.detach()
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or not tensor.is_cpu:
        kind = f"{type(tensor).__name__}, {tensor.layout}, on {tensor.device}"
        raise ValueError(f"{name} must be a plain dense tensor on the CPU, got one of {kind}")
    if tensor.is_neg() or tensor.is_conj():
        tensor = tensor.resolve_neg().resolve_conj()
    if tensor.stride() != strides:
        tensor = torch.empty_strided(shape, strides, dtype=dtype, device="cpu").copy_(tensor)
    if not tensor.data_ptr() and tensor.numel():
        raise ValueError(f"{name} must have values in memory, got {_got(tensor)} without them")
    return tensor


def _describe(tensor: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...], int]:
    if tensor.dtype not in _NUMBERS:
        raise ValueError(f"fn takes a tensor of {tensor.dtype}, which compiled maps do not")
    return tensor.dim(), tuple(tensor.shape), tensor.stride(), _NUMBERS[tensor.dtype]


def _got(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _is_same(value: Any, fixed: Any) -> bool:
    """Whether a value that is not a tensor is the one that was compiled for."""
    if isinstance(value, Tensor):
        return False
    try:
        return value is fixed or bool(value == fixed)
    except (ValueError, RuntimeError):  # arrays
        return False
