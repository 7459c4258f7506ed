"""README's numbers are those of the summary that it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.report.readme import main, rewrite

README = Path(__file__).parents[2] / "README.md"


def test_readme_says_what_was_measured():
    assert rewrite(README) == README.read_text(encoding="utf-8"), "run python -m benchmarks.report.readme README.md"


def test_rewriting_replaces_the_section_alone(tmp_path):
    summary = next(README.parent.glob("benchmarks/results/cpu-*-quick.json"))
    (tmp_path / "summary.json").write_bytes(summary.read_bytes())
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


def test_a_readme_without_a_section_is_refused(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no section <!-- measured"):
        rewrite(readme)
    assert main([]) == 2
