"""Table 1: language models, post-LN and pre-LN, with and without the penalty, full and hard-stopped."""

from __future__ import annotations

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
from experiments.paper.recipes import Recipes
from experiments.paper.report import Claim, Panel, Report, ReportTable, Row, claim

NEAR = 0.05
"""Perplexities within this fraction are equally good: the paper's 24.9 is 4% above its 24.0."""


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
            if not label.endswith("penalized"):
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
                    f"{name}: at its own small cap the penalized model has a lower perplexity than the unpenalized one"
                    f" stopped at {stop}",
                    {"penalized": own, "its evaluations": spent, "unpenalized, stopped": stopped}, own < stopped,
                ),
                claim(
                    f"table1.{slug}.full",
                    f"{name}: and one within {NEAR:.0%} of the unpenalized one's at its full number of evaluations",
                    {"penalized": own, "unpenalized": full, "its evaluations": evaluations(plain, None).number},
                    own <= (1.0 + NEAR) * full,
                ),
            ]  # fmt: skip
        return claims
