"""``export_mode``: layers as programs of a fixed number of evaluations, for torch.export and ONNX."""

from __future__ import annotations

from contextlib import ContextDecorator
from typing import Any

from pydeq.arguments import check_max_steps
from pydeq.ops.capture import export_state


class export_mode(ContextDecorator):  # noqa: N801  # reads like torch.no_grad
    """Context manager in which every :class:`pydeq.DEQ` makes a fixed number of evaluations, in plain torch operations.

    torch.export and ``torch.onnx.export`` record these operations. Both use this form by themselves, if each layer in
    evaluation mode has its ``eval_max_steps``. In this context it is also used for layers that have none, and when a
    model is called directly, which shows what the program will compute::

        with pydeq.export_mode(steps=12):
            program = torch.export.export(model.eval(), (x,))

    For each sample, the output is that of ``deq(z0, x, max_steps=steps)`` without gradients: a sample that meets its
    tolerance keeps its result, and the others get the image of their best iterate. The program always makes all of its
    evaluations. With ``return_solution=True`` a model may also return ``solution.converged``. All results of the layer
    are detached, also in a direct call with gradients on: train outside of this context.

    The solver must be :class:`pydeq.Picard`, :class:`pydeq.Anderson` or :class:`pydeq.Broyden`. Samples must not depend
    on each other. With ``norm="parts"`` each sample's output is that of a solve of this sample only. ``compact`` has no
    effect.

    Args:
        steps: The number of evaluations of each layer, at least 1; by default the ``max_steps`` of the call, or the
            layer's ``eval_max_steps``.

    Raises:
        TypeError, ValueError: If ``steps`` is not an int or below 1. In a call: if the solver cannot be exported.
        RuntimeError: In a call: if a layer is in training mode, has no number of evaluations, or has options that a
            program cannot have (``freeze=False``, ``penalty``, ``process_group``, the adjoint ``Reversible``, and
            ``freeze_rng`` with a cell that draws random numbers).

    Examples:
        >>> deq = pydeq.DEQ(lambda z, x: torch.cos(z) + x, solver=pydeq.Picard()).eval()
        >>> z0, x = torch.zeros(4, 3), torch.full((4, 3), 0.1)
        >>> with pydeq.export_mode(steps=3):
        ...     program = torch.export.export(deq, (z0, x))
        >>> with torch.no_grad():
        ...     torch.allclose(program.module()(z0, x), deq(z0, x, max_steps=3))
        True
    """

    def __init__(self, steps: int | None = None) -> None:
        self.steps = None if steps is None else check_max_steps("steps", steps)
        self._before: list[tuple[bool, int | None]] = []

    def __enter__(self) -> export_mode:
        self._before.append((export_state.active, export_state.steps))
        export_state.active, export_state.steps = True, self.steps
        return self

    def __exit__(self, *exception: object) -> None:
        export_state.active, export_state.steps = self._before.pop()

    def _recreate_cm(self) -> export_mode:  # each call of a decorated function has its own
        return export_mode(self.steps)


def exported_steps(layer: Any, max_steps: Any, freeze: bool, penalty: Any) -> Any:
    """The number of evaluations that the program of a :class:`pydeq.DEQ` makes.

    Args:
        layer: The layer.
        max_steps: That of the call, if given.
        freeze, penalty: Those of the call.

    Raises:
        RuntimeError: If the layer cannot be exported like this.
    """
    if layer.training:
        raise RuntimeError("a DEQ is exported in evaluation mode, and this one is in training mode: call model.eval()")
    for problem, advice in (
        (
            f"the adjoint {layer.adjoint!r} has its own iteration" if not layer.adjoint.exports else "",
            "deq.adjoint = pydeq.Implicit() finds the same fixed point by the layer's solver",
        ),
        ("process_group makes ranks wait for each other" if layer.ranks is not None else "", "export without it"),
        ("freeze=False runs until the whole batch is done" if not freeze else "", "export with freeze=True"),
        ("penalty is for training" if penalty is not None else "", "export without it"),
    ):
        if problem:
            raise RuntimeError(f"this DEQ cannot be exported, since {problem}: {advice}")
    for steps in (export_state.steps, max_steps, layer.eval_max_steps):
        if steps is not None:
            return steps
    raise RuntimeError(
        "an exported DEQ makes a fixed number of evaluations, and this one has none: give the layer eval_max_steps"
        " (deq.eval_max_steps = 8), or export inside of pydeq.export_mode(steps=8). Take as few as your metric needs:"
        " every evaluation makes the program larger, and slower to export"
    )
