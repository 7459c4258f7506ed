"""Find out why a layer does not converge, and whether a solver keeps its word."""

from pydeq.diagnosis.audit import Audit, audit
from pydeq.diagnosis.diagnose import diagnose
from pydeq.diagnosis.report import Change, Report

__all__ = ["Audit", "Change", "Report", "audit", "diagnose"]
