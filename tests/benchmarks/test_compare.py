"""Two runs compared: noise is no change, counts are exact, and only pydeq's own figures count as worse."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("rich", reason="the benchmark suite's own requirements are not installed")

from benchmarks import __main__ as command
from benchmarks.compare import compare
from benchmarks.results import Entry, Figure, Results

FACTS = {
    "profile": "quick", "device": "cpu", "cpu": "a processor", "cores": 2, "threads": [1],
    "peers": ["pydeq", "torchdeq"], "versions": {"torch": "2.13.0"},
}  # fmt: skip


def run(*figures, entries=(), **facts):
    return Results(FACTS | facts, figures=list(figures), entries=list(entries))


def timed(value, low=None, high=None, name="time.pydeq", unit="ms"):
    return Figure(name, value, unit, low, high)


def verdict(before, after):
    (change,) = compare(run(before), run(after)).changes
    return change.verdict


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((1.0, 0.9, 1.1), (1.5, 1.4, 1.6), "worse"),
        ((1.5, 1.4, 1.6), (1.0, 0.9, 1.1), "better"),
        ((1.0, 0.9, 1.45), (1.5, 1.4, 1.6), "same"),  # the quartiles overlap
        ((1.0, 0.99, 1.01), (1.08, 1.07, 1.09), "same"),  # apart, but less than the floor
        ((1.0,), (1.2,), "same"),  # single measurements
        ((1.0,), (1.3,), "worse"),
    ],
)
def test_times_change_beyond_their_quartiles_and_a_floor(before, after, expected):
    assert verdict(timed(*before), timed(*after)) == expected


@pytest.mark.parametrize(
    ("name", "unit", "before", "after", "expected"),
    [
        ("nfe.p.anderson.pydeq", "calls", 100.0, 101.0, "worse"),
        ("nfe.p.anderson.pydeq", "calls", 100.0, 99.67, "better"),
        ("training.c.pydeq.products", "products", 8.0, 8.0, "same"),
        ("training.c.pydeq.memory", "MiB", 10.0, 10.05, "same"),
        ("training.c.pydeq.memory", "MiB", 10.0, 10.5, "worse"),
        ("kernels.anderson_step.kernel.bandwidth", "GB/s", 10.0, 20.0, "better"),
        ("converged.p.pydeq", "1", 1.0, 0.9, "worse"),
        ("time.p.torchdeq_over_pydeq", "1", 4.0, 2.0, "worse"),
        ("nfe.p.anderson.torchdeq", "calls", 100.0, 200.0, "not judged"),
        ("residual.p.pydeq", "1", 1e-6, 1e-5, "not judged"),
        ("training.c.penalty.step.pydeq_difference_over_pydeq", "1", 1.0, 0.5, "not judged"),
        ("digits.plain.pydeq.calls", "calls", 9.0, 12.0, "not judged"),
        ("adjoints.digits_plain.rtol1e-06.gmres.products", "products", 9.0, 12.0, "not judged"),
        ("jacobian.conv.layer.vjp.added", "ms", 0.1, 0.5, "not judged"),
        ("import.torch", "s", 1.0, 3.0, "not judged"),
        ("overhead.small.step.loop", "ms", 1.0, 3.0, "not judged"),
    ],
)
def test_units_say_what_is_better(name, unit, before, after, expected):
    assert verdict(Figure(name, before, unit), Figure(name, after, unit)) == expected


def entry(status, evaluations=None, seconds=None, contender="pydeq.anderson", library="pydeq"):
    return Entry("p", "f", contender, library, status, evaluations, None, seconds, seconds, seconds)


def test_entries_are_compared_by_status_count_and_time():
    before = run(entries=[entry("solved", 10, 1.0), entry("solved", 10, 1.0, "torchdeq.anderson", "torchdeq")])
    after = run(entries=[entry("solved", 12, 0.5), entry("lied", 10, 1.0, "torchdeq.anderson", "torchdeq")])
    found = {change.before.name: change.verdict for change in compare(before, after).changes}
    assert found == {
        "contest.p.pydeq.anderson.status": "same",
        "contest.p.pydeq.anderson.evaluations": "worse",
        "contest.p.pydeq.anderson.time": "better",
        "contest.p.torchdeq.anderson.status": "not judged",
    }
    for old, new, expected in (
        ("solved", "unsolved", "worse"), ("unsolved", "lied", "worse"), ("crashed", "solved", "better"),
        ("said so", "fooled", "worse"),
    ):  # fmt: skip
        changes = compare(run(entries=[entry(old)]), run(entries=[entry(new)])).changes
        assert [change.verdict for change in changes] == [expected]


def test_what_appears_and_disappears_is_named():
    found = compare(run(timed(1.0), timed(1.0, name="old")), run(timed(1.0), timed(1.0, name="new")))
    assert found.appeared == ("new",)
    assert found.disappeared == ("old",)


def test_a_figure_of_pydeq_that_is_missing_is_a_failure(tmp_path, capsys):
    before = run(
        timed(1.0), timed(1.0, name="time.torchdeq"), entries=[entry("solved"), entry("solved", contender="pydeq.b")]
    )
    before.seconds = {"a": 1.0, "contest": 1.0}
    after = run(timed(1.0, name="time.torchdeq"), entries=[entry("solved")])
    after.seconds = before.seconds
    found = compare(before, after)
    assert found.failures == ("Missing: time.pydeq, contest.p.pydeq.b.status",)
    assert compare_files(tmp_path, before, after) == 1
    assert "Missing: time.pydeq" in capsys.readouterr().out
    # What was not asked for is not missing: other suites, other problems, fewer libraries, another library's figures.
    other = run(timed(1.0), entries=[Entry("q", "f", "pydeq.anderson", "pydeq", "solved")])
    other.seconds = {"contest": 1.0}
    assert compare(before, other).failures == ()
    without = run(timed(1.0, name="new"), peers=["pydeq"])
    without.seconds = before.seconds
    assert compare(before, without).failures == ()
    lacks = run(timed(1.0), entries=before.entries)
    lacks.seconds = before.seconds
    assert compare(before, lacks).failures == ()


def test_times_of_another_machine_are_not_compared():
    count = Figure("nfe.pydeq", 3.0, "calls")
    found = compare(run(timed(1.0), count), run(timed(9.0), count, cpu="another"))
    assert [change.before.name for change in found.changes] == ["nfe.pydeq"]
    assert found.appeared == found.disappeared == ()
    assert found.warnings == ("The machines differ (cpu), so times are not compared.",)


def compare_files(tmp_path, before, after):
    paths = []
    for name, results in (("before", before), ("after", after)):
        paths.append(tmp_path / f"{name}.json")
        results.save(paths[-1])
    return command.main(["--compare", *map(str, paths)])


def test_the_exit_status_says_whether_something_got_worse(tmp_path, capsys):
    slow, fast = run(timed(2.0, 1.9, 2.1)), run(timed(1.0, 0.9, 1.1))
    assert compare_files(tmp_path, fast, fast) == 0
    assert compare_files(tmp_path, slow, fast) == 0
    output = capsys.readouterr().out
    assert "Better" in output
    assert "Compared 1 figures of pydeq: 0 worse, 1 better, 0 the same" in output
    assert compare_files(tmp_path, fast, slow) == 1
    output = capsys.readouterr().out
    assert all(text in output for text in ("Worse", "time.pydeq", "1 ms", "2 ms"))


def test_files_that_cannot_be_compared_are_refused(tmp_path, capsys):
    assert compare_files(tmp_path, run(timed(1.0)), run(timed(1.0), profile="full")) == 2
    assert "profile must be the same in both files, got 'quick' and 'full'" in capsys.readouterr().err
    assert compare_files(tmp_path, run(timed(1.0)), run(timed(1.0), device="cuda")) == 2
    assert "device must be the same" in capsys.readouterr().err
    good = tmp_path / "before.json"
    for content, message in (
        ("{", "is not a summary"), ("[]", "is not a summary"), ('{"figures": [{"a": 1}]}', "is not a summary"),
        (json.dumps({"seconds": {}, "notices": []}), "has no figures"), (None, "cannot read"),
    ):  # fmt: skip
        bad = tmp_path / "bad.json"
        bad.unlink(missing_ok=True)
        if content is not None:
            bad.write_text(content)
        assert command.main(["--compare", str(good), str(bad)]) == 2
        assert message in capsys.readouterr().err


def test_what_fails_in_the_second_run_is_worse(tmp_path, capsys):
    good, nothing = run(timed(1.0, 0.9, 1.1)), run(timed(None))
    assert compare_files(tmp_path, good, nothing) == 1
    assert "time.pydeq has no value any more" in capsys.readouterr().out
    failed = run(timed(1.0, 0.9, 1.1, name="other.pydeq"))
    failed.notices.append("nfe failed: RuntimeError: no luck")
    assert compare_files(tmp_path, good, failed) == 1
    assert "nfe failed: RuntimeError: no luck" in capsys.readouterr().out
    assert compare_files(tmp_path, failed, failed) == 0  # it failed before


def test_profiles_of_one_name_and_other_sizes_are_refused(tmp_path, capsys):
    before, after = (run(timed(1.0), profile_sizes={"digits_epochs": n, "nfe_seeds": 3}) for n in (5, 2))
    assert compare_files(tmp_path, before, after) == 2
    assert "different are digits_epochs" in capsys.readouterr().err
    assert compare_files(tmp_path, before, before) == 0


def test_published_results_can_be_compared(capsys):
    published = str(command.PUBLISHED / "cpu.json")
    assert command.main(["--compare", published, published]) == 0
    assert ": 0 worse, 0 better," in capsys.readouterr().out
