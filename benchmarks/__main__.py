"""Run the suite: ``python -m benchmarks --profile quick``."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import pydeq
from benchmarks import peers
from benchmarks.environment import facts, thread_counts
from benchmarks.profiles import PROFILES
from benchmarks.progress import Board
from benchmarks.report import page, plots, tables
from benchmarks.results import Results
from benchmarks.suites import SUITES, Context

OUT = Path(__file__).parent / "out"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit status."""
    arguments = _parse(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log has no width of its own
    found, notices = peers.load()
    kernels = pydeq.kernels()
    if not kernels.cpu:
        notices.append(f"pydeq runs on its references, without compiled kernels: {kernels.cpu_reason}")
    profile = PROFILES[arguments.profile]
    results = Results(facts(profile, {name: peer.version for name, peer in found.items()}))
    results.notices.extend(notices)
    for notice in notices:
        console.print(notice, style="yellow")
    start, traces = time.perf_counter(), []
    with Board(console, arguments.only) as board:
        for name in arguments.only:
            begin = time.perf_counter()
            try:
                with board.suite(name) as bar:
                    SUITES[name](Context(profile, found, results, bar, thread_counts(profile)))
            except Exception as error:  # keep what the other suites found
                results.notices.append(f"{name} failed: {type(error).__name__}: {error}")
                traces.append(traceback.format_exc())
            results.seconds[name] = time.perf_counter() - begin
    tables.show(console, results)
    results.save(arguments.out / "summary.json")
    drawn = plots.draw(results, arguments.out)
    page.write(results, drawn, arguments.out / "report.html")
    console.print(f"\nTook {time.perf_counter() - start:.0f} s. Wrote to {arguments.out}:", highlight=False)
    console.print("  summary.json, report.html, " + ", ".join(path.name for path in drawn.values()), highlight=False)
    for trace in traces:
        print(trace, file=sys.stderr)
    return 1 if traces else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Compare pydeq with its peers.")
    parser.add_argument(
        "--profile",
        choices=PROFILES,
        default="quick",
        help="smoke: a minute; quick (the default): about nine minutes on two cores; full: longer",
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        help=f"run only this suite: {', '.join(SUITES)}; for several, repeat --only or separate names with commas",
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"where to write (default: {OUT})")
    arguments = parser.parse_args(argv)
    asked = [name for entry in arguments.only or SUITES for name in entry.split(",")]
    for name in asked:
        if name not in SUITES:
            parser.error(f"argument --only: expected one of {', '.join(SUITES)}, got {name!r}")
    arguments.only = [name for name in SUITES if name in asked]
    # Check this before minutes of work, not after.
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=arguments.out):
            pass
    except OSError as error:
        parser.error(f"argument --out: cannot write to {arguments.out}: {error.strerror}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
