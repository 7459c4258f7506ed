"""The command line: ``python -m pydeq <command>``, or ``pydeq <command>`` once installed."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence

import torch

from pydeq.compat.migrate import migrate as migrate_files
from pydeq.ops.kernels import kernels


def info(arguments: argparse.Namespace) -> int:
    """Print the kernels in use, the versions and the machine."""
    print(kernels())
    rows = {
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
    }
    print("\n".join(f"{name:<14}{value}" for name, value in rows.items()))
    return 0


def migrate(arguments: argparse.Namespace) -> int:
    """Find, and rewrite, imports of torchdeq and of locuslab/deq's solvers."""
    return migrate_files(arguments.paths, arguments.write)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands. A command's parser has a default ``run``: its function of the arguments."""
    top = argparse.ArgumentParser(prog="pydeq", description="Deep-equilibrium-model solvers for PyTorch.")
    commands = top.add_subparsers(title="commands", dest="command", required=True)
    command = commands.add_parser("info", help="print the kernels in use, the versions and the machine")
    command.set_defaults(run=info)
    command = commands.add_parser(
        "migrate", help="move imports of torchdeq and of locuslab/deq's lib.solvers to pydeq.compat"
    )
    command.add_argument("paths", nargs="+", metavar="FILE", help="a file, or a folder with *.py files")
    command.add_argument("--write", action="store_true", help="rewrite the files instead of listing what would change")
    command.set_defaults(run=migrate)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    arguments = parser().parse_args(argv)
    return arguments.run(arguments)
