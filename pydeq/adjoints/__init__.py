"""Adjoints: how to differentiate a fixed point."""

from pydeq.adjoints.base import Adjoint
from pydeq.adjoints.implicit import Implicit

__all__ = ["Adjoint", "Implicit"]
