"""Measurements with numbers of one's choice."""

from experiments.paper import Measurement, Recipes, Training
from experiments.training import Evaluation, EvaluationRow


def measured(
    training: Training, metric: float | None, stops: dict[int, float] | None = None, *, residual: float = 0.1,
    radii: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8), kind: str = "accuracy",
) -> Measurement:  # fmt: skip
    """A measurement of a training.

    Args:
        training: Of which.
        metric: On test data at its own cap; None where it diverged.
        stops: At hard stops; ``metric`` where there is nothing.
        residual: At all of them.
        radii: Mean spectral radius at each evaluation.
        kind: What the metric is.
    """
    test = None
    if metric is not None:
        at = dict.fromkeys(training.stops, metric) | (stops or {})
        residuals = dict.fromkeys(at, residual)
        test = Evaluation(1.0, metric, float(training.config.max_steps), residual, radii[-1], radii[-1], at, residuals)
    rows = [
        EvaluationRow(1.0, metric or 0.1, 4.0, residual, radius, radius, step=10 * (i + 1), train_residual=residual)
        for i, radius in enumerate(radii)
    ]
    return Measurement(
        key=training.key, config=training.config.mapping(), status="finished" if test else "diverged", metric=kind,
        steps=40, parameters=7, seconds=1.5, test_seconds=0.5, evaluations=rows, test=test,
        environment={"device": "cpu"},
    )  # fmt: skip


def claims(experiment, recipes: Recipes, found: dict[str, list[Measurement]]) -> dict[str, bool | None]:
    """What an experiment says of measurements."""
    return {each.name: each.shown for each in experiment.report(recipes, found).claims}
