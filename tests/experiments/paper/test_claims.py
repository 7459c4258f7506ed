"""What experiments say of measurements whose numbers are known."""

from dataclasses import replace

import pytest
from measurements import claims, measured

from experiments.paper import EXPERIMENTS, recipes_of
from experiments.paper.modes import DIFFERENCE, VJP
from experiments.paper.recipes import PENALIZED, PENALIZED_SMALL, PLAIN, PLAIN_GENEROUS, PLAIN_SMALL, SMALLEST

STOP = 3


@pytest.fixture(scope="module")
def smoke():
    return recipes_of("smoke")


@pytest.fixture
def images(smoke):
    plain, penalized = smoke.images.training(cap="generous", strength=0.0), smoke.images.training()
    assert (smoke.images.stop, plain.config.max_steps, penalized.config.max_steps) == (STOP, 6, 4)
    return plain, penalized


def table2(smoke, plain, penalized):
    return claims(EXPERIMENTS["table2"], smoke, {PLAIN: plain, PENALIZED: penalized})


def test_table2_of_numbers_like_the_papers(smoke, images):
    plain, penalized = images
    found = table2(
        smoke, [measured(plain, 0.936, {1: 0.5, 2: 0.8, 3: 0.891})], [measured(penalized, 0.932, {2: 0.931})]
    )
    assert found == {
        "table2.margin": True, "table2.near": True, "table2.evaluations": True, "table2.evaluations_both": True,
    }  # fmt: skip


def test_table2_counts_the_evaluations_that_are_needed(smoke, images):
    plain, penalized = images
    # Three evaluations suffice for either, of 6 in full: twice as few, and no fewer.
    reached = {1: 0.1, 2: 0.1, 3: 0.9}
    found = table2(smoke, [measured(plain, 0.9, reached)], [measured(penalized, 0.9, reached)])
    assert found["table2.near"]
    assert not found["table2.evaluations"]
    assert not found["table2.margin"]
    # One evaluation is enough for the penalized model: six times fewer, and three times fewer than the other needs.
    found = table2(smoke, [measured(plain, 0.9, reached)], [measured(penalized, 0.9)])
    assert found["table2.evaluations"]
    assert found["table2.evaluations_both"]


def test_table2_takes_for_granted_that_the_unpenalized_model_needs_no_more_than_was_tested(smoke, images):
    plain, penalized = images
    # It needs between 4 and 6 evaluations, which were not tested; the penalized one 2: at least twice as many.
    found = table2(smoke, [measured(plain, 0.9, {1: 0.1, 2: 0.1, 3: 0.1})], [measured(penalized, 0.9, {1: 0.1})])
    assert found["table2.evaluations"]  # 6 in full
    assert not found["table2.evaluations_both"]


@pytest.mark.parametrize(("others", "shown"), [((0.78, 0.80), True), ((0.80, 0.80), False), ((0.78, None), None)])
def test_table2_compares_with_the_unpenalized_model_of_the_same_cap(smoke, images, others, shown):
    plain, penalized = images
    control = smoke.images.training(strength=0.0)
    assert control.config.max_steps == penalized.config.max_steps
    found = {
        PLAIN: [measured(plain, 0.9)],
        PENALIZED: [measured(penalized.with_seed(seed), 0.9, {STOP: 0.80 + 0.01 * seed}) for seed in (0, 1)],
        PLAIN_SMALL: [measured(control.with_seed(seed), value) for seed, value in enumerate(others)],
    }
    report = EXPERIMENTS["table2"].report(smoke, found)
    by_name = {each.name: each for each in report.claims}
    assert by_name["table2.control"].shown is shown
    if shown:
        assert by_name["table2.control"].measured["gain"] == pytest.approx(1.5)
    labels = [row.label for row in report.tables[0].rows]
    assert f"{PLAIN_SMALL}, stopped at {STOP}" in labels


def test_controls_have_the_seeds_of_what_they_control(smoke):
    trainings = EXPERIMENTS["table2"].trainings(smoke, 3)
    assert [each.config.seed for each in trainings[PLAIN_SMALL]] == [0, 1, 2]
    for name in ("figure7", "figure8"):
        keys = {each.key for group in EXPERIMENTS[name].trainings(smoke, 3).values() for each in group}
        shared = {each.key for group in trainings.values() for each in group}
        assert len(keys - shared) == {"figure7": 0, "figure8": 1}[name]  # the weight decay


def test_table2_where_the_penalized_model_never_comes_near(smoke, images):
    plain, penalized = images
    report = EXPERIMENTS["table2"].report(smoke, {PLAIN: [measured(plain, 0.9)], PENALIZED: [measured(penalized, 0.5)]})
    by_name = {each.name: each for each in report.claims}
    assert by_name["table2.evaluations"].shown is False
    assert by_name["table2.evaluations"].measured == pytest.approx({"penalized, at its best": 50.0, "needed": 89.3})
    assert by_name["table2.evaluations_both"].shown is False


