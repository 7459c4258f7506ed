"""Adjoints: how to differentiate a fixed point."""

from pydeq.adjoints.base import Adjoint
from pydeq.adjoints.implicit import Implicit
from pydeq.adjoints.phantom import JacobianFree, Phantom

__all__ = ["Adjoint", "Implicit", "JacobianFree", "Phantom"]
