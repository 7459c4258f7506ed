"""The paper's numbers: Bai, Koltun and Kolter, Stabilizing Equilibrium Models by Jacobian Regularization, ICML 2021.

Perplexities are on WikiText-103, accuracies in percent. "diverged" marks trainings that diverged in the paper.
"""

from __future__ import annotations

TABLE1: dict[str, dict[str, float | str]] = {
    "post-LN": {"full": 24.0, "stopped": 29.2},
    "post-LN, smaller cap": {"full": 26.0},
    "post-LN, smallest cap": {"full": "diverged"},
    "pre-LN": {"full": "diverged"},
    "post-LN, penalized": {"full": 24.9},
    "pre-LN, penalized": {"full": 24.5},
}
"""Without a penalty at 30 evaluations, 20 and 15 with smaller caps, hard-stopped at 12; with it at 12 and 14."""

TABLE2: dict[str, dict[str, float]] = {
    "CIFAR-10": {"full": 93.6, "stopped": 89.1, "penalized": 93.1},
    "ImageNet, small": {"full": 75.4, "penalized": 74.5},
    "ImageNet, large": {"full": 77.5, "penalized": 76.8},
}
"""CIFAR-10 at 17 evaluations, hard-stopped at 6, and penalized at 6; ImageNet at 27 and 14, 30 and 15."""

TABLE2_NFE = {
    "CIFAR-10": {"full": 17, "stopped": 6, "penalized": 6},
    "ImageNet, small": {"full": 27, "penalized": 14},
    "ImageNet, large": {"full": 30, "penalized": 15},
}

TABLE3: dict[float, dict[int, float]] = {
    0.1: {1: 82.4, 2: 89.7, 3: 91.9, 4: 92.3, 5: 92.7, 6: 92.9},
    0.6: {1: 85.8, 2: 91.5, 3: 92.7, 4: 93.0, 5: 93.0, 6: 93.1},
    1.2: {1: 84.4, 2: 89.6, 3: 92.2, 4: 92.6, 5: 92.7, 6: 92.7},
}
"""Accuracy on CIFAR-10 by the penalty's strength and the hard stop."""

FIGURE7 = {
    "unpenalized, small cap": "explodes (16 evaluations)",
    "unpenalized, generous cap": "stays fine (30 evaluations)",
    "penalized, small cap": "bounded",
}
"""The mean spectral radius during a training, in the paper's words."""

FIGURE8 = {
    "weight decay": "does not stabilize the convergence (1e-6)",
    "penalized": "stabilizes the convergence",
}
