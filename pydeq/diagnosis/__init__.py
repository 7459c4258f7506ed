"""Find out why a layer does not converge, and whether a solver keeps its word."""

from pydeq.diagnosis.audit import Audit, audit

__all__ = ["Audit", "audit"]
