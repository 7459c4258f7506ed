"""The numbers of README and docs are those of the results that they name."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from benchmarks.report.documents import main, rewrite
from benchmarks.report.publish import publish
from experiments.paper.report import Entry, Report, ReportTable, Row, claim, report_mapping

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


@pytest.mark.parametrize("name", ["README.md", "docs/experiments/paper.md"])
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
    assert "2 trainings of 4 minutes in all" in text
    assert "old" not in text
    assert rewrite(document) == text


def test_a_document_without_a_section_is_refused(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no section <!-- measured"):
        rewrite(readme)
    assert main([]) == 2
