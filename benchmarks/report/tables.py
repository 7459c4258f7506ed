"""Tables in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from benchmarks.results import Results, Table, Target, number

COLORS = {True: "green", False: "red", None: "dim"}
VERDICTS = {True: "met", False: "not met", None: "not measured"}


def show(console: Console, results: Results) -> None:
    """Print every table, then the targets."""
    for table in results.tables:
        _show_table(console, table)
    if results.targets:
        _show_targets(console, results.targets)
    for notice in results.notices:
        console.print(Text(notice, style="yellow"))


def limit_text(target: Target) -> str:
    """The limit of a target with its relation, such as \"≥ 6x\"."""
    unit = "" if target.unit == "1" else target.unit if target.unit == "x" else f" {target.unit}"
    return f"{'≥' if target.relation == '>=' else '≤'} {number(target.limit)}{unit}"


def measured_text(target: Target) -> str:
    """The measured value with its unit."""
    if target.measured is None:
        return "-"
    unit = "" if target.unit == "1" else target.unit if target.unit == "x" else f" {target.unit}"
    return f"{number(target.measured)}{unit}"


def verdict(target: Target) -> str:
    """Whether the target was met, in words."""
    return VERDICTS[target.met]


def numeric_columns(table: Table) -> list[bool]:
    """For each column, whether all cells are numbers; such columns are aligned to the right."""
    return [all(map(_is_number, cells)) for cells in zip(*table.rows, strict=True)]


def _is_number(cell: str) -> bool:
    try:
        float(cell.removeprefix("> ").removesuffix("x"))
    except ValueError:
        return cell in ("", "-")
    return True


def _show_table(console: Console, table: Table) -> None:
    shown = RichTable(
        title=table.title, title_justify="left", title_style="bold", caption=table.note or None, caption_justify="left"
    )
    for column, numeric in zip(table.columns, numeric_columns(table), strict=True):
        shown.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for begins, row in table.display():
        if begins:
            shown.add_section()
        shown.add_row(*row)
    console.print()
    console.print(shown)


def _show_targets(console: Console, targets: list[Target]) -> None:
    shown = RichTable(title="Targets", title_justify="left", title_style="bold")
    shown.add_column("what", overflow="fold")
    shown.add_column("target", justify="right")
    shown.add_column("measured", justify="right")
    shown.add_column("")
    for target in targets:
        shown.add_row(
            target.statement,
            limit_text(target),
            measured_text(target),
            Text(verdict(target), style=COLORS[target.met]),
        )
    counts = [sum(target.met is met for target in targets) for met in (True, False, None)]
    shown.caption = f"{counts[0]} met, {counts[1]} not met, {counts[2]} not measured"
    shown.caption_justify = "left"
    console.print()
    console.print(shown)
