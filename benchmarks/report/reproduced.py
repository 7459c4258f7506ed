"""The results of ``python -m experiments reproduce`` as a section of a document; ``reproduced.md`` is its template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.report.rendering import render
from experiments.paper.report import Claim, Entry, ReportTable, Row


def section(facts: Mapping[str, Any], link: str) -> str:
    """The text of a section: tables, claims, and the machine and command of the measurement.

    Args:
        facts: The content of a reproduce-PROFILE-NAME.json.
        link: Where it is.
    """
    tables, claims = map(_table, facts["tables"]), [Claim(**content) for content in facts["claims"]]
    return render("reproduced.md", facts=facts, link=link, tables=tables, claims=claims)


def _table(content: Mapping[str, Any]) -> ReportTable:
    rows = (
        Row(row["label"], tuple(Entry(tuple(e["values"]), e["unit"], e["paper"]) for e in row["entries"]))
        for row in content["rows"]
    )
    return ReportTable(content["title"], tuple(content["columns"]), tuple(rows))
