"""A check that tensors and modules are the same in backward as in forward, where fn is evaluated again."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class ChangeCheck:
    """Record tensors and modules; raise if they have changed when fn is evaluated again.

    Args:
        tensors: Must not be modified in place.
        modules: Must not be switched between training and evaluation mode.
    """

    def __init__(self, tensors: Sequence[Tensor], modules: Sequence[nn.Module] = ()) -> None:
        # Tensors of inference mode have no version.
        self._known = [(x, x._version) for x in tensors if not x.is_inference()]
        self._modes = [(module, module.training) for module in modules]

    def check(self, why: str) -> None:
        """Raise if something has changed.

        Args:
            why: The reason why it must not change, for the message.

        Raises:
            RuntimeError: If a tensor was modified in place, or a module is in another mode.
        """
        if any(x._version != version for x, version in self._known):
            raise RuntimeError(
                "a parameter, a buffer or a tensor of the context was modified in place between forward and backward,"
                f" but {why}: differentiate first, or modify a copy"
            )
        for module, training in self._modes:
            if module.training != training:
                forward, now = ("train", "eval") if training else ("eval", "train")
                raise RuntimeError(
                    f"{type(module).__name__} was in {forward} mode in forward and is in {now} mode in backward, but"
                    f" {why}: differentiate before the mode is changed"
                )

    def with_tensors(self, tensors: Sequence[Tensor]) -> ChangeCheck:
        """Make a check of these tensors in addition, without the tensors that are modified already."""
        unchanged = [x for x, version in self._known if x._version == version]
        later = ChangeCheck([*tensors, *unchanged])
        later._modes = self._modes
        return later
