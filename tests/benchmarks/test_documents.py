"""The numbers of README and docs are those of the results that they name."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from benchmarks.report import measured
from benchmarks.report.documents import main, rewrite
from benchmarks.report.publish import DOCUMENTS, publish
from benchmarks.results import Entry as ContestEntry
from benchmarks.results import Results
from experiments.paper.report import Entry, Report, ReportTable, Row, claim, report_mapping

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_say_what_was_measured(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert rewrite(ROOT / name) == text, f"run python -m benchmarks.report.documents {name}"


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "benchmarks/README.md"])
def test_documents_name_files_that_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    paths = re.findall(r"`((?:pydeq|csrc|experiments|benchmarks|tests|docs)/[\w<>*./-]*)`", text)
    assert len(paths) > 5
    built = ("benchmarks/out",)
    missing = [path for path in paths if not path.startswith(built) and not any(ROOT.glob(re.sub(r"<\w+>", "*", path)))]
    assert not missing


def test_rewriting_replaces_the_section_alone(tmp_path):
    (tmp_path / "summary.json").write_bytes((ROOT / "benchmarks/results/cpu.json").read_bytes())
    readme = tmp_path / "README.md"
    readme.write_text(
        "before\n<!-- measured: summary.json -->\n| Picard | 99x |\n<!-- end -->\nafter\n", encoding="utf-8"
    )
    assert main([str(readme)]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- measured: summary.json -->\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "99x" not in text
    assert "| Broyden, 30 steps | (8, 65536) |" in text


def test_publishing_keeps_what_documents_show(tmp_path):
    facts = json.loads((ROOT / "benchmarks/results/cpu.json").read_text(encoding="utf-8"))
    more = [{"name": name, "value": 1.0} for name in ("time.x", "differences.conv.float32.order1.step0.1.draw")]
    summary, plot = tmp_path / "out" / "summary.json", tmp_path / "out" / "overhead.png"
    for folder in ("out", "docs", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    summary.write_text(json.dumps(facts | {"figures": [*facts["figures"], *more], "curves": [1, 2]}), encoding="utf-8")
    plot.write_bytes(b"a plot")
    published = json.loads(publish(summary, tmp_path).read_text(encoding="utf-8"))
    assert published == facts | {"figures": [*facts["figures"], more[1]]}
    assert (tmp_path / "docs" / "overhead.png").read_bytes() == b"a plot"


def test_a_run_that_leaves_a_model_out_can_be_published(tmp_path):
    facts = json.loads((ROOT / "benchmarks/results/cpu.json").read_text(encoding="utf-8"))
    fewer = [each for each in facts["figures"] if not each["name"].startswith("models.mdeq_large.")]
    assert len(fewer) < len(facts["figures"])
    shown = measured.shown(facts | {"figures": fewer})
    assert {each["name"] for each in shown["figures"]} == {each["name"] for each in fewer}


@pytest.mark.parametrize(
    ("target", "met"),
    [
        ({"measured": None, "met": None}, None),
        ({"measured": None, "met": False}, False),  # infinite, which JSON cannot say
        ({"measured": 0.5, "met": True}, True),
    ],
)
def test_a_target_that_was_missed_by_far_was_measured(target, met):
    entry = {"name": "a", "statement": "a", "relation": "<=", "limit": 1.0, "unit": "1"} | target
    (found,) = measured._targets({"targets": [entry]})
    assert found.met is met


def with_entries():
    """The published results with a small contest: (problem, library, status, evaluations, seconds)."""
    rows = (
        ("a|b", "pydeq", "solved", 10.0, 0.02),
        ("a|b", "torchdeq", "solved", 12.0, 0.01234567),
        ("c", "pydeq", "solved", 10.0, 0.5),
        ("c", "torchdeq", "lied", None, None),
    )
    entries = [
        ContestEntry(
            problem,
            "f",
            f"{library}.anderson",
            library,
            status,
            evaluations,
            None,
            seconds,
            title=f"{library} Anderson",
        )
        for problem, library, status, evaluations, seconds in rows
    ]
    facts = json.loads((ROOT / "benchmarks/results/cpu.json").read_text(encoding="utf-8"))
    return facts | {"tables": [{"a": 1}], "entries": [vars(entry) for entry in entries]}


def test_publishing_keeps_the_contest(tmp_path):
    for folder in ("out", "docs", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    summary, facts = tmp_path / "out" / "summary.json", with_entries()
    (tmp_path / "out" / "profile.png").write_bytes(b"profiles")
    # Documents show the contest of a run without other suites, so that its picture and its numbers are of one run.
    target = {**facts["targets"][0], "name": "contest.failures"}
    summary.write_text(json.dumps(facts | {"targets": [*facts["targets"], target]}), encoding="utf-8")
    other = json.loads(publish(summary, tmp_path).read_text(encoding="utf-8"))
    assert "entries" not in other
    assert other["targets"] == facts["targets"]
    assert not (tmp_path / "docs" / "profile.png").exists()
    own = {**facts["figures"][0], "name": "contest.first.jax.after_others"}  # a figure that the contest itself has
    summary.write_text(json.dumps(facts | {"figures": [own]}), encoding="utf-8")
    path = publish(summary, tmp_path)
    assert path.name == "contest-cpu.json"
    published = json.loads(path.read_text(encoding="utf-8"))
    assert "tables" not in published
    assert published["entries"][3] == {
        "problem": "c", "family": "f", "contender": "torchdeq.anderson", "library": "torchdeq", "status": "lied",
        "title": "torchdeq Anderson",
    }  # fmt: skip
    entries = Results.from_json(published).entries
    assert [entry.seconds for entry in entries] == [0.02, 0.01235, 0.5, None]
    assert (tmp_path / "docs" / "profile.png").read_bytes() == b"profiles"


def test_parts_of_a_summary(tmp_path):
    facts = with_entries()
    (tmp_path / "summary.json").write_text(json.dumps({**facts, "tables": []}), encoding="utf-8")
    document = tmp_path / "document.md"
    document.write_text(
        "".join(f"<!-- measured: summary.json {part} -->\n<!-- end -->\n" for part in ("contest", "targets")),
        encoding="utf-8",
    )
    assert main([str(document)]) == 0
    contest, targets = document.read_text(encoding="utf-8").split("<!-- end -->\n")[:2]
    assert "pydeq is first or tied in time on 1 of 2 problems" in contest.replace("\n", " ")
    assert "| pydeq Anderson | pydeq | 2 of 2 | 0 | 0 | 1 | 2 |\n" in contest
    assert "| torchdeq Anderson | torchdeq | 1 of 2 | 1 | 0 | 1 | 0 |\n" in contest
    assert "| a\\|b | torchdeq: torchdeq Anderson | 12.3 | pydeq Anderson | 20 | 1.62 |\n" in contest
    missed = [target for target in facts["targets"] if not target["met"]]
    assert targets.count("\n| ") == len(missed) + 1
    assert all(f"| {target['statement']} | " in targets for target in missed)
    assert rewrite(document) == document.read_text(encoding="utf-8")
    document.write_text("<!-- measured: summary.json kernels -->\n<!-- end -->\n", encoding="utf-8")
    with pytest.raises(ValueError, match="part must be one of contest, rows, targets, got 'kernels'"):
        rewrite(document)


def test_results_of_an_experiment_as_a_section(tmp_path):
    report = Report(
        tables=[
            ReportTable("Accuracy", ("model", "accuracy (paper)"), (Row("plain", (Entry((60.0, 62.0), paper=93.6),)),))
        ],
        claims=[
            claim("x.near", "they are near", {"difference": 0.5}, True),
            claim("x.far", "they are far", {"difference": math.nan}, False),
        ],
        notes=["Smaller than the paper's."],
    )
    environment = {"device_name": "a processor", "date": "2026-01-02T03:04:05+00:00"}
    facts = {"experiment": "table2", "profile": "cpu", "seeds": 2, "environment": environment}
    content = report_mapping(report, facts, {}) | {"trainings": [{"seconds": 90.0}, {"seconds": 150.0}]}
    (tmp_path / "results.json").write_text(json.dumps(content), encoding="utf-8")
    document = tmp_path / "document.md"
    document.write_text("a\n<!-- measured: results.json -->\nold\n<!-- end -->\nb\n", encoding="utf-8")
    assert main([str(document)]) == 0
    text = document.read_text(encoding="utf-8")
    assert "| model | accuracy (paper) |\n|---|---|\n| plain | 61.0 ± 1.0 (93.6) |\n" in text
    assert "\nSmaller than the paper's.\n" in text
    assert "- SHOWN: they are near: difference 0.5\n- NOT MEASURED: they are far: difference -\n" in text
    assert "2 trainings, 4 minutes in all" in text
    assert "commit unknown, 2026-01-02" in text
    assert "old" not in text
    assert rewrite(document) == text


def test_a_document_without_a_section_is_refused(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no section <!-- measured"):
        rewrite(readme)
    assert main([]) == 2
