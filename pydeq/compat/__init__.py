"""Replacements for other packages' names: change one import and keep your code.

:mod:`pydeq.compat.torchdeq` replaces torchdeq 0.1. :mod:`pydeq.compat.deq` replaces ``lib.solvers`` and
``lib.jacobian`` of locuslab/deq. They keep the conventions of these packages and use pydeq's numerics; under
:func:`legacy` they reproduce the originals' iterates. ``docs/moving.md`` lists every difference.
"""

from pydeq.compat.mode import legacy

__all__ = ["legacy"]
