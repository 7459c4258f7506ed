"""The command line: ``python -m pydeq <command>``, or ``pydeq <command>`` once installed."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence

import torch

from pydeq.compiled import kernels
from pydeq.data.command import add_arguments as add_data_arguments
from pydeq.experiments.command import add_arguments as add_reproduce_arguments


def info(arguments: argparse.Namespace) -> int:
    """Print what runs: kernels, versions, machine."""
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
    from pydeq.compat.migrate import migrate as run

    return run(arguments.paths, arguments.write)


def data(arguments: argparse.Namespace) -> int:
    """Say which data sets are here, and get others."""
    from pydeq.data.command import run

    return run(arguments)


def train(arguments: argparse.Namespace) -> int:
    """Train a model from a configuration."""
    from pydeq.training.command import run

    return run(arguments)


def reproduce(arguments: argparse.Namespace) -> int:
    """Reproduce tables and figures of the paper."""
    from pydeq.experiments.command import run

    return run(arguments)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands. A command's parser has a default ``run``: its function of the arguments."""
    top = argparse.ArgumentParser(prog="pydeq", description="Deep-equilibrium-model solvers for PyTorch.")
    commands = top.add_subparsers(title="commands", dest="command", required=True)
    command = commands.add_parser("info", help="say which kernels run, on which versions and machine")
    command.set_defaults(run=info)
    command = commands.add_parser(
        "migrate", help="move imports of torchdeq and of locuslab/deq's lib.solvers to pydeq.compat"
    )
    command.add_argument("paths", nargs="+", metavar="FILE", help="a file, or a folder with *.py files")
    command.add_argument("--write", action="store_true", help="rewrite the files instead of listing what would change")
    command.set_defaults(run=migrate)
    command = commands.add_parser("data", help="say which data sets are here and how to get the others; get them")
    add_data_arguments(command)
    command.set_defaults(run=data)
    command = commands.add_parser("train", help="train a model from a configuration")
    command.add_argument("config", metavar="CONFIG", help="a name that comes with the package, or a .yaml file")
    command.add_argument(
        "--out", metavar="DIR", help="folder for checkpoints, tables and plots; runs/CONFIG by default"
    )
    command.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the folder")
    command.add_argument(
        "--set", action="append", default=[], dest="values", metavar="KEY=VALUE",
        help="another value for a field, like optimizer.lr=0.01; may be repeated",
    )  # fmt: skip
    length = command.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, help="how long to train, in epochs")
    length.add_argument("--steps", type=int, help="how long to train, in steps")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to train")
    command.set_defaults(run=train)
    command = commands.add_parser(
        "reproduce", help="reproduce tables and figures of the paper on Jacobian regularization"
    )
    add_reproduce_arguments(command)
    command.set_defaults(run=reproduce)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    arguments = parser().parse_args(argv)
    return arguments.run(arguments)
