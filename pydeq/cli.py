"""The command line: ``python -m pydeq <command>``, or ``pydeq <command>`` once installed."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pydeq.arguments import did_you_mean
from pydeq.compat.migrate import migrate as migrate_files
from pydeq.diagnosis import diagnose as diagnose_layer
from pydeq.ops.kernels import kernels, package_version


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


def diagnose(arguments: argparse.Namespace) -> int:
    """Diagnose a layer on a batch; the status is 0 if it converges, 1 if not, 2 if it cannot be evaluated."""
    try:
        deq, z0, *context = problem_of(arguments.target)
        report = diagnose_layer(deq, z0, *context, max_steps=arguments.max_steps)
        print(report)
        if arguments.plot is not None:
            report.plot(arguments.plot)
    except BrokenPipeError:
        raise
    except Exception as error:  # of the user's code, most of the time
        print(f"pydeq diagnose: {_sentence(error)}", file=sys.stderr)
        return 2
    return 0 if report.converges else 1


def _sentence(error: Exception) -> str:
    """An error in one line, with the last line of the user's code that it passed through."""
    text = " ".join(str(error).split()) or "no message"
    library = (str(Path(__file__).parent), str(Path(torch.__file__).parent))
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((*library, "<")) and frame.line
    ]
    if not frames or isinstance(error, ImportError):
        return text
    return f"{frames[-1].filename}, line {frames[-1].lineno}: {type(error).__name__}: {text}"


def problem_of(target: str) -> tuple[Any, ...]:
    """The tuple (deq or cell, z0, *context) that MODULE:ATTRIBUTE is, or returns.

    Modules of the current folder are found, too. An attribute may have dots.

    Raises:
        ImportError, AttributeError: If there is no such module or attribute.
        TypeError, ValueError: If it is no such tuple.
    """
    module, colon, attribute = target.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"expected MODULE:ATTRIBUTE, got {target!r}")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if module.endswith(".py"):
        raise ValueError(
            f"expected the name of a module, got the file {module!r}: write"
            f" {module.removesuffix('.py').replace('/', '.')}:{attribute}"
        )
    found: Any = importlib.import_module(module)
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise AttributeError(f"{module} has no attribute {name!r}{did_you_mean(name, dir(found))}")
        found = getattr(found, name)
    made = found if isinstance(found, tuple) else found() if callable(found) else found
    if not isinstance(made, tuple) or len(made) < 2 or not callable(made[0]):
        raise TypeError(
            f"{target} must be a tuple (deq or cell, z0, *context), or a function without arguments that returns one,"
            f" got {type(made).__name__}"
        )
    return made


def parser() -> argparse.ArgumentParser:
    """The parser of all commands. A command's parser has a default ``run``: its function of the arguments."""
    top = argparse.ArgumentParser(prog="pydeq", description="Deep-equilibrium-model solvers for PyTorch.")
    top.add_argument("--version", action="version", version=f"pydeq {package_version()}")
    commands = top.add_subparsers(title="commands", dest="command", required=True)
    command = commands.add_parser("info", help="print the kernels in use, the versions and the machine")
    command.set_defaults(run=info)
    command = commands.add_parser(
        "migrate", help="move imports of torchdeq and of locuslab/deq's lib.solvers to pydeq.compat"
    )
    command.add_argument("paths", nargs="+", metavar="FILE", help="a file, or a folder with *.py files")
    command.add_argument("--write", action="store_true", help="rewrite the files instead of listing what would change")
    command.set_defaults(run=migrate)
    command = commands.add_parser(
        "diagnose",
        help="find out why a layer does not converge on a batch, and what to change",
        description="Diagnose a layer on a batch: print a report. The exit status is 0 if the layer converges, 1 if it"
        " does not, and 2 if it cannot be evaluated.",
    )
    command.add_argument(
        "target",
        metavar="MODULE:ATTRIBUTE",
        help="a function without arguments that returns a tuple (deq or cell, z0, *context), or such a tuple",
    )
    command.add_argument("--plot", metavar="FILE", help="draw residuals and eigenvalues into a file, as report.png")
    command.add_argument("--max-steps", type=int, default=200, metavar="N", help="evaluations for each try (200)")
    command.set_defaults(run=diagnose)
    return top


def run(arguments: argparse.Namespace) -> int:
    """Run the command of parsed arguments; return its exit status.

    If the reader of the output ends first, as ``head`` does, so does the command, with status 1 and without a message.
    """
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    return run(parser().parse_args(argv))
