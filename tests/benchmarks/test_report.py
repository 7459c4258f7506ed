"""The report: performance profiles, the sentence on top, plots, and a page that needs nothing else."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import hypothesis.strategies as st
import pytest
from hypothesis import given

pytest.importorskip("rich", reason="the benchmark suite's own requirements are not installed")

from benchmarks.report import contest, page, plots
from benchmarks.report.contest import Step, common_problems, costs, profile_curves, sentence
from benchmarks.results import Entry, Figure, Results

FACTS = {
    "profile": "quick", "device": "cpu", "cpu": "a <processor>", "cores": 2, "caches": {}, "memory_gib": None,
    "threads": [1], "peers": ["pydeq", "torchdeq"], "load_at_start": 0.1, "platform": "Linux",
    "commit": "abcdef0123456", "date": "2026-01-02T03:04:05+00:00", "uncommitted_changes": False,
    "versions": {"torch": "2.13.0"},
    "kernels": {"cpu": True, "instruction_set": "avx2", "cpu_reason": ""},
}  # fmt: skip


def test_profiles_of_a_worked_example():
    curves = profile_curves({"a": [1.0, 4.0, 3.0, math.inf], "b": [2.0, 1.0, 3.0, math.inf]})
    # Ratios of a: 1, 4, 1 and a failure; of b: 2, 1, 1 and a failure.
    assert curves["a"] == Step((1.0, 4.0), (0.5, 0.75))
    assert curves["b"] == Step((1.0, 2.0), (0.5, 0.75))


def test_profiles_of_failures_and_of_costs_of_nothing():
    curves = profile_curves({"never": [math.inf, math.inf], "free": [0.0, 2.0], "dear": [1.0, 2.0]})
    assert curves["never"] == Step((1.0,), (0.0,))
    assert curves["free"] == Step((1.0,), (1.0,))
    assert curves["dear"].share[:1] == (0.5,)
    assert curves["dear"].ratio == (1.0, math.inf)
    for wrong, message in (
        ({"a": [1.0], "b": [1.0, 2.0]}, "of the same problems"), ({"a": [math.nan]}, "at least 0"),
        ({"a": [-1.0]}, "at least 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            profile_curves(wrong)


cost = st.one_of(st.integers(1, 50).map(float), st.just(math.inf))


@given(st.integers(1, 8).flatmap(lambda n: st.lists(st.lists(cost, min_size=n, max_size=n), min_size=1, max_size=4)))
def test_profiles_are_shares_within_a_ratio(table):
    curves = profile_curves({str(i): row for i, row in enumerate(table)})
    problems = range(len(table[0]))
    for i, row in enumerate(table):
        curve = curves[str(i)]
        assert curve.ratio[0] == 1.0
        assert list(curve.ratio) == sorted(set(curve.ratio))
        assert list(curve.share) == sorted(curve.share)
        for ratio, share in zip(curve.ratio, curve.share, strict=True):
            within = [p for p in problems if row[p] < math.inf and row[p] / min(other[p] for other in table) <= ratio]
            assert share == len(within) / len(problems)
        assert curve.share[-1] == sum(value < math.inf for value in row) / len(problems)


def entry(problem, library, status="solved", seconds=1.0, evaluations=10.0, solver="anderson", note="", solvable=True):
    solved = status == "solved"
    return Entry(
        problem, problem[0], f"{library}.{solver}", library, status, evaluations if solved else None, 0.0,
        seconds if solved else None, seconds, seconds, title=f"{library}'s {solver}",
        problem_title=f"Problem {problem}", note=note, solvable=solvable,
    )  # fmt: skip


ENTRIES = [
    entry("a1", "pydeq", seconds=0.5),
    entry("a1", "pydeq", seconds=2.0, evaluations=4.0, solver="broyden"),
    entry("a1", "torchdeq", seconds=1.0, evaluations=5.0),
    entry("a2", "pydeq", "unsolved"),
    entry("a2", "pydeq", "crashed", solver="broyden", note="ValueError: <nothing>"),
    entry("a2", "torchdeq"),
    entry("b1", "pydeq"),
    entry("b1", "pydeq", solver="broyden"),
    entry("b1", "torchdeq", "refused"),
    entry("b2", "pydeq", seconds=3.0),
    entry("b2", "pydeq", "lied", solver="broyden"),
    entry("b2", "torchdeq", seconds=1.0, evaluations=20.0),
    entry("c1", "pydeq", "said so", solvable=False),
    entry("c1", "pydeq", "silent", solver="broyden", solvable=False),
    entry("c1", "torchdeq", "fooled", solvable=False),
]


def contested():
    results = Results(dict(FACTS), entries=list(ENTRIES))
    results.table("contest", "Numbers", ("kind", "name", "value"), [("x", "one", "> 9"), ("x", "two", "10x")], "<note>")
    results.target("good", "Reached", "<=", 1.0, 0.5, "x")
    results.target("unknown", "Not tried", "<=", 1.0, None, "x")
    results.target("bad", "Missed", "<=", 1.0, 2.0, "x")
    results.seconds["contest"] = 12.0
    for name in ("pydeq", "torchdeq"):
        points = (1.0, 2.0, 3.0)
        results.curve("precision", "Problem a1", name, f"{name} anderson", points, (1.0, 0.1, 0.01), (0.5, 0.05, 0.005),
                      (2.0, 0.2, 0.02))  # fmt: skip
    return results


def test_only_problems_that_every_library_can_be_given_are_compared():
    problems = common_problems(ENTRIES)
    assert [rows[0].problem for rows in problems] == ["a1", "a2", "b2"]
    assert costs(problems, lambda each: each.library, contest.time_of) == {
        "pydeq": [0.5, math.inf, 3.0],
        "torchdeq": [1.0, 1.0, 1.0],
    }
    assert costs(problems, lambda each: each.contender, contest.work_of)["pydeq.broyden"] == [4.0, math.inf, math.inf]


def test_libraries_that_can_be_given_everything_are_compared_on_everything():
    problems = contest.all_problems(ENTRIES)
    assert [rows[0].problem for rows in problems] == ["a1", "a2", "b1", "b2"]
    assert {row.library for rows in problems for row in rows} == {"pydeq"}
    assert contest.all_problems([]) == []


def test_standings_count_what_became_of_each_problem():
    anderson, other, broyden = contest.standings(ENTRIES)  # those that solve most come first
    assert (anderson.contender, anderson.solved, anderson.unsolved, anderson.fastest) == ("pydeq.anderson", 3, 1, 2)
    assert (broyden.solved, broyden.lied, broyden.crashed, broyden.fewest) == (2, 1, 1, 2)
    assert (other.solved, other.refused, other.fastest, other.fewest) == (3, 1, 2, 1)
    assert contest.by_family(ENTRIES)["torchdeq.anderson"] == {"a": (2, 2), "b": (1, 1), "c": (0, 1)}
    assert contest.by_family(ENTRIES)["pydeq.anderson"] == {"a": (1, 2), "b": (2, 2), "c": (1, 1)}


def test_the_sentence_says_who_wins_and_where_pydeq_loses():
    text = sentence(contested())
    assert text == (
        "pydeq is first or tied in time on 2 of 4 problems and in evaluations and products on 3 of 4 problems. It fails"
        " on 1 problem that another library solves: Problem a2 (torchdeq). The largest lead of another library is"
        " torchdeq's: 3x on Problem b2."
    )
    results = Results({}, entries=[row for row in ENTRIES if row.problem == "a1"])
    assert "It solves every problem that another library solves." in sentence(results)


def test_without_a_contest_the_sentence_is_about_overheads():
    results = Results({})
    assert sentence(results) == ""
    for name, value in (("anderson.32x512.t1", 5.0), ("broyden.32x512.t1", 14.0), ("broyden.mean.t1", 30.0)):
        results.figure(f"overhead.{name}.torchdeq_over_pydeq", value, "1")
    results.figure("overhead.small.step.pydeq_over_loop", 0.1, "1")
    assert sentence(results) == "Between two evaluations, torchdeq takes 5 to 14 times as long as pydeq, over 2 cases."


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return plots.draw(contested(), tmp_path_factory.mktemp("plots"))


def test_plots_of_a_contest(drawn, tmp_path):
    assert set(drawn) == {"profile", "solvers", "precision"}
    for path in drawn.values():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert ElementTree.parse(path.with_suffix(".svg")).getroot().tag.endswith("svg")
    assert plots.draw(Results(dict(FACTS)), tmp_path) == {}


def test_many_solvers_have_lines_of_their_own():
    sides = [(f"{library}.{i}", library) for library in ("pydeq", *"abcdefgh") for i in range(3)]
    looks = plots._looks(sides)
    assert len({(look.color, look.dash) for look in looks.values()}) == len(sides)
    assert all(looks[name].own == (library == "pydeq") for name, library in sides)


def test_bars_show_their_quartiles():
    results = Results({})
    results.figures.append(Figure("overhead.x", 2.0, "ms", 1.5, 3.0, 5))
    assert plots._measured(results, "overhead.x") == (2.0, ((0.5,), (1.0,)))
    assert plots._measured(results, "missing") is None


class Page(HTMLParser):
    """The tables of a page, and whether tags are balanced."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.sources = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.sources += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def test_the_page_has_everything_and_needs_nothing(drawn, tmp_path):
    results = contested()
    page.write(results, drawn, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = Page(text)
    assert all(source.startswith(("data:", "#")) for source in found.sources)
    assert not re.search(r"https?:|@import|url\(", text)
    assert "a &lt;processor&gt;, 2 cores" in text
    assert sentence(results).replace("'", "&#39;") in text
    assert "&lt;note&gt;" in text
    order = [text.index(part) for part in ("2 cores", "first or tied", "<img", "<nav", 'id="contest"', 'id="targets"')]
    assert order == sorted(order)
    *_, targets = found.tables
    assert [row[0] for row in targets] == ["what", "Missed", "Not tried", "Reached"]
    matrix = next(table for table in found.tables if table[0][:2] == ["problem", "family"])
    assert matrix[0][2:] == ["pydeq.anderson", "pydeq.broyden", "torchdeq.anderson"]
    assert [row[2:] for row in matrix[1:]] == [
        ["✓", "✓", "✓"], ["·", "!", "✓"], ["✓", "✓", "–"], ["✓", "✗", "✓"], ["✓", "·", "✗"],
    ]  # fmt: skip
    assert "pydeq&#39;s broyden: raised an exception, ValueError: &lt;nothing&gt;" in text
    numbers = next(table for table in found.tables if table[0] == ["kind", "name", "value"])
    assert numbers[1:] == [["x", "one", "> 9"], ["x", "two", "10x"]]  # repeated cells are hidden, not missing


def test_a_page_is_written_again_from_its_summary(drawn, tmp_path):
    results = contested()
    results.save(tmp_path / "summary.json")
    assert page.main([str(tmp_path / "summary.json")]) == 0
    again = (tmp_path / "report.html").read_bytes()
    page.write(results, drawn, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == again
    assert json.loads((tmp_path / "summary.json").read_text())["entries"][0]["problem"] == "a1"
    assert page.main([]) == 2
