"""Write the measured numbers in README and docs from results in the repository, so that no number is copied by hand:

python -m benchmarks.report.documents README.md docs/experiments/paper.md

The text between ``<!-- measured: RESULTS -->`` and ``<!-- end -->`` is replaced. RESULTS is a summary of the suite or
the results of an experiment; its path is relative to the document.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from benchmarks.report import measured, reproduced

_SECTION = re.compile(r"(<!-- measured: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rewrite(document: Path) -> str:
    """The text of a document with new measured sections.

    Raises:
        ValueError: If it has none.
        KeyError: If results lack a figure.
    """
    text, count = _SECTION.subn(
        lambda found: found[1] + _section(document.parent, found[2]) + found[3], document.read_text(encoding="utf-8")
    )
    if not count:
        raise ValueError(f"{document} has no section <!-- measured: RESULTS -->")
    return text


def _section(folder: Path, link: str) -> str:
    facts = json.loads((folder / link).read_text(encoding="utf-8"))
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
