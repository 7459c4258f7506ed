"""Replacements for other packages' names: change one import and keep your code.

:mod:`pydeq.compat.torchdeq` stands in for torchdeq 0.1, :mod:`pydeq.compat.deq` for ``lib.solvers`` and
``lib.jacobian`` of locuslab/deq. They keep those packages' conventions and run pydeq's numerics; under
:func:`legacy` they reproduce the originals' iterates. ``docs/moving.md`` names every difference.
"""

from pydeq.compat.mode import legacy

__all__ = ["legacy"]
