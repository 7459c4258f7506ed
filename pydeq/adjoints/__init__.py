"""Adjoints: how to differentiate a fixed point."""

from pydeq.adjoints.base import Adjoint
from pydeq.adjoints.implicit import Implicit
from pydeq.adjoints.phantom import JacobianFree, Phantom
from pydeq.adjoints.reversible import Reversible
from pydeq.adjoints.shine import Shine
from pydeq.adjoints.unrolled import Unrolled

__all__ = ["Adjoint", "Implicit", "JacobianFree", "Phantom", "Reversible", "Shine", "Unrolled"]
