"""Table 1: language models, post-LN and pre-LN, with and without the penalty, full and hard-stopped."""

from __future__ import annotations

import math
from typing import ClassVar

from experiments.paper.experiment import (
    Experiment,
    Measurements,
    Trainings,
    evaluations,
    metric,
    over_training,
    radius,
    residual,
)
from experiments.paper.published import TABLE1
from experiments.paper.recipes import SMALLEST, Recipes
from experiments.paper.report import Claim, Panel, Report, ReportTable, Row, claim

LOWER = 0.02
"""The fraction by which a perplexity must be lower to count as lower."""

RECOVERED = 0.75
"""The share of the loss by a hard stop that the penalty must make up for; the paper's is 0.83."""

LEAST_LOSS = 0.05
"""The fraction of the full perplexity that a hard stop must cost, so that there is something to make up for."""


class Table1(Experiment):
    """Perplexities of the DEQ-Transformer."""

    name: ClassVar[str] = "table1"
    title: ClassVar[str] = "language models, with and without the penalty"

    def trainings(self, recipes: Recipes, seeds: int) -> Trainings:
        return {name: [recipes.language.training(name)] for name in recipes.language.models}

    def report(self, recipes: Recipes, found: Measurements) -> Report:
        language, rows = recipes.language, []
        for label, group in found.items():
            paper = TABLE1[label]
            rows.append(Row(label, (
                evaluations(group, None), metric(group, None, paper.get("full")), residual(group, None), radius(group),
            )))  # fmt: skip
            if not label.endswith("penalized") and label != SMALLEST:
                rows.append(Row(f"{label}, stopped at {language.stop}", (
                    evaluations(group, language.stop), metric(group, language.stop, paper.get("stopped")),
                    residual(group, language.stop), radius(group),
                )))  # fmt: skip
        table = ReportTable(
            "Test perplexity (in parentheses the paper's, on WikiText-103)",
            ("model", "evaluations", "perplexity (paper)", "relative residual", "spectral radius"), tuple(rows),
        )  # fmt: skip
        curves = [over_training(label, group, "radius", "o-", i) for i, (label, group) in enumerate(found.items())]
        losses = [over_training(label, group, "loss", "o-", i) for i, (label, group) in enumerate(found.items())]
        panels = [
            Panel("Language models: validation loss", "step", "nats per token", tuple(losses)),
            Panel("Spectral radius", "step", "mean over validation data", tuple(curves)),
        ]
        return Report([table], self._claims(recipes, found), panels)

    def _claims(self, recipes: Recipes, found: Measurements) -> list[Claim]:
        stop, claims = recipes.language.stop, []
        for name in ("post-LN", "pre-LN"):
            plain, penalized, slug = found[name], found[f"{name}, penalized"], name.lower()
            full, stopped = metric(plain, None).number, metric(plain, stop).number
            own, spent = metric(penalized, None).number, evaluations(penalized, None).number
            claims += [
                claim(
                    f"table1.{slug}.stopped",
                    f"{name}: at its own small cap the penalized model has a perplexity at least {LOWER:.0%} lower than"
                    f" the unpenalized one stopped at {stop}",
                    {"penalized": own, "its evaluations": spent, "unpenalized, stopped": stopped},
                    own <= (1.0 - LOWER) * stopped,
                ),
                claim(
                    f"table1.{slug}.full",
                    f"{name}: and makes up for at least {RECOVERED:.0%} of what the stop costs the unpenalized one, if"
                    f" that is at least {LEAST_LOSS:.0%}",
                    {"penalized": own, "unpenalized": full, "stopped": stopped,
                     "share": (stopped - own) / (stopped - full) if stopped >= (1.0 + LEAST_LOSS) * full else math.nan},
                    stopped - own >= RECOVERED * (stopped - full),
                ),
            ]  # fmt: skip
        if SMALLEST in found and recipes.name != "paper":
            own, other = metric(found["post-LN, penalized"], None).number, metric(found[SMALLEST], None).number
            claims.append(claim(
                "table1.post-ln.control",
                f"post-LN: the penalty itself lowers the perplexity by at least {LOWER:.0%}: the unpenalized model is"
                " trained at the same small cap",
                {"penalized": own, "unpenalized": other}, own <= (1.0 - LOWER) * other,
            ))  # fmt: skip
        return claims
