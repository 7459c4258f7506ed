"""Write the measured numbers in README and docs from results in the repository, so that no number is copied by hand:

python -m benchmarks.report.documents README.md docs/experiments/paper.md

The text between ``<!-- measured: RESULTS -->`` and ``<!-- end -->`` is replaced. RESULTS is a summary of the suite or
the results of an experiment; its path is relative to the document. ``<!-- measured: RESULTS PART -->`` asks for another
part of a summary: ``contest``, ``rows`` or ``targets``.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from benchmarks.report import measured, reproduced

_SECTION = re.compile(r"(<!-- measured: (\S+)(?: (\w+))? -->\n).*?(<!-- end -->)", re.DOTALL)
_PARTS = {
    "contest": measured.contest_section,
    "rows": measured.rows_section,
    "targets": measured.targets_section,
}


def rewrite(document: Path) -> str:
    """The text of a document with new measured sections.

    Raises:
        ValueError: If it has none, or if a part is unknown.
        KeyError: If results lack a figure.
    """

    def section(found: re.Match[str]) -> str:
        return found[1] + _section(document.parent, found[2], found[3]) + found[4]

    text, count = _SECTION.subn(section, document.read_text(encoding="utf-8"))
    if not count:
        raise ValueError(f"{document} has no section <!-- measured: RESULTS -->")
    return text


def _section(folder: Path, link: str, part: str | None) -> str:
    facts = json.loads((folder / link).read_text(encoding="utf-8"))
    if part is not None:
        if part not in _PARTS:
            raise ValueError(f"part must be one of {', '.join(_PARTS)}, got {part!r}")
        return _PARTS[part](facts)
    return (reproduced if "experiment" in facts else measured).section(facts, link)


def main(arguments: list[str]) -> int:
    """Rewrite documents; returns the exit status."""
    if not arguments:
        print("usage: python -m benchmarks.report.documents DOCUMENT...", file=sys.stderr)
        return 2
    for document in map(Path, arguments):
        document.write_text(rewrite(document), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
