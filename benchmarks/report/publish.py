"""Put results into the repository, and into the documents that show them:

python -m benchmarks.report.publish benchmarks/out/summary.json                        # of the benchmark suite
python -m benchmarks.report.publish runs/reproduce-cpu/reproduce-cpu-table1.json       # of an experiment

``benchmarks/results`` has one file for the suite on each kind of device, with the figures that documents show, one for
a run of the contest alone, and one file for each experiment, with all figures.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from benchmarks.report import measured
from benchmarks.report.documents import rewrite
from benchmarks.results import row_by_row

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "docs/benchmarks.md", "docs/experiments/paper.md")
PLOTS, CONTEST_PLOTS = ("evaluations.png", "overhead.png"), ("profile.png",)


def publish(path: Path, root: Path = ROOT) -> Path:
    """Copy results into ``benchmarks/results``; returns the copy.

    Raises:
        KeyError: If a summary lacks a figure that documents show.
    """
    facts = json.loads(path.read_text(encoding="utf-8"))
    if "experiment" in facts:
        name = path.name
    else:
        device = facts["device"]
        alone = all(each["name"].startswith("contest.") for each in facts["figures"])  # a run of the contest alone
        name = f"contest-{device}.json" if alone else f"{device}.json"
        if alone:
            facts, plots = measured.without_curves(facts), CONTEST_PLOTS
        else:  # documents show the contest of a run that has no other suite
            facts, plots = measured.shown(facts), PLOTS
            facts.pop("entries", None)
            facts["targets"] = [each for each in facts["targets"] if not each["name"].startswith("contest.")]
        for plot in map(path.with_name, plots):
            if plot.exists():
                shutil.copyfile(plot, root / "docs" / plot.name)
    copy = root / "benchmarks" / "results" / name
    copy.write_text(row_by_row(facts), encoding="utf-8")
    return copy


def main(arguments: list[str]) -> int:
    """Publish results and rewrite the documents; returns the exit status."""
    if not arguments:
        print("usage: python -m benchmarks.report.publish RESULTS.json...", file=sys.stderr)
        return 2
    for path in map(Path, arguments):
        print(publish(path))
    for name in DOCUMENTS:
        (ROOT / name).write_text(rewrite(ROOT / name), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
