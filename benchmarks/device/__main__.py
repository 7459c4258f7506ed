"""``python -m benchmarks.device STAGE --out DIR``; the package's docstring lists the stages."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.device import summary
from benchmarks.device.parent import Parent

STAGES = ("first", "overhead", "captured")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__)
    parser.add_argument("stage", choices=(*STAGES, "usable", "counters", "summary"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/gpu"), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=120.0, help="the stage is ended after this")
    # Options that a parent passes to its workers.
    parser.add_argument("--skip", default="", help=argparse.SUPPRESS)
    parser.add_argument("--pipe", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.stage == "summary":
        return summary.show(arguments.out)
    if arguments.stage == "usable":
        from benchmarks.device import usable

        return usable.main()
    if arguments.stage == "counters":
        from benchmarks.device import counters

        return counters.main()
    if arguments.pipe is not None:
        from benchmarks.device import worker

        return worker.main(arguments.stage, arguments.skip, arguments.pipe)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.stage}.jsonl"
    path.write_text("")
    command = [sys.executable, "-m", "benchmarks.device", arguments.stage]
    return Parent(command, path, arguments.seconds, lambda row: print(summary.line(row), flush=True)).run()


if __name__ == "__main__":
    sys.exit(main())
