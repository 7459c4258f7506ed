"""Run the suite: ``python -m benchmarks --profile quick``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

import pydeq
from benchmarks import compare, peers
from benchmarks.environment import facts, thread_counts
from benchmarks.partial import Partial, read_shares
from benchmarks.problems import collection
from benchmarks.profiles import PROFILES
from benchmarks.progress import Board
from benchmarks.report import page, plots, tables
from benchmarks.results import Results
from benchmarks.suites import ON_DEVICE, SUITES, Context

OUT = Path(__file__).parent / "out"
PUBLISHED = Path(__file__).parent / "results"
STOPPED = 130  # as shells report Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit status."""
    arguments = _parse(argv)
    if arguments.compare:
        return compare.main(arguments.compare)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log has no width of its own
    found, notices = peers.load()
    found = {name: peer for name, peer in found.items() if name == peers.NAMES[0] or _in(arguments.peers, name)}
    kernels = pydeq.kernels()
    if not kernels.cpu:
        notices.append(f"pydeq runs on its references, without compiled kernels: {kernels.cpu_reason}")
    profile, device = PROFILES[arguments.profile], arguments.device
    if arguments.left_out:
        notices.append(f"left out, since they measure only the CPU: {', '.join(arguments.left_out)}")
    conditions = facts(profile, {name: peer.version for name, peer in found.items()}, device)
    partial = Partial(arguments.out / "partial")
    asked = {"peers_asked": arguments.peers, "problems_asked": arguments.problems}
    try:
        shares = read_shares(arguments.reuse or (), conditions)
    except (OSError, ValueError) as error:
        print(f"python -m benchmarks: --reuse: {error}", file=sys.stderr)
        return 2
    try:
        partial.start(conditions | asked, arguments.resume)
    except ValueError as error:
        print(f"python -m benchmarks: --resume: {error}", file=sys.stderr)
        return 2
    partial.reuse(shares)
    results = Results(conditions)
    results.notices.extend(notices)
    for notice in notices:
        console.print(notice, style="yellow")
    finished = {name: part for name in arguments.only if (part := partial.load(name)) is not None}
    if finished:
        console.print(f"finished before: {', '.join(finished)}", highlight=False)
    start, traces = time.perf_counter(), []
    waiting = [name for name in arguments.only if name not in finished]
    before = seconds_before((arguments.out / "summary.json", PUBLISHED / f"{device}.json"), profile.name)
    try:
        with Board(console, waiting, before) as board:
            for name in arguments.only:
                if name in finished:
                    results.add(finished[name])
                    continue
                part, begin = Results(conditions), time.perf_counter()
                try:
                    with board.suite(name) as bar:
                        SUITES[name](
                            Context(
                                profile,
                                found,
                                part,
                                bar,
                                thread_counts(profile),
                                **asked,
                                device=device,
                                kept=partial.kept(name),
                            )
                        )
                except Exception as error:  # keep what the other suites found
                    part.notices.append(f"{name} failed: {type(error).__name__}: {error}")
                    traces.append(traceback.format_exc())
                else:
                    reused = sum(share["seconds"].get(name, 0.0) for share in shares) if name == "contest" else 0.0
                    part.seconds[name] = time.perf_counter() - begin + reused
                    partial.save(name, part)
                results.add(part)
    except KeyboardInterrupt:
        console.print("\nStopped. To continue, add --resume to the same command.", highlight=False)
        return STOPPED
    tables.show(console, results)
    results.save(arguments.out / "summary.json")
    drawn = plots.draw(results, arguments.out)
    page.write(results, drawn, arguments.out / "report.html")
    console.print(f"\nTook {time.perf_counter() - start:.0f} s. Wrote to {arguments.out}:", highlight=False)
    names = ["summary.json", "report.html", *(path.name for path in drawn.values())]
    console.print(f"  {', '.join(names)}", highlight=False)
    for trace in traces:
        print(trace, file=sys.stderr)
    if traces:
        console.print("To run only the suites that failed, add --resume to the same command.", highlight=False)
        return 1
    partial.clear()
    return 0


def seconds_before(summaries: Sequence[Path], profile: str) -> dict[str, float]:
    """The seconds that each suite took in earlier runs.

    Args:
        summaries: Files of earlier runs, the best first. Those of other profiles come last.
        profile: The profile that is going to run.
    """
    found = []
    for path in summaries:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found.append((content["profile"] != profile, dict(content["seconds"])))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # only an estimate depends on it
    seconds: dict[str, float] = {}
    for _, earlier in sorted(found, key=lambda each: each[0], reverse=True):
        seconds |= earlier
    return seconds


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compare pydeq with its peers.",
        epilog="Names can be separated by commas, or the option repeated.",
    )
    parser.add_argument(
        "--profile",
        choices=PROFILES,
        default="quick",
        help="smoke: three minutes; quick (the default): about ten minutes on two cores; full: longer",
    )

    def add_list(option: str, metavar: str, help_: str) -> None:
        parser.add_argument(option, action="append", type=_names, metavar=metavar, help=help_)

    libraries = tuple(peers.REQUIREMENTS)
    add_list("--only", "SUITE", f"run only this suite: {', '.join(SUITES)}")
    add_list("--peers", "LIBRARY", f"compare only with this library: {', '.join(libraries[1:])}")
    add_list(
        "--problems", "PREFIX", "contest: only the problems of this family, or whose names begin like this; or all"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to solve (default: cpu)")
    parser.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    parser.add_argument(
        "--reuse",
        action="append",
        type=Path,
        metavar="SUMMARY.json",
        help="contest: take the problems of this run, of the same code on the same machine, instead of solving them",
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"where to write (default: {OUT})")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("BEFORE.json", "AFTER.json"),
        help="run nothing, and compare two summaries; the exit status is 1 if a figure got worse",
    )
    arguments = parser.parse_args(argv)
    if arguments.compare:
        return arguments
    only, arguments.peers, arguments.problems = map(_flat, (arguments.only, arguments.peers, arguments.problems))
    for option, asked, known in (("--only", only, SUITES), ("--peers", arguments.peers, libraries)):
        for name in asked or ():
            if name not in known:
                parser.error(f"argument {option}: expected one of {', '.join(known)}, got {name!r}")
    for name in arguments.problems or ():
        if not collection.may_exist(name):
            parser.error(
                f"argument --problems: expected the beginning of a key or one of {', '.join(collection.FAMILIES)}, got"
                f" {name!r}"
            )
    arguments.only = [name for name in SUITES if _in(only, name)]
    if arguments.reuse and "contest" not in arguments.only:
        parser.error("argument --reuse: it is for the contest, which --only leaves out")
    arguments.left_out = []
    if arguments.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("argument --device: torch finds no GPU")
        arguments.left_out = [name for name in arguments.only if name not in ON_DEVICE]
        arguments.only = [name for name in arguments.only if name in ON_DEVICE]
        if not arguments.only:
            parser.error(f"argument --device: only these suites run on a GPU: {', '.join(sorted(ON_DEVICE))}")
    # Check this before minutes of work, not after.
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=arguments.out):
            pass
    except OSError as error:
        parser.error(f"argument --out: cannot write to {arguments.out}: {error.strerror}")
    return arguments


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _flat(groups: Sequence[tuple[str, ...]] | None) -> tuple[str, ...] | None:
    return tuple(name for group in groups for name in group) if groups else None


def _in(asked: Sequence[str] | None, name: str) -> bool:
    return asked is None or name in asked


if __name__ == "__main__":
    sys.exit(main())