def test_table2_is_over_seeds(smoke, images):
    plain, penalized = images
    group = [measured(plain, 0.90, {STOP: 0.8}), measured(plain.with_seed(1), 0.92, {STOP: 0.82})]
    report = EXPERIMENTS["table2"].report(smoke, {PLAIN: group, PENALIZED: [measured(penalized, 0.9)]})
    margin = next(each for each in report.claims if each.name == "table2.margin")
    assert margin.measured["unpenalized"] == pytest.approx(81.0)
    assert margin.measured["margin"] == pytest.approx(9.0)
    assert "91.0 ± 1.0 (93.6)" in str(report)


def test_what_diverged_decides_nothing(smoke, images):
    plain, penalized = images
    found = table2(smoke, [measured(plain, 0.9), measured(plain.with_seed(1), None)], [measured(penalized, 0.9)])
    assert set(found.values()) == {None}


@pytest.mark.parametrize(
    ("accuracies", "shown"),
    [((0.5, 0.9, 0.8), True), ((0.5, 0.9, 0.895), False), ((0.9, 0.8, 0.7), False), ((0.7, 0.8, 0.9), False)],
)
def test_table3_looks_for_an_optimum_in_the_middle(smoke, accuracies, shown):
    strengths = smoke.images.strengths
    found = {"strength 0": [measured(smoke.images.training(strength=0.0), 0.99)]}
    for strength, accuracy in zip(strengths, accuracies, strict=True):
        found[f"strength {strength:g}"] = [measured(smoke.images.training(strength=strength), accuracy)]
    assert claims(EXPERIMENTS["table3"], smoke, found) == {"table3.optimum": shown}
    text = str(EXPERIMENTS["table3"].report(smoke, found))
    assert "the paper's 0.6" in text
    assert f"{100 * accuracies[0]:.1f} (82.4)" in text


def figure7(smoke, small, generous, bounded):
    radii = {PLAIN_SMALL: small, PLAIN_GENEROUS: generous, PENALIZED_SMALL: bounded}
    found = {label: [measured(smoke.figure7[label], 0.5, radii=radius)] for label, radius in radii.items()}
    return claims(EXPERIMENTS["figure7"], smoke, found)


def test_figure7_compares_the_quarters_of_trainings(smoke):
    found = figure7(smoke, (0.8, 1.0, 1.5, 2.0), (0.8, 1.0, 1.0, 0.9), (0.8, 1.1, 0.9, 0.9))
    assert found == {
        "figure7.bounded": True, "figure7.growing": True, "figure7.beyond": True, "figure7.generous": True,
    }  # fmt: skip
    found = figure7(smoke, (2.0, 1.0, 1.5, 0.8), (0.8, 1.0, 1.0, 0.9), (0.8, 0.9, 0.9, 1.1))
    assert found == dict.fromkeys(found, False)


def test_figure7_leaves_out_the_pretraining_and_takes_all_seeds(smoke):
    small = smoke.figure7[PLAIN_SMALL]
    small = replace(small, config=small.config.with_values({"pretraining.steps": 10, "pretraining.layers": 2}))
    found = {label: [measured(smoke.figure7[label], 0.5)] for label in (PLAIN_GENEROUS, PENALIZED_SMALL)}
    radii = (9.0, 0.8, 1.0, 1.0), (9.0, 1.0, 1.0, 1.2)  # the first evaluation is at step 10
    found[PLAIN_SMALL] = [measured(small.with_seed(seed), 0.5, radii=radii[seed]) for seed in (0, 1)]
    report = EXPERIMENTS["figure7"].report(smoke, found)
    growing = next(each for each in report.claims if each.name == "figure7.growing")
    assert growing.measured == pytest.approx({"first quarter": 0.9, "last quarter": 1.1})
    row = next(row for row in report.tables[0].rows if row.label == PLAIN_SMALL)
    assert row.entries[2].values == (1.0, 1.2)


def test_figure8_compares_with_the_best_weight_decay(smoke):
    decayed = next(label for label in smoke.figure8 if label not in (PLAIN, PENALIZED))

    def found(decay, residual):
        rows = {PLAIN: (0.5, 0.4), decayed: (decay, residual), PENALIZED: (0.8, 0.1)}
        return claims(EXPERIMENTS["figure8"], smoke, {
            label: [measured(smoke.figure8[label], metric, residual=size)] for label, (metric, size) in rows.items()
        })  # fmt: skip

    assert found(0.7, 0.3) == {"figure8.metric": True, "figure8.residual": True}
    assert found(0.9, 0.15) == {"figure8.metric": False, "figure8.residual": False}
    assert found(0.8, 0.3)["figure8.metric"] is False
    assert found(None, 0.3) == {"figure8.metric": None, "figure8.residual": None}


