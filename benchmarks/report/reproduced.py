"""The results of ``python -m experiments reproduce`` as a section of a document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from experiments.paper.report import Claim, Entry, ReportTable, Row


def section(facts: Mapping[str, Any], link: str) -> Iterator[str]:
    """The lines of a section: tables, claims, and where and how they were measured.

    Args:
        facts: The content of a reproduce-PROFILE-NAME.json.
        link: Where it is.
    """
    for content in facts["tables"]:
        table = _table(content)
        yield from ("", f"{table.title}:", "", *table.markdown().splitlines(), "")
    for note in facts["notes"]:
        yield from (note, "")
    for content in facts["claims"]:
        yield f"- {Claim(**content)}"
    environment = facts["environment"]
    seconds = sum(training["seconds"] for training in facts["trainings"])
    yield from (
        "",
        f"`python -m experiments reproduce {facts['experiment']} --profile {facts['profile']}`:"
        f" {len(facts['trainings'])} trainings of {seconds / 60:.0f} minutes in all, each on one core of"
        f" {environment['device_name']}, which others shared; {environment['date'][:10]}; [every number]({link}).",
        "",
    )


def _table(content: Mapping[str, Any]) -> ReportTable:
    rows = (
        Row(row["label"], tuple(Entry(tuple(e["values"]), e["unit"], e["paper"]) for e in row["entries"]))
        for row in content["rows"]
    )
    return ReportTable(content["title"], tuple(content["columns"]), tuple(rows))
