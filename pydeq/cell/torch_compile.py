"""Work with torch.compile: one graph break around a solve, and the cell compiled inside the solve.

A solve cannot be traced, since it runs until its samples have stopped. So the compiler skips the frame of a layer's
``forward``. That frame turns the compiler's hook off, so that no frame of the solver is compiled, and turns it on again
around each call of the cell. The cell is compiled twice: without gradients for the solve, and with gradients for the
evaluation that makes the graph.

Nothing here imports ``torch._dynamo``, which takes a second.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch._C._dynamo import eval_frame  # pyright: ignore
from torch.utils._pytree import tree_map_only

F = TypeVar("F", bound=Callable[..., Any])

# The reason for a graph break, in torch's messages.
_REASON = (
    "a solve stops by values; torch.export.export(model, ..., strict=False) records a pydeq.DEQ in evaluation mode, and"
    " the program's module() compiles as one graph: see pydeq.export_mode"
)
# Skip this frame, but not the frames that it calls.
_SKIP = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT)


def skipped(method: F) -> F:
    """Decorate a function that the compiler must call without tracing it."""
    method._torchdynamo_disable = True  # pyright: ignore[reportFunctionMemberAccess]
    method._torchdynamo_disable_msg = _REASON  # pyright: ignore[reportFunctionMemberAccess]
    eval_frame.set_code_exec_strategy(method.__code__, _SKIP)
    return method


class Compiler:
    """The compiler's hook when this object is made: off inside ``with``, and on again around calls of a cell."""

    @skipped
    def __init__(self) -> None:
        self.hook = eval_frame.get_eval_frame_callback()

    @skipped
    def __enter__(self) -> Compiler:
        eval_frame.set_eval_frame(None)
        return self

    @skipped
    def __exit__(self, *exception: object) -> None:
        eval_frame.set_eval_frame(self.hook)

    def compiles(self, cell: Callable[..., Any]) -> bool:
        """Whether calls of ``cell`` run compiled code."""
        return is_compiled(cell) or not (self.hook is None or self.hook is False)

    def compiled(self, cell: Callable[..., Any]) -> Callable[..., Any]:
        """``cell``, called with the hook on."""
        hook = self.hook
        if hook is None or hook is False:
            return _without_history(cell) if is_compiled(cell) else cell

        def call(*args: Any, **keywords: Any) -> Any:
            if torch._C._are_functorch_transforms_active():  # see ``interpreting``
                return cell(*args, **keywords)
            before = eval_frame.set_eval_frame(hook)
            try:
                return cell(*args, **keywords)
            finally:
                eval_frame.set_eval_frame(before)

        return _without_history(call)


@skipped
def compiling() -> bool:
    """Whether the compiler's hook is on: functions that are called would be compiled."""
    hook = eval_frame.get_eval_frame_callback()
    return not (hook is None or hook is False)


def interpreted(fn: F) -> F:
    """Decorate a function that autograd calls, maybe in a compiled step: the compiler's hook is off inside."""

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        with Compiler():
            return fn(*args, **kwargs)

    return skipped(call)  # pyright: ignore[reportReturnType]


def interpreting() -> AbstractContextManager[Any]:
    """Context manager in which compiled functions run as they were written.

    Dynamo cannot compile under the transforms of torch.func, and would never again run what it has compiled before.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def in_compiled_autograd() -> bool:
    """Whether compiled autograd runs backward; it traces the graph's nodes one by one."""
    return getattr(sys.modules.get("torch._dynamo.compiled_autograd"), "in_compiled_autograd_region", False)


def is_compiled(fn: Callable[..., Any]) -> bool:
    """Whether ``fn`` is a result of torch.compile."""
    if isinstance(fn, torch.nn.Module):  # hasattr is slow for attributes that a module does not have
        return "_orig_mod" in fn._modules or "_torchdynamo_orig_callable" in fn.__dict__
    return hasattr(fn, "_orig_mod") or hasattr(fn, "_torchdynamo_orig_callable")


def uncompiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function that torch.compile wrapped; unlike compiled code, it can be differentiated twice."""
    return getattr(fn, "_orig_mod", getattr(fn, "_torchdynamo_orig_callable", fn))


def _without_history(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Call ``fn`` with detached arguments if gradients are off: requires_grad would cause a recompilation."""

    def call(*args: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            args = tuple([_detached(argument) for argument in args])
            keywords = {name: _detached(argument) for name, argument in keywords.items()}
        return fn(*args, **keywords)

    return call


def _detached(argument: Any) -> Any:
    """``argument`` with all of its tensors detached. A walk through a tree takes longer than a small compiled cell."""
    if isinstance(argument, torch.Tensor):
        return argument.detach() if argument.requires_grad else argument
    return tree_map_only(torch.Tensor, torch.Tensor.detach, argument)


def reusable_graphs() -> AbstractContextManager[Any]:
    """Context manager in which compiled code keeps its saved tensors, so that its backward can run more than once."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    from torch._functorch import config

    return config.patch(donated_buffer=False)  # pyright: ignore[reportAttributeAccessIssue]


def allow_reuse(outputs: Iterable[torch.Tensor]) -> None:
    """Let the compiled parts of a graph, made under :func:`reusable_graphs`, run backward more than once.

    If torch compiles backward early, as for a changing batch size, it leaves the list of donated buffers at None, and
    later takes None to mean that buffers were donated.
    """
    if "torch._dynamo" not in sys.modules:
        return
    todo, seen = [x.grad_fn for x in outputs], set[Any]()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        metadata = getattr(getattr(node, "_forward_cls", None), "metadata", None)
        if getattr(metadata, "bw_donated_idxs", ()) is None:
            metadata.bw_donated_idxs = []  # pyright: ignore[reportOptionalMemberAccess]
        todo.extend(following for following, _ in node.next_functions)
