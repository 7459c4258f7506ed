"""The experiments of Bai, Koltun and Kolter, Stabilizing Equilibrium Models by Jacobian Regularization, ICML 2021.

``python -m experiments reproduce NAME`` trains the models of an experiment. It prints the measured numbers next to the
paper's, says which of the paper's claims these trainings show, and writes everything as JSON and as a picture.
"""

from __future__ import annotations

from experiments.paper.experiment import Experiment
from experiments.paper.figure7 import Figure7
from experiments.paper.figure8 import Figure8
from experiments.paper.grid import Grid, GridError
from experiments.paper.inference import Inference
from experiments.paper.length import Length
from experiments.paper.measurement import Measurement, Training
from experiments.paper.modes import Modes
from experiments.paper.recipes import Recipes, recipes_of
from experiments.paper.report import Report
from experiments.paper.table1 import Table1
from experiments.paper.table2 import Table2
from experiments.paper.table3 import Table3

EXPERIMENTS: dict[str, Experiment] = {
    each.name: each for each in (Table1(), Table2(), Table3(), Figure7(), Figure8(), Modes(), Length(), Inference())
}
"""By name."""

__all__ = [
    "EXPERIMENTS",
    "Experiment",
    "Grid",
    "GridError",
    "Measurement",
    "Recipes",
    "Report",
    "Training",
    "recipes_of",
]
