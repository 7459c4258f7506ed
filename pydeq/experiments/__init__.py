"""The experiments of Bai, Koltun and Kolter, Stabilizing Equilibrium Models by Jacobian Regularization, ICML 2021.

``python -m pydeq reproduce NAME`` trains what an experiment needs, prints the paper's numbers beside the measured ones,
says which of the paper's claims these trainings show, and writes it all as JSON and as a picture.
"""

from __future__ import annotations

from pydeq.experiments.experiment import Experiment
from pydeq.experiments.figure7 import Figure7
from pydeq.experiments.figure8 import Figure8
from pydeq.experiments.grid import Grid, GridError
from pydeq.experiments.measurement import Measurement, Training
from pydeq.experiments.recipes import Profile, profile
from pydeq.experiments.report import Report
from pydeq.experiments.table1 import Table1
from pydeq.experiments.table2 import Table2
from pydeq.experiments.table3 import Table3

EXPERIMENTS: dict[str, Experiment] = {each.name: each for each in (Table1(), Table2(), Table3(), Figure7(), Figure8())}
"""By name."""

__all__ = [
    "EXPERIMENTS",
    "Experiment",
    "Grid",
    "GridError",
    "Measurement",
    "Profile",
    "Report",
    "Training",
    "profile",
]