def test_table1_wants_lower_perplexities(smoke):
    language = smoke.language

    def found(penalized, stopped=29.2):
        return claims(EXPERIMENTS["table1"], smoke, {
            name: [measured(
                language.training(name),
                penalized if name.endswith("penalized") else 27.0 if name == SMALLEST else 24.0,
                {language.stop: stopped}, kind="perplexity",
            )]
            for name in language.models
        })  # fmt: skip

    assert set(found(24.9).values()) == {True}
    assert found(27.0) == {
        f"table1.{name}.{which}": which == "stopped" for name in ("post-ln", "pre-ln") for which in ("stopped", "full")
    } | {"table1.post-ln.control": False}
    assert set(found(30.0).values()) == {False}
    # A stop that costs nothing leaves nothing to make up for.
    assert found(24.0, stopped=25.0)["table1.post-ln.full"] is None
    assert found(24.9, stopped=25.0)["table1.post-ln.stopped"] is False


@pytest.mark.parametrize(
    ("accuracies", "shown"),
    [((0.5, 0.5, 0.5), True), ((0.492, 0.49, 0.491), True), ((0.48, 0.48, 0.5), False), ((0.5, None, 0.5), None)],
)
def test_modes_allows_a_point_on_the_mean_of_three_seeds(smoke, accuracies, shown):
    trainings = EXPERIMENTS["modes"].trainings(smoke, 1)
    assert [each.config.seed for group in trainings.values() for each in group] == [0, 1, 2, 0, 1, 2]
    assert {each.config.jacobian_penalty().mode for each in trainings[VJP]} == {"vjp"}
    assert {each.config.jacobian_penalty().mode for each in trainings[DIFFERENCE]} == {"difference"}
    found = {
        VJP: [measured(each, 0.9, {STOP: 0.5}) for each in trainings[VJP]],
        DIFFERENCE: [
            measured(each, None if accuracy is None else 0.9, {STOP: accuracy})
            for each, accuracy in zip(trainings[DIFFERENCE], accuracies, strict=True)
        ],
    }
    assert claims(EXPERIMENTS["modes"], smoke, found) == {"modes.near": shown}


def test_length_compares_trainings_of_the_same_seed(smoke):
    trainings = EXPERIMENTS["length"].trainings(smoke, 1)
    assert {label: len(group) for label, group in trainings.items()} == {
        f"{epochs} epochs, {penalty}": 2
        for epochs in (1, 2)
        for penalty in ("no penalty", "strength 0.5", "strength 2")
    }
    # At a stop of 4, the gains of the two seeds are 1 and 3 points, then 20 and 22; the other strength loses.
    at = {
        "1 epochs, no penalty": (0.50, 0.70),
        "1 epochs, strength 0.5": (0.51, 0.73),
        "1 epochs, strength 2": (0.40, 0.60),
        "2 epochs, no penalty": (0.60, 0.50),
        "2 epochs, strength 0.5": (0.80, 0.72),
        "2 epochs, strength 2": (0.40, 0.30),
    }
    found = {
        label: [measured(training, 0.9, {4: value}) for training, value in zip(group, at[label], strict=True)]
        for label, group in trainings.items()
    }
    report = EXPERIMENTS["length"].report(smoke, found)
    by_name = {each.name: each for each in report.claims}
    assert {name: each.shown for name, each in by_name.items()} == {
        "length.shown_0.5": True, "length.longer_0.5": True, "length.shown_2": False, "length.longer_2": False,
    }  # fmt: skip
    assert by_name["length.shown_0.5"].measured == pytest.approx({"points": 21.0, "standard error": 1.0})
    longer = {"after 2": 21.0, "after 1": 2.0, "standard error": 0.0}
    assert by_name["length.longer_0.5"].measured == pytest.approx(longer)
    assert "+21.0 ± 1.0" in str(report.tables[1])
    (curve, *_) = report.panels[1].curves
    assert curve.bars[3] == pytest.approx((50.0, 60.0))


def test_length_where_a_training_diverged(smoke):
    trainings = EXPERIMENTS["length"].trainings(smoke, 1)
    found = {label: [measured(each, 0.9) for each in group] for label, group in trainings.items()}
    lost = trainings["2 epochs, strength 2"]
    found["2 epochs, strength 2"] = [measured(lost[0], 0.9), measured(lost[1], None)]
    shown = claims(EXPERIMENTS["length"], smoke, found)
    assert shown["length.shown_2"] is None
    assert shown["length.shown_0.5"] is False  # no difference at all
