"""The command line: ``python -m experiments <command>``, from the root of a checkout."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.data.command import add_arguments as add_data_arguments
from experiments.paper.command import add_arguments as add_reproduce_arguments
from pydeq.cli import run


def data(arguments: argparse.Namespace) -> int:
    """List the data sets, get them or check them."""
    from experiments.data.command import run

    return run(arguments)


def train(arguments: argparse.Namespace) -> int:
    """Train a model from a configuration."""
    from experiments.training.command import run

    return run(arguments)


def generate(arguments: argparse.Namespace) -> int:
    """Generate text by a trained language model."""
    from experiments.training.generate_command import run

    return run(arguments)


def reproduce(arguments: argparse.Namespace) -> int:
    """Reproduce tables and figures of the paper."""
    from experiments.paper.command import run

    return run(arguments)


def export_cells(arguments: argparse.Namespace) -> int:
    """Train small models and export their cells as benchmark problems."""
    from experiments.export_cells import run

    return run(arguments)


def parser() -> argparse.ArgumentParser:
    """Make the parser of all commands; ``run`` among the parsed arguments is the function of the command."""
    top = argparse.ArgumentParser(prog="python -m experiments", description="Training and experiments on pydeq.")
    commands = top.add_subparsers(title="commands", dest="command", required=True)
    command = commands.add_parser("data", help="list the data sets on this machine, get more, or check them")
    add_data_arguments(command)
    command.set_defaults(run=data)
    command = commands.add_parser("train", help="train a model from a configuration")
    command.add_argument("config", nargs="?", metavar="CONFIG", help=(
        "a name that comes with the package, or a YAML or JSON file; without one, the names are listed"
    ))  # fmt: skip
    command.add_argument(
        "--out", metavar="DIR", help="folder for checkpoints, tables and plots; runs/CONFIG by default"
    )
    command.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in the folder")
    command.add_argument(
        "--set", action="append", default=[], dest="values", metavar="KEY=VALUE",
        help="another value for a field, like optimizer.lr=0.01; may be repeated",
    )  # fmt: skip
    length = command.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, help="how long to train, in epochs")
    length.add_argument("--steps", type=int, help="how long to train, in steps")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to train")
    command.set_defaults(run=train)
    command = commands.add_parser("generate", help="continue a text by a trained language model")
    command.add_argument("run_folder", metavar="RUN", help="folder of the training, like runs/CONFIG")
    command.add_argument("--prompt", default="\n", metavar="TEXT", help="beginning of the text; a new line by default")
    command.add_argument("--tokens", type=int, default=200, metavar="N", help="characters or words to add, default 200")
    command.add_argument("--temperature", type=float, default=1.0, metavar="T", help=(
        "below 1 for more probable text, 0 for the most probable token each time; default 1"
    ))  # fmt: skip
    command.add_argument("--top-k", type=int, metavar="K", help="draw from only the K most probable tokens")
    command.add_argument("--seed", type=int, default=0, help="seed of the draws, default 0")
    command.add_argument(
        "--checkpoint", choices=("last", "best"), default="last", help="which parameters, default last"
    )
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute, default cpu")
    command.set_defaults(run=generate)
    command = commands.add_parser(
        "reproduce", help="reproduce tables and figures of the paper on Jacobian regularization"
    )
    add_reproduce_arguments(command)
    command.set_defaults(run=reproduce)
    command = commands.add_parser(
        "export-cells", help="train small models, and export their cells as benchmark problems"
    )
    command.add_argument("names", nargs="*", metavar="NAME", help="of a file; by default all")
    command.add_argument("--runs", type=Path, default=Path("runs", "cells"), metavar="DIR", help=(
        "folder of the trainings; finished ones are not repeated"
    ))  # fmt: skip
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the files; by default that of the benchmarks"
    )
    command.set_defaults(run=export_cells)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    return run(parser().parse_args(argv))
